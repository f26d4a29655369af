"""Servers, the carried layer, and one way to send a layer through the command line."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import safetensors_file
from google.protobuf import json_format
from oracle import Calibration, Run
from programs import CERTIQ, ROOT, SERVER, Server, certiq
from safetensors_file import Tensor
from stubs import certificate_pb2

WEIGHT = "encoder.layer.3.attention.output.dense.weight"
ACTIVATIONS = "layer.3.attn_out.x"

StartServer = Callable[..., Server]


def pytest_sessionstart() -> None:
    for program in (SERVER, CERTIQ):
        if not program.is_file():
            pytest.exit(f"{program} is not built; see tests/README.md", returncode=3)


@dataclass(frozen=True)
class Layer:
    """A layer in safetensors files, and the same in memory."""

    weights_file: Path
    weight: str
    activations_file: Path
    x: str

    def flags(self) -> list[str]:
        return [
            *("--weights", str(self.weights_file), "--weight", self.weight),
            *("--activations", str(self.activations_file), "--x", self.x),
        ]


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
    """Sends layers through the command line and reads back what was written."""

    folder: Path
    _calibrations: dict[tuple[Path, str], Calibration] = field(default_factory=dict)
    _count: int = 0

    def calibration(self, layer: Layer) -> Calibration:
        """Shared by runs of one layer, for its factors."""
        key = (layer.activations_file, layer.x)
        if key not in self._calibrations:
            tensors = safetensors_file.read(layer.activations_file)
            self._calibrations[key] = Calibration(tensors[layer.x])
        return self._calibrations[key]

    def files(self, server: Server, layer: Layer, settings: Settings) -> tuple[Path, Path]:
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
        return output, report

    def run(self, server: Server, layer: Layer, settings: Settings) -> Run:
        output, report = self.files(server, layer, settings)
        return read_run(layer, settings, self.calibration(layer), output, report)


def read_run(
    layer: Layer, settings: Settings, calibration: Calibration, output: Path, report: Path
) -> Run:
    tensors = safetensors_file.read(output)
    prefix = layer.weight.removesuffix(".weight")
    assert set(tensors) <= {layer.weight, *(f"{prefix}.{n}" for n in ("scales", "zeros", "g_idx"))}
    certificate = certificate_pb2.Certificate()
    json_format.Parse(report.read_text(), certificate)
    return Run(
        weight=safetensors_file.read(layer.weights_file)[layer.weight],
        calibration=calibration,
        bits=settings.bits,
        symmetric=settings.symmetric,
        group_size=settings.group_size,
        quantized=tensors[layer.weight],
        scales=tensors[f"{prefix}.scales"],
        zeros=tensors.get(f"{prefix}.zeros"),
        g_idx=tensors.get(f"{prefix}.g_idx"),
        certificate=certificate,
    )


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
def make_layer(tmp_path: Path) -> Callable[[Tensor, Tensor], Layer]:
    """Writes a layer of the test's own into one file."""

    def make(weight: Tensor, x: Tensor) -> Layer:
        path = tmp_path / "layer.safetensors"
        safetensors_file.write(path, {"w.weight": weight, "x": x})
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
