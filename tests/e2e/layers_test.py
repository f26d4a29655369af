"""Made-up layers: every type on the wire, odd sizes, and calibrations that are hard to factor."""

import dataclasses
from pathlib import Path

import certiq
import numpy as np
import pytest
from conftest import MakeLayer, Quantizer, Settings
from programs import Server
from programs import certiq as command
from stubs import certificate_pb2
from verification import (
    DTYPES,
    RELATIVE,
    Layer,
    Run,
    check_errors,
    check_everything,
    check_report,
    store,
    verify,
)
from work import client_of

FLOATING = ("F64", "F32", "F16", "BF16")


def normal(random: np.random.Generator, rows: int, features: int) -> np.ndarray:
    return random.standard_normal((rows, features), dtype="<f4")


@pytest.mark.parametrize("dtype", FLOATING)
def test_weights_of_every_floating_dtype(
    server: Server,
    quantizer: Quantizer,
    make_layer: MakeLayer,
    random: np.random.Generator,
    dtype: str,
) -> None:
    weight = random.standard_normal((24, 40)).astype(DTYPES[dtype])
    layer = make_layer(weight, normal(random, 160, 40))
    check_everything(quantizer.run(server, layer, Settings(3, False, 16)))


@pytest.mark.parametrize("dtype", [*FLOATING, "I64", "I32", "U8"])
def test_activations_of_every_dtype(
    server: Server,
    quantizer: Quantizer,
    make_layer: MakeLayer,
    random: np.random.Generator,
    dtype: str,
) -> None:
    x = 3 * random.standard_normal((160, 40))
    if dtype in ("I64", "I32"):
        x = np.rint(10 * x)
    elif dtype == "U8":
        x = np.clip(np.rint(10 * np.abs(x)), 0, 255)
    weight = normal(random, 24, 40)
    check_everything(
        quantizer.run(server, make_layer(weight, x.astype(DTYPES[dtype])), Settings(4))
    )


@pytest.mark.parametrize(
    ("rows", "features", "tokens"),
    [(1, 1, 1), (1, 33, 70), (33, 1, 70), (3, 5, 2), (17, 130, 257), (129, 65, 300), (5, 300, 40)],
)
@pytest.mark.parametrize("settings", [Settings(4), Settings(3, False, 8)], ids=str)
def test_sizes_that_fit_no_block(
    server: Server,
    quantizer: Quantizer,
    make_layer: MakeLayer,
    random: np.random.Generator,
    rows: int,
    features: int,
    tokens: int,
    settings: Settings,
) -> None:
    weight = normal(random, rows, features)
    x = normal(random, tokens, features)
    run = quantizer.run(server, make_layer(weight, x), settings)
    check_everything(run)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(4, True, 0, ("--scale", "mse")),
        Settings(3, False, 16, ("--scale", "mse", "--group_scales", "dynamic")),
        Settings(3, False, 0, ("--scale", "compensated")),
        Settings(3, True, 16, ("--scale", "compensated", "--order", "decreasing_norm")),
        Settings(3, True, 0, ("--scale", "compensated", "--scale_trials", "5")),
        Settings(2, False, 16, ("--scale", "compensated", "--scale_trials", "3", "--polish", "2")),
        Settings(2, True, 16, ("--scale", "compensated", "--group_scales", "dynamic")),
        Settings(3, True, 0, ("--scale", "piso", "--order", "decreasing_norm")),
        Settings(3, False, 16, ("--scale", "piso", "--scale_passes", "2")),
        Settings(2, False, 16, ("--scale", "piso", "--group_scales", "dynamic")),
        Settings(4, True, 0, ("--scale", "piso", "--scale_objective", "data_free")),
        Settings(2, True, 16, ("--scale", "compensated", "--signed_scales", "true")),
        Settings(3, True, 0, ("--scale", "mse", "--signed_scales", "true")),
    ],
    ids=str,
)
def test_scale_rules(
    server: Server,
    quantizer: Quantizer,
    make_layer: MakeLayer,
    random: np.random.Generator,
    settings: Settings,
) -> None:
    layer = make_layer(normal(random, 24, 80), normal(random, 300, 80))
    run = quantizer.run(server, layer, settings)
    check_everything(run)
    assert_asked_for(run, settings.more)
    plain = quantizer.run(server, layer, Settings(settings.bits, settings.symmetric))
    assert not np.isin(run.tensors["scales"], plain.tensors["scales"]).all()


def assert_asked_for(run: Run, flags: tuple[str, ...]) -> None:
    """The spec as decided has these flags; tests/engine has what each rule must find."""
    spec = run.certificate.spec
    for flag, wanted in zip(flags[::2], flags[1::2], strict=True):
        name = flag.removeprefix("--")
        descriptor = spec.DESCRIPTOR.fields_by_name[name]
        found = getattr(spec, name)
        if descriptor.enum_type is not None:
            text = descriptor.enum_type.values_by_number[found].name
            assert text.endswith(f"_{wanted.upper()}"), (flag, text)
        else:
            assert str(found).lower() == wanted, (flag, found)


