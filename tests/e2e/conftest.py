"""Servers, the layer of tests/data, and one way to send a layer through the command line."""

import faulthandler
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# Matrices are small, and threads that spin while they wait take cores from the servers.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest
from programs import CERTIQ, ROOT, SERVER, Server, certiq
from safetensors.numpy import save_file
from stubs import spec_pb2
from verification import Layer, Run

WEIGHT = "encoder.layer.3.attention.output.dense.weight"
ACTIVATIONS = "layer.3.attn_out.x"

StartServer = Callable[..., Server]
MakeLayer = Callable[[np.ndarray, np.ndarray], Layer]


def pytest_sessionstart() -> None:
    for program in (SERVER, CERTIQ):
        if not program.is_file():
            pytest.exit(f"{program} is not built; see tests/README.md", returncode=3)


@pytest.fixture(autouse=True)
def _no_test_hangs() -> Iterator[None]:
    """One that does ends the run, and shows where it was."""
    faulthandler.dump_traceback_later(900, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@dataclass
class Settings:
    bits: int = 4
    symmetric: bool = True
    group_size: int = 0
    more: tuple[str, ...] = ()

    def flags(self) -> list[str]:
        return [
            *("--method", "optq", "--bits", str(self.bits)),
            f"--symmetric={'true' if self.symmetric else 'false'}",
            *("--group_size", str(self.group_size)),
            *self.more,
        ]

    def __str__(self) -> str:
        grid = "sym" if self.symmetric else "asym"
        group = f"g{self.group_size}" if self.group_size else "channel"
        return "-".join([f"{self.bits}bit", grid, group, *self.more])


@dataclass
class Quantizer:
    """Sends layers through the command line and finds again what was written."""

    folder: Path
    _count: int = 0

    def run(self, server: Server, layer: Layer, settings: Settings) -> Run:
        self._count += 1
        output = self.folder / f"{self._count}.safetensors"
        report = self.folder / f"{self._count}.json"
        done = certiq(
            *("quantize", "--server", server.address),
            *layer.flags(),
            *settings.flags(),
            *("--output", str(output), "--report", str(report)),
        )
        assert done.returncode == 0, f"{done.stderr}\n{server.log()}"
        run = Run(layer, output, report)
        # It is the layer that was asked for.
        found = run.certificate
        asked = (settings.bits, settings.symmetric, settings.group_size)
        assert (found.bits, found.symmetric, found.group_size) == asked
        assert found.method == spec_pb2.METHOD_OPTQ
        return run


@pytest.fixture(scope="session")
def carried_layer() -> Layer:
    data = ROOT / "tests" / "data"
    return Layer(
        data / "weights.safetensors", WEIGHT, data / "activations.safetensors", ACTIVATIONS
    )


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """For tests that leave it as they found it."""
    started = Server(tmp_path_factory.mktemp("server"), ["--workers", "2", "--queue_limit", "64"])
    yield started
    assert started.stop() == 0, started.log()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers of this test's own; they are ended with it."""
    servers: list[Server] = []

    def start(*flags: str, env: Mapping[str, str] | None = None) -> Server:
        servers.append(Server(tmp_path / f"server_{len(servers)}", flags, env))
        return servers[-1]

    yield start
    for started in servers:
        started.stop()


@pytest.fixture(scope="session")
def quantizer(tmp_path_factory: pytest.TempPathFactory) -> Quantizer:
    return Quantizer(tmp_path_factory.mktemp("quantized"))


@pytest.fixture
def make_layer(tmp_path: Path) -> MakeLayer:
    """Writes a layer of the test's own into one file."""

    def make(weight: np.ndarray, x: np.ndarray) -> Layer:
        path = tmp_path / "layer.safetensors"
        save_file({"w.weight": weight, "x": x}, path)
        return Layer(path, "w.weight", path, "x")

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Model data and references too large to carry."""
    folder = Path(os.environ.get("CERTIQ_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "references" / "manifest_ist.json").is_file():
        pytest.skip(f"no model data in {folder}; CERTIQ_SHARED_DATA may name its folder")
    return folder


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(20240229)
