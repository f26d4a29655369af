"""The arithmetic of compare.py, scaling.py and models.py, on times made up here."""

import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import beacon
import models
import numpy as np
import pytest
import scaling
from compare import Ratio, Samples, against_itself, table
from measure import Engine, MeasurementError, Run, Shape

SHAPE = Shape(64, 32)
SIZES = [512, 1024, 2048, 4096, 8192]


def samples_of(**ms: Sequence[float]) -> Samples:
    """Two workers; "quantize" says that its factor took 3 ms and its rounding 2 ms."""
    samples = Samples()
    counters = {"factor_ms": 3.0, "round_ms": 2.0}
    for kind, times in ms.items():
        samples.add(SHAPE, [Run(kind, 2, time, counters) for time in times])
    return samples


# compare.py


@pytest.mark.parametrize(
    ("above", "at_least", "verdict"),
    [
        (40.0, True, "met"),
        (39.0, True, "not met"),
        (40.0, False, "met"),
        (41.0, False, "not met"),
    ],
)
def test_a_goal_is_met_up_to_the_bound(above: float, at_least: bool, verdict: str) -> None:
    ratio = Ratio("factor", SHAPE, "peer", above, "certiq", 10.0, 4, at_least)
    assert ratio.value == above / 10
    assert ratio.verdict == verdict


def test_a_ratio_without_goal_has_its_note() -> None:
    ratio = Ratio("quantize", SHAPE, "1 worker", 30.0, "2 workers", 20.0, note="peak_f32 1.90")
    assert ratio.cells() == (
        "quantize 64x32",
        "1 worker 30.0 ms",
        "2 workers 20.0 ms",
        "1.50",
        "",
        "peak_f32 1.90",
    )


def test_medians_are_of_all_rounds_and_counters_are_added_first() -> None:
    samples = samples_of(quantize=[9.0, 1.0, 5.0])
    assert samples.ms("quantize", SHAPE, 2) == 5
    assert samples.counter("quantize", SHAPE, 2, "factor_ms", "round_ms") == 5


def test_three_layers_are_set_against_one_factor_and_their_rounding() -> None:
    (ratio,) = against_itself(samples_of(shared=[6.0], quantize=[4.0]), SHAPE, 2)
    assert (ratio.above_ms, ratio.below_ms) == (3 + 2, 3 + 3 * 2)
    assert ratio.verdict == "met"


def test_a_ladder_is_set_against_one_damping() -> None:
    made = samples_of(ladder=[5.0], quantize_held_out=[2.0], quantize=[1.0])
    unseen, plain = against_itself(made, SHAPE, 2)
    assert (unseen.value, unseen.verdict) == (2.5, "met")
    assert (plain.value, plain.verdict) == (5, "not met")


def test_table_aligns_its_first_column_to_the_left() -> None:
    assert table([["", "ms"], ["factor", "1.5"]]) == "         ms\nfactor  1.5"


# measure.py


def test_a_benchmark_is_its_name_and_its_counters() -> None:
    run = Run.parse(
        {
            "name": "factor/features:8/workers:2/process_time/real_time",
            "time_unit": "ms",
            "real_time": 1.25,
            "iterations": 7,
            "gflops": 3.5,
        }
    )
    assert (run.kind, run.workers, run.ms) == ("factor", 2, 1.25)
    assert run.counters["gflops"] == 3.5


def test_a_benchmark_that_failed_is_no_run() -> None:
    with pytest.raises(MeasurementError, match="no memory"):
        Run.parse(
            {"name": "factor/workers:2", "error_occurred": True, "error_message": "no memory"}
        )


# scaling.py


@pytest.mark.parametrize("power", [0.5, 1, 2, 3])
def test_exponent_of_a_power_law_is_its_power(power: float) -> None:
    assert scaling.exponent(SIZES, [7e-6 * n**power for n in SIZES]) == pytest.approx(power)


def test_exponent_is_the_least_squares_fit() -> None:
    # Logarithms to base 2: sizes 0 1 2, times 0 3 3; the slope is (3 - 0) / 2.
    assert scaling.exponent([1, 2, 4], [1, 8, 8]) == pytest.approx(1.5)


def test_one_size_has_no_exponent() -> None:
    assert scaling.exponent([512], [1.0]) is None
    assert scaling.exponent([], []) is None


