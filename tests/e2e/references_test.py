"""Independent quantizers on genuine layers: IST-DASLab GPTQ and a float64 textbook OPTQ.

Their results are data, see README.md there; without the data these tests skip.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Quantizer, Settings
from programs import ROOT, Server
from safetensors.numpy import load_file
from verification import LEAST_AGREEMENT, SAME_ERROR, Layer, Run, check_errors, verify

LAYERS = ("smollm2_l15_q_proj", "minilm_l03_intermediate", "smollm2_l15_down_proj")
# The runs whose order and scales this server offers.
RUNS = [
    (layer, f"{bits}bit_{grid}")
    for layer in LAYERS
    for bits in (4, 3, 2)
    for grid in ("sym_channel", "asym_g64_static")
]
WORSE_AT_MOST = 5e-3


class Reference:
    """One run of the manifest."""

    def __init__(self, folder: Path, layer: str, run: str) -> None:
        manifest = json.loads((folder / "references" / "manifest_ist.json").read_text())
        self.name = run
        (self.entry,) = (
            entry
            for entry in manifest
            if entry["id"] == run and entry["file"] == f"ist_gptq_{layer}.safetensors"
        )
        self.tensors = load_file(folder / "references" / self.entry["file"])
        self.layer = Layer(
            folder / self.entry["weights"],
            self.entry["weight"],
            folder / self.entry["activations"],
            self.entry["x"],
        )
        self.settings = Settings(
            self.entry["bits"], self.entry["symmetric"], max(0, self.entry["group_size"])
        )

    @property
    def codes(self) -> np.ndarray:
        """Two a byte, the even feature in the low nibble."""
        packed = self.tensors[f"{self.name}.codes"]
        return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def pair(
    request: pytest.FixtureRequest, shared_data: Path, server: Server, quantizer: Quantizer
) -> tuple[Run, Reference]:
    reference = Reference(shared_data, *request.param)
    return quantizer.run(server, reference.layer, reference.settings), reference


def test_lambda_is_theirs(pair: tuple[Run, Reference]) -> None:
    run, reference = pair
    assert run.certificate.lambda_used == pytest.approx(reference.entry["lambda"], rel=1e-6)


def test_codes_agree_except_at_ties(pair: tuple[Run, Reference]) -> None:
    run, reference = pair
    assert np.mean(run.codes == reference.codes) >= LEAST_AGREEMENT


def test_error_is_theirs(pair: tuple[Run, Reference]) -> None:
    run, reference = pair
    expected = reference.entry["relative_error"]
    found = run.certificate.relative_error
    assert found == pytest.approx(expected["oracle"], rel=SAME_ERROR)
    assert found == pytest.approx(expected["peer"], rel=SAME_ERROR)
    assert found <= expected["peer"] * (1 + WORSE_AT_MOST)
    # Plain rounding meets ties in every row, at its largest weight (S1).
    nearest = run.certificate.nearest_relative_error
    assert nearest == pytest.approx(expected["rtn"], rel=WORSE_AT_MOST)


def test_certificate_is_true(pair: tuple[Run, Reference]) -> None:
    run, _ = pair
    verify(run)
    check_errors(run)


def test_carried_layer_is_cut_from_the_shared_data(shared_data: Path, tmp_path: Path) -> None:
    folder = ROOT / "tests" / "data"
    subprocess.run(
        [sys.executable, str(folder / "make_layer.py"), str(shared_data), str(tmp_path)], check=True
    )
    for name in ("weights.safetensors", "activations.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
