"""A job and a Quantize call of the same layer end with the same weights."""

from collections.abc import Iterator

import numpy as np
import pytest
from cluster import Client, JobRequest
from conftest import StartServer
from raw import Layer, Result, announce, collect, quantize
from stubs import service_pb2, spec_pb2
from sums import Source
from work import SUCCEEDED, calibrated

RELATIVE = 1e-6


def spec(**fields: object) -> spec_pb2.QuantizationSpec:
    return spec_pb2.QuantizationSpec(**fields)


SPECS = {
    "4 bits": spec(bits=4),
    "3 bits, groups, zeros": spec(bits=3, symmetric=False, group_size=32),
    "by norm": spec(bits=4, order=spec_pb2.ORDER_DECREASING_NORM),
    "nearest": spec(bits=4, method=spec_pb2.METHOD_NEAREST),
    "stochastic": spec(bits=4, rounding=spec_pb2.ROUNDING_STOCHASTIC, seed=7),
}


def frames(
    layer: Layer, wanted: spec_pb2.QuantizationSpec, calibration: str
) -> Iterator[service_pb2.QuantizeRequest]:
    """With the calibration in place of activations."""
    header = service_pb2.QuantizeHeader(
        layer_name="layer",
        spec=wanted,
        weight=announce("weight", layer.W.shape),
        calibration_id=calibration,
    )
    yield service_pb2.QuantizeRequest(header=header)
    yield from layer.weight_frames()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("durable", [False, True], ids=["memory", "disk"])
def test_jobs_and_calls_agree(
    start_server: StartServer, tmp_path_factory: pytest.TempPathFactory, name: str, durable: bool
) -> None:
    data = str(tmp_path_factory.mktemp("data")) if durable else ""
    client = Client.of(start_server("--workers", "2", "--data_dir", data))
    layer = Layer.made_up(72, 96, 400)
    calibration = calibrated(client, Source("rank-0", layer.X, None, 100))
    job = client.wait_job(client.create_job(JobRequest(calibration, layer.W, SPECS[name])).id)
    assert job.state == SUCCEEDED, job.error
    stored = client.read(job.id)

    called = collect(quantize(client.channel, frames(layer, SPECS[name], calibration)))
    assert set(called.tensors) == set(stored.tensors)
    for role, tensor in called.tensors.items():
        assert tensor.tobytes() == stored.tensors[role].tobytes(), role
    assert stored.certificate is not None
    stored.certificate.ClearField("phase_seconds")
    called.certificate.ClearField("phase_seconds")
    assert called.certificate == stored.certificate

    layer.header.spec.CopyFrom(SPECS[name])
    direct = collect(quantize(client.channel, layer.frames()))
    agree(direct, called)


def agree(direct: Result, called: Result) -> None:
    """The sums differ by the order of their additions, which may turn a rounding over."""
    assert set(direct.tensors) == set(called.tensors)
    first, second = direct.certificate, called.certificate
    assert first.relative_error == pytest.approx(second.relative_error, rel=1e-3)
    assert first.lambda_used == pytest.approx(second.lambda_used, rel=RELATIVE)
    assert first.reference_energy == pytest.approx(second.reference_energy, rel=RELATIVE)
    assert (first.x_sha256 == "", second.x_sha256 == "") == (False, True)
    differ = direct.tensors["weight"] != called.tensors["weight"]
    assert np.mean(differ) < 1e-3
