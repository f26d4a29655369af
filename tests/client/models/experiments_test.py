"""python -m certiq.experiments: a report with its pictures, numbers that agree with the claims."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from programs import Server

NAMES = ("order", "rounding", "damping", "sensitivity", "statistics", "monte_carlo")


@pytest.fixture(scope="module")
def output(server: Server, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiments")
    command = [sys.executable, "-m", "certiq.experiments", "--server", server.address]
    command += ["--data", str(shared_data), "--output", str(folder), "--rows", "24"]
    subprocess.run([*command, "--seeds", "24"], check=True, stdin=subprocess.DEVNULL)
    return folder


def rows_of(output: Path, name: str) -> list[dict[str, str]]:
    with (output / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_report_has_a_picture_and_numbers_of_each(output: Path) -> None:
    html, text = (output / "report.html").read_text(), (output / "report.md").read_text()
    for name in NAMES:
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert rows_of(output, name)
        for page in (html, text):
            assert f"{name}.png" in page
            assert f"{name}.csv" in page


def test_norm_order_lowers_the_bound(output: Path) -> None:
    rows = rows_of(output, "order")
    assert len(rows) == 3 * 3 * 2
    for natural, norm in zip(rows[::2], rows[1::2], strict=True):
        assert (natural["order"], norm["order"]) == ("natural", "decreasing_norm")
        assert float(norm["C2"]) < float(natural["C2"])
        for row in (natural, norm):
            assert 0 < float(row["error"]) <= float(row["bound"])


def test_stochastic_rounding_keeps_its_bound(output: Path) -> None:
    for row in rows_of(output, "rounding"):
        assert float(row["largest error"]) <= float(row["bound of the largest"])
    rows = rows_of(output, "monte_carlo")
    assert len(rows) == 24
    assert all(float(row["largest error"]) <= float(row["bound"]) for row in rows)
    # Unbiased: a random walk's mean, with what clips on top.
    assert float(rows[-1]["bias"]) < 2 / 24**0.5


def test_the_singular_layer_has_a_threshold_of_stability(output: Path) -> None:
    """Fewer tokens than features: only damping makes its sums factorable."""
    rows = [row for row in rows_of(output, "damping") if row["layer"].startswith("down_proj")]
    assert 0 < float(rows[0]["stable from"]) < 1e-5
    assert float(rows[-1]["unseen error"]) < float(rows[0]["unseen error"])


def test_coarser_statistics_are_further_off(output: Path) -> None:
    rows = rows_of(output, "statistics")
    for layer in {row["layer"] for row in rows}:
        off = {row["type"]: float(row["sums off by"]) for row in rows if row["layer"] == layer}
        # The activations of the data are stored in FP16.
        assert off["FP32"] == off["FP16"] == 0
        assert 0 < off["BF16"] < off["INT8"] < 0.1