@pytest.mark.parametrize("mismatched", [False, True], ids=["matched", "mismatched"])
@pytest.mark.parametrize(
    "spec",
    [
        certiq.Spec(bits=3),
        certiq.Spec(bits=4, symmetric=False, group_size=16),
        certiq.Spec(bits=2, order="decreasing_norm"),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["optq", "qronos"])
def test_both_methods_on_both_kinds_of_inputs(
    server: Server,
    random: np.random.Generator,
    tmp_path: Path,
    method: str,
    spec: certiq.Spec,
    mismatched: bool,
) -> None:
    W, X = normal(random, 24, 64), normal(random, 300, 64)
    seen = X + 0.1 * normal(random, 300, 64) if mismatched else None
    spec = dataclasses.replace(spec, method=method)
    layer = client_of(server).quantize(W, X, spec, activations_quantized=seen)
    check_everything(store(tmp_path, W, X, layer, seen))


def test_dead_features_become_zero_and_are_counted(
    server: Server, quantizer: Quantizer, make_layer: MakeLayer, random: np.random.Generator
) -> None:
    x = normal(random, 200, 48)
    x[:, [0, 7, 47]] = 0
    weight = normal(random, 20, 48)
    # What a dead feature weighs takes no part in a scale.
    weight[:, 7] = 1000
    layer = make_layer(weight, x)
    run = quantizer.run(server, layer, Settings(4, True, 16))
    assert run.certificate.dead_features == 3
    assert (run.tensors["weight"][:, [0, 7, 47]] == 0).all()
    check_everything(run)


def test_zero_weights_lose_nothing(
    server: Server, quantizer: Quantizer, make_layer: MakeLayer, random: np.random.Generator
) -> None:
    weight = normal(random, 8, 32)
    weight[2] = 0
    weight[:, :16] = 0
    layer = make_layer(weight, normal(random, 99, 32))
    run = quantizer.run(server, layer, Settings(4, False, 16))
    assert (run.tensors["weight"][2] == 0).all()
    assert run.certificate.row_error[2] == 0
    assert (run.tensors["scales"][:, 0] == 1).all()


@pytest.fixture
def singular(make_layer: MakeLayer, random: np.random.Generator) -> Layer:
    """Fewer tokens than features: H needs damping."""
    return make_layer(
        normal(random, 16, 64),
        normal(random, 20, 64),
    )


def test_damping_is_raised_until_the_factor_stands(
    server: Server, quantizer: Quantizer, singular: Layer
) -> None:
    failures = "certiq_lambda_stability_failures_total"
    before = server.metrics().sum(failures, method="optq")
    run = quantizer.run(server, singular, Settings(4, more=("--damping", "relative_trace:1e-10")))
    found = run.certificate
    lambdas = [getattr(attempt, "lambda") for attempt in found.damping_attempts]
    assert len(lambdas) > 1
    assert lambdas == pytest.approx(
        [10**i * found.lambda_requested for i in range(len(lambdas))], rel=1e-9
    )
    failed = found.damping_attempts[:-1]
    assert all(a.cause != certificate_pb2.STABILITY_CAUSE_NONE and a.detail for a in failed)
    assert server.metrics().sum(failures, method="optq") - before == len(failed)
    # The textbook's factor has no digits to spare here.
    verify(run)
    check_report(run)
    assert found.relative_error == pytest.approx(run.problem.relative_error(run.Q), rel=RELATIVE)


def test_no_damping_is_allowed_where_none_is_needed(
    server: Server, quantizer: Quantizer, make_layer: MakeLayer, random: np.random.Generator
) -> None:
    layer = make_layer(
        normal(random, 16, 64),
        normal(random, 400, 64),
    )
    run = quantizer.run(server, layer, Settings(4, more=("--damping", "absolute:0")))
    assert run.certificate.lambda_used == 0
    assert run.certificate.damped_squared_error == pytest.approx(
        run.certificate.squared_error, rel=1e-5
    )
    check_everything(run)


def test_a_ladder_that_ends_is_told(server: Server, singular: Layer) -> None:
    """Five attempts are not enough: nothing is quantized in silence."""
    before = server.metrics().sum("certiq_lambda_stability_failures_total", method="optq")
    done = command(
        *("quantize", "--server", server.address, *singular.flags()),
        *("--damping", "absolute:1e-30"),
    )
    assert done.returncode == 1
    assert "FAILED_PRECONDITION" in done.stderr
    assert "5 attempts" in done.stderr
    assert "1e-30" in done.stderr
    after = server.metrics().sum("certiq_lambda_stability_failures_total", method="optq")
    assert after - before == 5


def test_an_ill_conditioned_layer_is_certified_all_the_same(
    server: Server, quantizer: Quantizer, make_layer: MakeLayer, random: np.random.Generator
) -> None:
    basis = np.linalg.qr(random.standard_normal((96, 96)))[0]
    x = random.standard_normal((400, 96)) @ (basis * np.logspace(0, -4, 96)) @ basis.T
    layer = make_layer(normal(random, 32, 96), x.astype("<f4"))
    run = quantizer.run(server, layer, Settings(4, more=("--damping", "relative_trace:1e-6")))
    verify(run)
    check_report(run)
    check_errors(run)
