"""Peers' codes on genuine layers, on their own grids: act-order, dynamic groups, Qronos.

Explicit grids have no flag, so these calls are made frame by frame. Without the stored
references these tests skip.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import raw
import safetensors_file
from programs import Server
from stubs import service_pb2, spec_pb2

LAYERS = ("smollm2_l15_q_proj", "minilm_l03_intermediate", "smollm2_l15_down_proj")
IST_RUNS = [
    (layer, f"{bits}bit_{grid}")
    for layer in LAYERS
    for bits in (4, 3, 2)
    for grid in ("sym_channel_actorder", "asym_g64_static_actorder", "asym_g64_dynamic_block64")
    # The largest layer has no run without the peer's lag.
    if not (layer.endswith("down_proj") and grid.endswith("block64"))
    and not (layer.startswith("minilm") and grid.endswith("block64"))
]
QRONOS_RUNS = [(layer, bits) for layer in ("q_proj", "o_proj", "down_proj") for bits in (4, 3)]
# One value at a tie that is rounded the other way takes the rest of its row along.
LEAST_AGREEMENT = 0.998
SAME_ERROR = 1e-3


def entry_of(folder: Path, manifest: str, file: str, run: str) -> dict:
    entries = json.loads((folder / "references" / manifest).read_text())
    (entry,) = (e for e in entries if e["id"] == run and e["file"] == file)
    return entry


def unpack(packed: np.ndarray) -> np.ndarray:
    """Two codes a byte, the even feature in the low nibble."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


class Problem:
    """The tensors of a manifest's entry."""

    def __init__(self, folder: Path, entry: dict) -> None:
        self.references = safetensors_file.read(folder / "references" / entry["file"])
        self.W = safetensors_file.read(folder / entry["weights"])[entry["weight"]].array
        activations = safetensors_file.read(folder / entry["activations"])
        self.X = activations[entry["x"]].array.astype("<f4")
        name = entry.get("x_quantized")
        self.X_quantized = activations[name].array.astype("<f4") if name else None

    def frames(
        self, spec: spec_pb2.QuantizationSpec, rows: int = 512
    ) -> Iterator[service_pb2.QuantizeRequest]:
        layer = raw.Layer(self.W, self.X)
        layer.header.spec.CopyFrom(spec)
        if self.X_quantized is not None:
            layer.header.x_quantized.CopyFrom(raw.announce("x_quantized", self.X_quantized.shape))
        yield layer.header_frame()
        yield from layer.weight_frames()
        for row in range(0, len(layer.X), rows):
            other = (
                b"" if self.X_quantized is None else self.X_quantized[row : row + rows].tobytes()
            )
            yield raw.activation_frame(row, layer.X[row : row + rows].tobytes(), other)

    def quantize(self, server: Server, spec: spec_pb2.QuantizationSpec) -> raw.Result:
        with raw.connect(server) as channel:
            return raw.collect(raw.quantize(channel, self.frames(spec)))


def codes_of(result: raw.Result, bits: int) -> np.ndarray:
    groups = result.tensors.get("g_idx")
    weight = result.tensors["weight"].astype(np.float64)
    index = np.zeros(weight.shape[1], int) if groups is None else groups
    scales = result.tensors["scales"].astype(np.float64)[:, index]
    if "zeros" in result.tensors:
        zero = result.tensors["zeros"].astype(np.int64)[:, index]
    else:
        zero = np.full(weight.shape, 2 ** (bits - 1))
    return np.rint(weight / scales).astype(np.int64) + zero


@pytest.mark.parametrize(("layer", "run"), IST_RUNS, ids=lambda value: str(value))
def test_ist_gptq(shared_data: Path, server: Server, layer: str, run: str) -> None:
    entry = entry_of(shared_data, "manifest_ist.json", f"ist_gptq_{layer}.safetensors", run)
    problem = Problem(shared_data, entry)
    spec = spec_pb2.QuantizationSpec(
        bits=entry["bits"], symmetric=entry["symmetric"], group_size=max(0, entry["group_size"])
    )
    if "actorder" in run:
        spec.order = spec_pb2.ORDER_DECREASING_NORM
    if "dynamic" in run:
        spec.group_scales = spec_pb2.GROUP_SCALES_DYNAMIC
    result = problem.quantize(server, spec)
    codes = unpack(problem.references[f"{run}.codes"].array)
    assert np.mean(codes_of(result, entry["bits"]) == codes) >= LEAST_AGREEMENT
    found = result.certificate.relative_error
    assert found == pytest.approx(entry["relative_error"]["oracle"], rel=SAME_ERROR)
    assert found == pytest.approx(entry["relative_error"]["peer"], rel=SAME_ERROR)


@pytest.fixture(params=QRONOS_RUNS, ids=lambda value: "-".join(map(str, value)))
def brevitas(request: pytest.FixtureRequest, shared_data: Path) -> tuple[Problem, dict]:
    layer, bits = request.param
    entry = entry_of(
        shared_data,
        "manifest_brevitas.json",
        f"brevitas_qronos_smollm2_l15_{layer}.safetensors",
        f"{bits}bit_sym_channel",
    )
    return Problem(shared_data, entry), entry


def narrow(problem: Problem, entry: dict, method: int, damping: float) -> spec_pb2.QuantizationSpec:
    """Brevitas' grid: max|w| / (2^(b-1) - 1), the lowest code unused."""
    scales = problem.references[f"{entry['id']}.scales"].array
    return spec_pb2.QuantizationSpec(
        method=method,
        bits=entry["bits"],
        grid=spec_pb2.ExplicitGrid(scales=scales.ravel().tolist(), lowest_code=1),
        damping=spec_pb2.Damping(absolute=damping),
    )


def test_brevitas_qronos(server: Server, brevitas: tuple[Problem, dict]) -> None:
    problem, entry = brevitas
    spec = narrow(problem, entry, spec_pb2.METHOD_QRONOS, entry["lambda"])
    result = problem.quantize(server, spec)
    errors = entry["relative_error"]
    found = result.certificate
    codes = codes_of(result, entry["bits"])
    for other in ("oracle_qronos", "qronos_float64"):
        reference = unpack(problem.references[f"{entry['id']}.{other}.codes"].array)
        assert np.mean(codes == reference) >= 0.99, other
        assert found.relative_error == pytest.approx(errors[other], rel=SAME_ERROR)
    # (M8): our floor is damped, theirs is not.
    undamped = errors["least_squares_floor"] * np.sqrt(found.reference_energy)
    assert undamped * (1 - 1e-4) <= found.floor <= np.sqrt(found.damped_squared_error)
    without = errors["float_weights_on_x_quantized"] * np.sqrt(found.reference_energy)
    assert found.optq_initial == pytest.approx(without, rel=1e-4)


def test_brevitas_gptq_on_quantized_inputs(server: Server, brevitas: tuple[Problem, dict]) -> None:
    problem, entry = brevitas
    spec = narrow(problem, entry, spec_pb2.METHOD_OPTQ, entry["gptq_lambda"])
    result = problem.quantize(server, spec)
    reference = unpack(problem.references[f"{entry['id']}.gptq.codes"].array)
    assert np.mean(codes_of(result, entry["bits"]) == reference) >= LEAST_AGREEMENT
    expected = entry["relative_error"]["oracle_optq_on_x_quantized"]
    assert result.certificate.relative_error == pytest.approx(expected, rel=SAME_ERROR)
