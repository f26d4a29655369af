"""Peers' codes on genuine layers, on their own grids: act-order, dynamic groups, Qronos.

Without the stored references these tests skip.
"""

import json
from pathlib import Path

import certiq
import numpy as np
import pytest
from programs import Server
from safetensors.numpy import load_file
from textbook import Grid
from verification import LEAST_AGREEMENT, SAME_ERROR
from work import client_of

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
        self.references = load_file(folder / "references" / entry["file"])
        self.W = load_file(folder / entry["weights"])[entry["weight"]].astype("<f4")
        activations = load_file(folder / entry["activations"])
        self.X = activations[entry["x"]].astype("<f4")
        name = entry.get("x_quantized")
        self.X_quantized = activations[name].astype("<f4") if name else None

    def quantize(self, server: Server, spec: certiq.Spec) -> certiq.Layer:
        client = client_of(server)
        return client.quantize(self.W, self.X, spec, activations_quantized=self.X_quantized)


def codes_of(layer: certiq.Layer) -> np.ndarray:
    return Grid.of(layer.tensors, layer.certificate.bits).codes(layer.tensors["weight"])


@pytest.mark.parametrize(("layer", "run"), IST_RUNS, ids=lambda value: str(value))
def test_ist_gptq(shared_data: Path, server: Server, layer: str, run: str) -> None:
    entry = entry_of(shared_data, "manifest_ist.json", f"ist_gptq_{layer}.safetensors", run)
    problem = Problem(shared_data, entry)
    spec = certiq.Spec(
        bits=entry["bits"],
        symmetric=entry["symmetric"],
        group_size=max(0, entry["group_size"]),
        order="decreasing_norm" if "actorder" in run else None,
        group_scales="dynamic" if "dynamic" in run else None,
    )
    result = problem.quantize(server, spec)
    codes = unpack(problem.references[f"{run}.codes"])
    assert np.mean(codes_of(result) == codes) >= LEAST_AGREEMENT
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


def narrow(problem: Problem, entry: dict, method: str, damping: float) -> certiq.Spec:
    """Brevitas' grid: max|w| / (2^(b-1) - 1), the lowest code unused."""
    scales = problem.references[f"{entry['id']}.scales"].reshape(len(problem.W), -1)
    return certiq.Spec(
        method=method,
        bits=entry["bits"],
        grid=certiq.Grid(scales, lowest_code=1),
        damping=f"absolute:{damping!r}",
    )


def test_brevitas_qronos(server: Server, brevitas: tuple[Problem, dict]) -> None:
    problem, entry = brevitas
    spec = narrow(problem, entry, "qronos", entry["lambda"])
    result = problem.quantize(server, spec)
    errors = entry["relative_error"]
    found = result.certificate
    codes = codes_of(result)
    for other in ("oracle_qronos", "qronos_float64"):
        reference = unpack(problem.references[f"{entry['id']}.{other}.codes"])
        assert np.mean(codes == reference) >= 0.99, other
        assert found.relative_error == pytest.approx(errors[other], rel=SAME_ERROR)
    # (M8): our floor is damped, theirs is not.
    undamped = errors["least_squares_floor"] * np.sqrt(found.reference_energy)
    assert undamped * (1 - 1e-4) <= found.floor <= np.sqrt(found.damped_squared_error)
    without = errors["float_weights_on_x_quantized"] * np.sqrt(found.reference_energy)
    assert found.optq_initial == pytest.approx(without, rel=1e-4)


def test_brevitas_gptq_on_quantized_inputs(server: Server, brevitas: tuple[Problem, dict]) -> None:
    problem, entry = brevitas
    spec = narrow(problem, entry, "optq", entry["gptq_lambda"])
    result = problem.quantize(server, spec)
    reference = unpack(problem.references[f"{entry['id']}.gptq.codes"])
    assert np.mean(codes_of(result) == reference) >= LEAST_AGREEMENT
    expected = entry["relative_error"]["oracle_optq_on_x_quantized"]
    assert result.certificate.relative_error == pytest.approx(expected, rel=SAME_ERROR)
