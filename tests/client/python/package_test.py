"""What pip makes of client/python, in an environment of its own."""

import json
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from programs import ROOT, Server

PACKAGE = ROOT / "client" / "python"

USE = """
import sys, numpy as np
# Before and after: one copy of google.rpc serves all.
from google.rpc import error_details_pb2, status_pb2
import certiq, certiq.aio
assert "site-packages" in certiq.__file__, certiq.__file__
random = np.random.default_rng(1)
W, X = random.standard_normal((16, 64)), random.standard_normal((300, 64))
with certiq.Client(sys.argv[1]) as client:
    layer = client.quantize(W, X, certiq.Spec(bits=4, format="gptq_v2", group_size=32))
    with client.calibration(64) as calibration:
        with calibration.stream("rank-0") as stream:
            stream.send(X)
        calibration.finalize(expected_tokens=300)
        job = client.submit(W, calibration=calibration, name="layer")
        assert job.result().shape == (16, 64)
    try:
        client.quantize(W, X, certiq.Spec(bits=1))
    except certiq.InvalidArgument as error:
        assert error.field == "spec.bits"
Q = layer.dequantized().astype(float)
error = np.linalg.norm(X @ (W - Q).T) / np.linalg.norm(X @ W.T)
assert abs(error / layer.relative_error - 1) < 1e-4
print("used")
"""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a user's pip builds it, with the requirements that the package names."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, PACKAGE)
    (found,) = folder.iterdir()
    return found


def test_the_wheel_needs_no_compiler(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    listed = zipfile.ZipFile(wheel).namelist()
    names = set(listed)
    assert len(names) == len(listed)
    for name in ("py.typed", "_proto/spec_pb2.py", "_proto/spec_pb2.pyi", "aio.py"):
        assert f"certiq/{name}" in names
    assert not [name for name in names if name.startswith("google/") or name.endswith(".md")]
    assert {name.split("/")[0] for name in names} <= {"certiq", wheel.name[:-17] + ".dist-info"}


def test_it_asks_for_the_protobuf_that_its_code_was_made_for(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        code = content.read("certiq/_proto/spec_pb2.py").decode()
        (name,) = [n for n in content.namelist() if n.endswith("METADATA")]
        metadata = content.read(name).decode()
    (version,) = [
        line.split()[-1] for line in code.splitlines() if line.startswith("# Protobuf Python")
    ]
    (wanted,) = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist: protobuf")
    ]
    assert f">={version}" in wanted
    for name in ("grpcio", "numpy", "googleapis-common-protos", "ml-dtypes"):
        assert f"Requires-Dist: {name}" in metadata
    assert "Provides-Extra: torch" in metadata
    assert "Provides-Extra: plots" in metadata


def test_from_a_clean_environment(wheel: Path, server: Server, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--only-binary=:all:", wheel)
    run(python, "-m", "pip", "check")
    assert run(python, "-I", "-W", "error", "-c", USE, server.address, cwd=tmp_path) == "used\n"
    found = json.loads(run(python, "-m", "pip", "list", "--format", "json"))
    assert "torch" not in {package["name"] for package in found}


def test_a_source_distribution_carries_the_contract(tmp_path: Path) -> None:
    """And builds where there is no checkout around it."""
    run(
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "--target",
        "sdist",
        "--directory",
        tmp_path,
        cwd=PACKAGE,
    )
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as content:
        names = [name.split("/", 1)[1] for name in content.getnames()]
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    assert "proto/certiq/v1/spec.proto" in names
    assert not [name for name in names if name.endswith(("_pb2.py", "_pb2.pyi", ".pyc"))]
    (folder,) = (tmp_path / "unpacked").iterdir()
    run(
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "--target",
        "wheel",
        "--directory",
        tmp_path / "out",
        cwd=folder,
    )
    (built,) = (tmp_path / "out").iterdir()
    assert "certiq/_proto/spec_pb2.py" in zipfile.ZipFile(built).namelist()
