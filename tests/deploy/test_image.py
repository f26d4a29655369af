"""The image that image.sh built of the Dockerfile: what is in it, and its server at work."""

import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, Server, certiq, environment
from scripts import script

LIMIT_BYTES = 120_000_000
USER = 65532
# As buildah tells it.
Config = dict[str, Any]
VARIANTS = ("", "glibc-hwcaps/x86-64-v3", "glibc-hwcaps/x86-64-v4")


@pytest.fixture(scope="session")
def image() -> Path:
    """The folder that image.sh describes; minutes, unless these sources were built before."""
    return Path(script("image.sh", timeout=3000))


@pytest.fixture(scope="session")
def config(image: Path) -> Config:
    found: Config = json.loads((image / "config").read_text())["Docker"]["config"]
    return found


def test_size(image: Path) -> None:
    assert int((image / "size").read_text()) < LIMIT_BYTES


def test_every_variant_of_the_core_is_inside(image: Path) -> None:
    library = image / "root" / "opt" / "certiq" / "lib"
    found = {file.parent.relative_to(library) for file in library.rglob("libcertiq_engine.so")}
    assert found == {Path(variant) for variant in VARIANTS}
    digests = {(library / variant / "libcertiq_engine.so").read_bytes() for variant in VARIANTS}
    assert len(digests) == len(VARIANTS)


def test_nothing_of_the_build_is_left(image: Path) -> None:
    root = image / "root"
    for gone in ("src", "build", "ccache", "usr/bin/cc", "usr/bin/cmake", "usr/include/grpc"):
        assert not (root / gone).exists()
    assert not list((root / "var/lib/apt/lists").glob("*_Packages*"))
    listed = (root / "opt/certiq/share/packages.tsv").read_text()
    assert re.search(r"^libgrpc\+\+1\.51\t1\.51\.1-", listed, re.MULTILINE)


def versions(listed: str) -> dict[str, str]:
    """Of what programs are made by and of, from dpkg-query's lines."""
    packages = dict(line.split("\t") for line in listed.splitlines())
    makers = r".*-dev|g\+\+.*|gcc.*|cpp.*|binutils.*|protobuf.*|cmake"
    return {name: version for name, version in packages.items() if re.fullmatch(makers, name)}


