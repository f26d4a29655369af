"""Made-up layers: every type on the wire, odd sizes, and calibrations that are hard to factor."""

from collections.abc import Callable

import numpy as np
import pytest
from conftest import Layer, Quantizer, Settings
from grid_oracle import check_everything
from oracle import (
    NOISE,
    check_bounds,
    check_damping,
    check_errors,
    check_identity,
)
from programs import Server, certiq
from safetensors_file import Tensor, tensor
from stubs import certificate_pb2

MakeLayer = Callable[[Tensor, Tensor], Layer]
FLOATING = ("F64", "F32", "F16", "BF16")


@pytest.mark.parametrize("dtype", FLOATING)
def test_weights_of_every_floating_dtype(
    server: Server,
    quantizer: Quantizer,
    make_layer: MakeLayer,
    random: np.random.Generator,
    dtype: str,
) -> None:
    weight = tensor(random.standard_normal((24, 40)), dtype)
    layer = make_layer(weight, tensor(random.standard_normal((160, 40)), "F32"))
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
    weight = tensor(random.standard_normal((24, 40)), "F32")
    check_everything(quantizer.run(server, make_layer(weight, tensor(x, dtype)), Settings(4)))


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
    weight = tensor(random.standard_normal((rows, features)), "F32")
    x = tensor(random.standard_normal((tokens, features)), "F32")
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
    weight = tensor(random.standard_normal((24, 80)), "F32")
    x = tensor(random.standard_normal((300, 80)), "F32")
    check_everything(quantizer.run(server, make_layer(weight, x), settings))


def test_dead_features_become_zero_and_are_counted(
    server: Server, quantizer: Quantizer, make_layer: MakeLayer, random: np.random.Generator
) -> None:
    x = random.standard_normal((200, 48))
    x[:, [0, 7, 47]] = 0
    weight = random.standard_normal((20, 48))
    # What a dead feature weighs takes no part in a scale.
    weight[:, 7] = 1000
    layer = make_layer(tensor(weight, "F32"), tensor(x, "F32"))
    run = quantizer.run(server, layer, Settings(4, True, 16))
    assert run.certificate.dead_features == 3
    assert (run.quantized.array[:, [0, 7, 47]] == 0).all()
    check_errors(run)
    check_bounds(run)


def test_zero_weights_lose_nothing(
    server: Server, quantizer: Quantizer, make_layer: MakeLayer, random: np.random.Generator
) -> None:
    weight = random.standard_normal((8, 32))
    weight[2] = 0
    weight[:, :16] = 0
    layer = make_layer(tensor(weight, "F32"), tensor(random.standard_normal((99, 32)), "F32"))
    run = quantizer.run(server, layer, Settings(4, False, 16))
    assert (run.quantized.array[2] == 0).all()
    assert run.certificate.row_error[2] == 0
    assert (run.scales.array[:, 0] == 1).all()


@pytest.fixture
def singular(make_layer: MakeLayer, random: np.random.Generator) -> Layer:
    """Fewer tokens than features: H needs damping."""
    return make_layer(
        tensor(random.standard_normal((16, 64)), "F32"),
        tensor(random.standard_normal((20, 64)), "F32"),
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
    check_identity(run)
    check_damping(run)
    # The oracle's own factor has no digits to spare here: bounds against the truth only.
    assert (run.row_error <= np.asarray(found.row_bound)).all()
    assert np.linalg.norm(run.row_error) <= found.l2_bound
    energy = float(np.sum((run.calibration.X @ run.W.T) ** 2))
    relative = np.sqrt(float(np.sum(run.row_error**2)) / energy)
    assert found.relative_error == pytest.approx(relative, rel=1e-4, abs=NOISE)


def test_no_damping_is_allowed_where_none_is_needed(
    server: Server, quantizer: Quantizer, make_layer: MakeLayer, random: np.random.Generator
) -> None:
    layer = make_layer(
        tensor(random.standard_normal((16, 64)), "F32"),
        tensor(random.standard_normal((400, 64)), "F32"),
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
    done = certiq(
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
    layer = make_layer(tensor(random.standard_normal((32, 96)), "F32"), tensor(x, "F32"))
    run = quantizer.run(server, layer, Settings(4, more=("--damping", "relative_trace:1e-6")))
    check_identity(run)
    check_damping(run)
    check_errors(run)
    check_bounds(run)
