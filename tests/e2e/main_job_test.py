"""The main job: a genuine layer through the command line, verified and recomputed."""

import json
from pathlib import Path

import pytest
from conftest import Quantizer, Settings
from google.protobuf.descriptor import FieldDescriptor
from programs import Server, certiq
from stubs import certificate_pb2
from verification import Layer, Run, check_codes, check_errors, check_grid, check_report, verify

# 100 does not divide 384 features.
SETTINGS = [
    Settings(bits, symmetric, group_size)
    for bits in range(2, 9)
    for symmetric in (True, False)
    for group_size in (0, 64, 100)
]


@pytest.fixture(scope="module", params=SETTINGS, ids=str)
def run(
    request: pytest.FixtureRequest, server: Server, quantizer: Quantizer, carried_layer: Layer
) -> Run:
    return quantizer.run(server, carried_layer, request.param)


def test_the_certificate_holds(run: Run) -> None:
    check_report(run)
    verify(run)


def test_weights_lie_on_the_grid(run: Run) -> None:
    check_grid(run)


def test_the_textbook_finds_the_same(run: Run) -> None:
    check_codes(run)
    check_errors(run)


def test_it_beats_plain_rounding(run: Run) -> None:
    assert run.certificate.relative_error < run.certificate.nearest_relative_error


def test_default_damping_is_a_hundredth_of_the_mean_diagonal(run: Run) -> None:
    gram = run.problem.gram
    expected = 0.01 * gram.trace() / len(gram)
    assert run.certificate.lambda_requested == pytest.approx(expected, rel=1e-6)
    assert run.certificate.lambda_used == run.certificate.lambda_requested


@pytest.mark.parametrize(
    ("flag", "expected"),
    [("absolute:5", 5.0), ("relative_trace:0.1", None)],
)
def test_damping_is_what_was_asked_for(
    server: Server, quantizer: Quantizer, carried_layer: Layer, flag: str, expected: float | None
) -> None:
    run = quantizer.run(server, carried_layer, Settings(3, more=("--damping", flag)))
    if expected is None:
        gram = run.problem.gram
        expected = 0.1 * gram.trace() / len(gram)
    assert run.certificate.lambda_used == pytest.approx(expected, rel=1e-6)
    verify(run)
    check_errors(run)


def test_rows_are_left_out_on_request(
    server: Server, quantizer: Quantizer, carried_layer: Layer
) -> None:
    settings = Settings(more=("--per_row=false", "--compare_nearest=false"))
    run = quantizer.run(server, carried_layer, settings)
    verify(run)
    certificate = run.certificate
    assert not certificate.row_error
    assert not certificate.row_bound
    assert not certificate.HasField("nearest_relative_error")
    assert 0 < certificate.squared_error <= certificate.l2_bound**2


def test_report_is_protobuf_json_with_every_field(
    server: Server, quantizer: Quantizer, carried_layer: Layer
) -> None:
    found = json.loads(quantizer.run(server, carried_layer, Settings()).report.read_text())
    fields = certificate_pb2.Certificate.DESCRIPTOR.fields
    always = {field.name for field in fields if field.is_repeated or not field.has_presence}
    assert always <= set(found) <= {field.name for field in fields}
    assert set(found["phase_seconds"]) == {
        field.name for field in certificate_pb2.PhaseSeconds.DESCRIPTOR.fields
    }
    for field in fields:
        if field.name in found and not field.is_repeated:
            value = found[field.name]
            if field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64):
                assert isinstance(value, str), field.name
                int(value)
            elif field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
                assert isinstance(value, (int, float)), field.name
    assert found["method"] == "METHOD_OPTQ"
    assert found["outcome"] == "OUTCOME_QUANTIZED"
    assert found["dead_features"] == "0"
    assert found["damping_attempts"][0]["cause"] == "STABILITY_CAUSE_NONE"


def test_summary_is_for_people_and_progress_for_stderr(
    server: Server, carried_layer: Layer, tmp_path: Path
) -> None:
    done = certiq(
        *("quantize", "--server", server.address),
        *carried_layer.flags(),
        *("--bits", "3", "--output", str(tmp_path / "q"), "--report", str(tmp_path / "r")),
    )
    assert done.returncode == 0
    report = json.loads((tmp_path / "r").read_text())
    assert carried_layer.weight in done.stdout
    assert "3" in done.stdout
    for word in ("bits", "error", "bound", "lambda", "plain rounding"):
        assert word in done.stdout.lower().replace("λ", "lambda"), word
    assert f"{report['relative_error']:.3g}"[:4] in done.stdout
    # Not a terminal: lines, without control characters.
    assert done.stderr
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr


def test_files_appear_whole_and_alone(server: Server, carried_layer: Layer, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    done = certiq(
        *("quantize", "--server", server.address),
        *carried_layer.flags(),
        *("--output", str(folder / "q.safetensors"), "--report", str(folder / "r.json")),
    )
    assert done.returncode == 0
    assert sorted(path.name for path in folder.iterdir()) == ["q.safetensors", "r.json"]