def test_upper_half_holds_the_middle_and_goes_by_size() -> None:
    assert scaling.upper_half([4, 1, 3, 5, 2], [40, 10, 30, 50, 20]) == ([3, 4, 5], [30, 40, 50])
    assert scaling.upper_half([1, 2, 3, 4], [10, 20, 30, 40]) == ([3, 4], [30, 40])


def test_a_constant_cost_weighs_less_on_the_upper_half() -> None:
    sizes, times = SIZES, [1e6 + n**2 for n in SIZES]
    whole = scaling.exponent(sizes, times)
    upper = scaling.exponent(*scaling.upper_half(sizes, times))
    assert whole is not None
    assert upper is not None
    assert whole < upper < 2


def test_what_two_series_share_is_measured_once() -> None:
    series = scaling.all_series(scaling.parse([]))
    turns = scaling.turns(series)
    asked = [(phase, case) for case, phases in turns.items() for phase in phases]
    assert len(asked) == len(set(asked))
    # Three series in N of five sizes; in R and in m four more each.
    assert len(asked) == 3 * 5 + 4 + 4
    assert turns[scaling.Case(1024, 2048, 4096)] == ["factor", "rounding", "statistics"]


def made_up(
    engine: Engine, kinds: Collection[str], shape: Shape, workers: Sequence[int]
) -> tuple[list[Run], dict]:
    """Engine.run of a machine that follows the theory."""
    n, tokens = float(shape.features), float(engine.tokens)
    flops = {"statistics": n**2 * tokens, "factor": n**3, "rounding": n**2 * shape.rows}
    counters = {"gflops": 50.0, "peak_percent": 25.0}
    runs = [
        Run(kind, count, 1e-6 * flops.get(kind, 1.0), counters)
        for kind in ("peak_f32", "peak_f64", *kinds)
        for count in workers
    ]
    return runs, {"cpu": "made up", "isa": "x86-64-v3"}


def test_scaling_reports_the_theory_of_a_machine_that_follows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Engine, "run", made_up)
    file = tmp_path / "scaling.json"
    assert scaling.main(["--features=8,16,32", "--repeat=2", f"--json={file}"]) == 0
    series = json.loads(file.read_text())["series"]
    assert [(one["phase"], one["varied"], one["theory"]) for one in series] == [
        ("statistics", "features", 2),
        ("factor", "features", 3),
        ("rounding", "features", 2),
        ("rounding", "rows", 1),
        ("statistics", "tokens", 1),
    ]
    for one in series:
        assert one["exponent"] == pytest.approx(one["theory"])
        assert one["upper_exponent"] == pytest.approx(one["theory"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["factor", "in", "N", "3.00", "3.00", "3"] in lines
    assert ["32", "0.03", "50.0", "25", "%"] in lines


def test_scaling_fails_where_nothing_could_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scaling.main([f"--engine-bench={tmp_path / 'none'}"]) == 1
    assert "scaling: " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["--features=0", "--rows=8,x", "--tokens=", "--repeat=0"])
def test_scaling_refuses_sizes_that_are_none(text: str) -> None:
    with pytest.raises(SystemExit) as refused:
        scaling.parse([text])
    assert refused.value.code == 2


# models.py


def results_of(**runs: Sequence[tuple[float, float]]) -> models.Results:
    """CPU seconds of each round, and the server's; "certiq_16" is a program and its sequences."""
    results = models.Results()
    for name, rounds in runs.items():
        program, sequences = name.split("_")
        case = models.Case(program, "float32", int(sequences))
        results.runs[case] = [models.Use(cpu, 2 * cpu, 1 << 20, server) for cpu, server in rounds]
    return results


def test_client_and_server_are_of_the_round_that_took_least_together() -> None:
    results = results_of(certiq_16=[(10.0, 9.0), (12.0, 5.0), (9.0, 9.0)])
    (case,) = results.runs
    least = results.least(case)
    assert (least.cpu, least.server_cpu, least.whole_cpu) == (12, 5, 17)
    # No other round's seconds on the wall were fewer.
    assert least.wall == 18


def test_certiq_is_set_against_the_peer_that_took_least_for_as_many_tokens() -> None:
    results = results_of(
        certiq_16=[(30.0, 10.0)],
        llmcompressor_16=[(120.0, 0.0), (100.0, 0.0)],
        gptqmodel_16=[(110.0, 0.0)],
        gptqmodel_128=[(1.0, 0.0)],
    )
    (ratio,) = models.ratios(results)
    assert ratio.what == "llmcompressor float32 / certiq float32, 8192 tokens"
    assert (ratio.above, ratio.below, ratio.value) == (100, 40, 2.5)
    assert ratio.met


@pytest.mark.parametrize(("seconds", "met"), [(80.0, True), (81.0, False)])
def test_the_client_alone_grows_with_its_tokens(seconds: float, met: bool) -> None:
    results = results_of(certiq_16=[(10.0, 1.0)], certiq_128=[(seconds, 1000.0)])
    (ratio,) = models.ratios(results)
    assert ratio.what == "client float32, 65536 / 8192 tokens"
    assert ratio.value == seconds / 10
    assert ratio.met == met


def test_growth_may_be_as_that_of_the_tokens() -> None:
    (ratio,) = models.ratios(results_of(certiq_16=[(10.0, 1.0)], certiq_32=[(20.0, 1.0)]))
    assert (ratio.goal, ratio.met) == (2, True)


def test_seconds_of_a_program_are_those_of_its_children_too(tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}], check=True)"
    use = models.run_measured([sys.executable, "-c", start], tmp_path / "log", {}, "a parent")
    assert use.cpu >= 0.5
    assert use.wall > 0