def test_the_same_bytes_as_built_elsewhere(image: Path, tmp_path: Path) -> None:
    """The programs of the build tree: another folder, and no compiler cache in common."""
    built = image / "root" / "opt" / "certiq"
    installed = tmp_path / "installed"
    install = ["cmake", "--install", str(ROOT / "build" / "release"), "--component", "server"]
    subprocess.run(
        [*install, "--strip", "--prefix", str(installed)], capture_output=True, check=True
    )
    programs = [file.relative_to(installed) for file in installed.rglob("*") if file.is_file()]
    assert len(programs) == 1 + len(VARIANTS)
    differ = [str(file) for file in programs if not same(installed / file, built / file)]
    if not differ:
        return
    asked = ["dpkg-query", "-W", "-f", "${Package}\t${Version}\n"]
    here = versions(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    inside = versions((built / "share" / "build-packages.tsv").read_text())
    others = {name: (inside[name], here.get(name)) for name in inside}
    others = {name: both for name, both in others.items() if both[0] != both[1]}
    assert others, f"same packages, other bytes (is build/release up to date?): {differ}"
    pytest.skip(f"{differ} differ, and so do what the image and they were made of: {others}")


def same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def test_configuration(config: Config) -> None:
    assert config["User"] == f"{USER}:{USER}"
    assert config["Entrypoint"] == ["certiq-server"]
    assert not config.get("Cmd")
    assert config["Healthcheck"]["Test"] == ["CMD", "certiq-server", "--probe"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Volumes"].keys() == {"/var/lib/certiq"}
    assert config["ExposedPorts"].keys() == {"8470/tcp", "8471/tcp"}
    variables = dict(entry.split("=", 1) for entry in config["Env"])
    assert variables["PATH"].split(":")[0] == "/opt/certiq/bin"
    # Clear text to everyone is nobody's default.
    assert "CERTIQ_ALLOW_CLEARTEXT" not in variables


class Contained:
    """Runs programs in the image's root, as its user, with nothing writable but the volume.

    No container: the same root, user and variables, and a root that is read-only. Ports are the
    machine's, since there is no network of its own.
    """

    def __init__(self, root: Path, config: Config, folder: Path) -> None:
        self.volume = folder / "volume"
        self.volume.mkdir()
        os.chown(self.volume, USER, USER)
        self.variables = dict(entry.split("=", 1) for entry in config["Env"])
        # A mount namespace of its own, so nothing is left mounted whatever happens.
        inside = (
            'mount --bind "$1" "$1" && mount --bind "$2" "$1/var/lib/certiq" && '
            'mount -o remount,bind,ro "$1" && mount -t proc proc "$1/proc" && '
            'mount --rbind /dev "$1/dev" && '
            f'root="$1" && shift 2 && exec /usr/sbin/chroot --userspec={USER}:{USER} "$root" "$@"'
        )
        self.program = folder / "certiq-server"
        command = f"""#!/bin/bash
exec unshare --mount --propagation private bash -c '{inside}' bash '{root}' '{self.volume}' \
  certiq-server "$@"
"""
        self.program.write_text(command)
        self.program.chmod(0o755)

    def run(self, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.program), *flags],
            env=environment(self.variables | variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def contained(image: Path, config: Config, tmp_path: Path) -> Contained:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("entering the image's root takes root and unshare")
    # The image's user reaches nothing below pytest's own folders.
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & stat.S_IXOTH and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | stat.S_IXOTH)
    return Contained(image / "root", config, tmp_path)


@pytest.fixture
def server(contained: Contained, tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "server"
    ports = {
        "CERTIQ_LISTEN": "127.0.0.1:0",
        "CERTIQ_METRICS_LISTEN": "127.0.0.1:0",
        # The one place that can be written to.
        "CERTIQ_PORT_FILE": "/var/lib/certiq/port",
    }
    folder.mkdir()
    for name in ("port", "port.metrics"):
        (folder / name).symlink_to(contained.volume / name)
    started = Server(
        folder,
        env=contained.variables | ports,
        embedded_defaults=False,
        program=contained.program,
    )
    yield started
    assert started.stop() == 0, started.log()


def test_serves_probes_and_quantizes(
    server: Server, contained: Contained, tmp_path: Path, image: Path
) -> None:
    listen = {"CERTIQ_LISTEN": server.address}
    assert contained.run("--probe", **listen).returncode == 0
    data = ROOT / "tests" / "data"
    report = tmp_path / "report.json"
    layer = [
        *("--weights", str(data / "weights.safetensors")),
        *("--weight", "encoder.layer.3.attention.output.dense.weight"),
        *("--activations", str(data / "activations.safetensors"), "--x", "layer.3.attn_out.x"),
    ]
    result = ["--output", str(tmp_path / "q.safetensors"), "--report", str(report)]
    done = certiq("quantize", "--server", server.address, *layer, "--bits", "4", *result)
    assert done.returncode == 0, done.stderr + server.log()
    verify = ["--result", str(tmp_path / "q.safetensors"), "--report", str(report)]
    assert certiq("verify", *layer, *verify).returncode == 0

    # The loader took the variant that this machine's processor is for.
    mapped = Path(f"/proc/{server.process.pid}/maps").read_text()
    (library,) = set(re.findall(r"\S+libcertiq_engine\.so", mapped))
    isa = json.loads(report.read_text())["isa"]
    flags = set(
        re.findall(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split()
    )
    expected = (
        "x86-64-v4"
        if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags
        else "x86-64-v3"
        if {"avx2", "bmi2", "fma"} <= flags
        else "/lib/libcertiq_engine.so"
    )
    assert expected in library, f"{library} for {isa}"

    # Nothing but the volume was written to; the store is its user's alone.
    assert {file.name for file in contained.volume.iterdir()} == {"store", "port", "port.metrics"}
    store = (contained.volume / "store").stat()
    assert (store.st_uid, stat.S_IMODE(store.st_mode)) == (USER, 0o700)

    server.terminate()
    assert server.wait() == 0
    assert contained.run("--probe", **listen).returncode == 1


def test_default_command_refuses_clear_text_to_everyone(contained: Contained) -> None:
    done = contained.run()
    assert done.returncode == 1
    assert "allow_cleartext" in done.stdout + done.stderr
