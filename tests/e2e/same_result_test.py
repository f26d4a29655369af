"""A job and a Quantize call of the same layer end with the same weights."""

import certiq
import numpy as np
import pytest
from conftest import StartServer
from raw import timeless
from sums import Source
from work import calibrated, client_of

RELATIVE = 1e-6
SPECS = {
    "4 bits": certiq.Spec(bits=4),
    "3 bits, groups, zeros": certiq.Spec(bits=3, symmetric=False, group_size=32),
    "by norm": certiq.Spec(bits=4, order="decreasing_norm"),
    "nearest": certiq.Spec(bits=4, method="nearest"),
    "stochastic": certiq.Spec(bits=4, rounding="stochastic", seed=7),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("durable", [False, True], ids=["memory", "disk"])
def test_jobs_and_calls_agree(
    start_server: StartServer,
    tmp_path_factory: pytest.TempPathFactory,
    random: np.random.Generator,
    spec: certiq.Spec,
    durable: bool,
) -> None:
    data = str(tmp_path_factory.mktemp("data")) if durable else ""
    client = client_of(start_server("--workers", "2", "--data_dir", data))
    W = random.standard_normal((72, 96), dtype="<f4")
    X = random.standard_normal((400, 96), dtype="<f4")
    calibration = calibrated(client, Source("rank-0", X, None, 100))
    stored = client.submit(W, calibration=calibration, spec=spec).result()
    called = client.quantize(W, spec=spec, calibration=calibration)
    assert set(called.tensors) == set(stored.tensors)
    for role, tensor in called.tensors.items():
        assert tensor.tobytes() == stored.tensors[role].tobytes(), role
    assert timeless(called.certificate) == timeless(stored.certificate)
    agree(client.quantize(W, X, spec), called)


def agree(direct: certiq.Layer, called: certiq.Layer) -> None:
    """The sums differ by the order of their additions, which may turn a rounding over."""
    assert set(direct.tensors) == set(called.tensors)
    first, second = direct.certificate, called.certificate
    assert first.relative_error == pytest.approx(second.relative_error, rel=1e-3)
    assert first.lambda_used == pytest.approx(second.lambda_used, rel=RELATIVE)
    assert first.reference_energy == pytest.approx(second.reference_energy, rel=RELATIVE)
    assert (first.x_sha256 == "", second.x_sha256 == "") == (False, True)
    differ = direct.tensors["weight"] != called.tensors["weight"]
    assert np.mean(differ) < 1e-3
