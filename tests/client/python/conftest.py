"""Servers, clients, and the layer the repository carries."""

import faulthandler
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

# Behind this folder, whose work.py is another.
sys.path.append(str(Path(__file__).resolve().parents[2] / "e2e"))

import certiq
from programs import ROOT, SERVER, Server
from safetensors.numpy import load_file

StartServer = Callable[..., Server]


def pytest_sessionstart() -> None:
    if not SERVER.is_file():
        pytest.exit(f"{SERVER} is not built; see tests/README.md", returncode=3)


@pytest.fixture(autouse=True)
def _no_test_hangs() -> Iterator[None]:
    """One that does ends the run, and shows where it was."""
    faulthandler.dump_traceback_later(900, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """For tests that leave it as they found it."""
    started = Server(tmp_path_factory.mktemp("server"), ["--workers", "2", "--queue_limit", "64"])
    yield started
    assert started.stop() == 0, started.log()


@pytest.fixture
def client(server: Server) -> Iterator[certiq.Client]:
    with certiq.Client(server.address) as made:
        yield made


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers of this test's own; they are ended with it."""
    servers: list[Server] = []

    def start(*flags: str) -> Server:
        servers.append(Server(tmp_path / f"server_{len(servers)}", flags))
        return servers[-1]

    yield start
    for started in servers:
        started.stop()


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(20240229)


@pytest.fixture(scope="session")
def carried_weight() -> np.ndarray:
    tensors = load_file(ROOT / "tests" / "data" / "weights.safetensors")
    return tensors["encoder.layer.3.attention.output.dense.weight"]


@pytest.fixture(scope="session")
def carried_x() -> np.ndarray:
    return load_file(ROOT / "tests" / "data" / "activations.safetensors")["layer.3.attn_out.x"]