def test_a_program_that_fails_is_no_run(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no memory')"]
    with pytest.raises(MeasurementError, match="a program ended with 1:\nno memory"):
        models.run_measured(command, tmp_path / "log", {}, "a program")


def test_a_case_that_failed_is_reported_without_seconds() -> None:
    results = results_of(certiq_16=[(30.0, 10.0)])
    failed = models.Case("gptqmodel", "float32", 16)
    results.failures[failed] = "it ended"
    options = models.parse(["--programs=certiq,gptqmodel", "--sequences=16", "--repeat=1"])
    found = models.as_json(results, options)["cases"]
    assert [(one["program"], len(one["runs"]), one["failure"]) for one in found] == [
        ("certiq", 1, None),
        ("gptqmodel", 0, "it ended"),
    ]


@pytest.mark.parametrize(
    "text", ["--sequences=0", "--sequences=8,x", "--programs=none", "--dtypes=int8", "--repeat=0"]
)
def test_models_refuses_what_it_cannot_measure(text: str) -> None:
    with pytest.raises(SystemExit) as refused:
        models.parse([text])
    assert refused.value.code == 2


# beacon.py


def cosines(gram: np.ndarray, weight: np.ndarray, quantized: np.ndarray) -> np.ndarray:
    inner = np.einsum("ij,ij->i", weight @ gram, quantized)
    return inner / np.sqrt(np.einsum("ij,ij->i", quantized @ gram, quantized))


@pytest.mark.parametrize("bits", [2, 3])
def test_beacon_ends_where_no_code_and_no_scale_can_be_bettered(bits: int) -> None:
    random = np.random.default_rng(bits)
    x = random.standard_normal((40, 12))
    weight = random.standard_normal((6, 12))
    gram = x.T @ x
    quantized = beacon.quantize(gram, weight, bits, sweeps=50)
    levels = beacon.alphabet(bits)
    # With so many codes some is 1/2.
    codes = quantized / (2 * np.abs(quantized).min(axis=1, keepdims=True))
    np.testing.assert_allclose(codes, np.rint(codes - 0.5) + 0.5, atol=1e-9)
    found = cosines(gram, weight, quantized)
    for j in range(12):
        for level in levels:
            other = codes.copy()
            other[:, j] = level
            assert (cosines(gram, weight, other) <= found * (1 + 1e-12)).all()
    for factor in (0.999, 1.001):
        error = np.linalg.norm(x @ (weight - quantized).T, axis=0)
        assert (error <= np.linalg.norm(x @ (weight - factor * quantized).T, axis=0)).all()


def test_beacon_finds_weights_that_are_on_a_grid() -> None:
    random = np.random.default_rng(3)
    x = random.standard_normal((60, 8))
    weight = 0.37 * random.choice(beacon.alphabet(2), (5, 8))
    quantized = beacon.quantize(x.T @ x, weight, 2, sweeps=20)
    np.testing.assert_allclose(quantized, weight, rtol=1e-9)
