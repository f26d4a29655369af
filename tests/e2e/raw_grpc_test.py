"""The wire itself: calls that break the contract, give up, dawdle, or come all at once."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import certiq
import grpc
import numpy as np
import pytest
from conftest import StartServer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from programs import PATIENCE_SECONDS, Server, wait_until
from raw import (
    Layer,
    activation_frame,
    announce,
    collect,
    connect,
    failure,
    fields,
    quantize,
    refusal,
    relative_error,
    weight_frame,
)
from stubs import service_pb2, spec_pb2, tensor_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
SPEC = spec_pb2.QuantizationSpec
Frames = Iterator[service_pb2.QuantizeRequest]


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    """A connection, after whose use the server serves on and holds nothing."""
    with connect(server) as opened:
        yield opened
    server.wait_idle()
    layer = Layer.made_up(8, 16, 32)
    with connect(server) as another:
        collect(quantize(another, layer.frames()))
    server.wait_idle()


@pytest.fixture
def layer() -> Layer:
    return Layer.made_up(12, 24, 64)


def large() -> Layer:
    """Work enough to be interrupted."""
    return Layer.made_up(3072, 3072, 32)


def test_a_correct_call(channel: grpc.Channel, layer: Layer) -> None:
    result = collect(quantize(channel, layer.frames(rows=5)))
    assert result.certificate.relative_error == pytest.approx(
        relative_error(layer, result), rel=1e-4
    )


def test_tensors_may_come_in_any_interleaving(channel: grpc.Channel, layer: Layer) -> None:
    def mixed() -> Frames:
        yield layer.header_frame()
        weights, activations = layer.weight_frames(1), layer.activation_frames(3)
        for activation in activations:
            yield activation
            yield from [frame for frame in [next(weights, None)] if frame is not None]
        yield from weights

    straight = collect(quantize(channel, layer.frames()))
    result = collect(quantize(channel, mixed()))
    assert result.certificate.weights_sha256 == straight.certificate.weights_sha256
    assert result.certificate.x_sha256 == straight.certificate.x_sha256
    np.testing.assert_array_equal(result.tensors["weight"], straight.tensors["weight"])


# Frames that break the contract.


def test_no_frame_at_all(channel: grpc.Channel) -> None:
    found = failure(quantize(channel, []))
    assert found.code == INVALID
    assert "header" in found.message


def test_missing_header(channel: grpc.Channel, layer: Layer) -> None:
    found = failure(quantize(channel, layer.weight_frames()))
    assert found.code == INVALID
    assert "header" in found.message
    assert any("header" in field for field in fields(found))


def test_header_twice(channel: grpc.Channel, layer: Layer) -> None:
    found = failure(quantize(channel, [layer.header_frame(), layer.header_frame()]))
    assert found.code == INVALID
    assert "header" in found.message


def test_empty_frame(channel: grpc.Channel, layer: Layer) -> None:
    frames = [layer.header_frame(), service_pb2.QuantizeRequest()]
    assert failure(quantize(channel, frames)).code == INVALID


def invalid_chunks(layer: Layer) -> dict[str, tuple[list[service_pb2.QuantizeRequest], str]]:
    row = layer.W[:1].tobytes()
    return {
        "weight_beyond_shape": ([weight_frame(0, row * 13)], "weight"),
        "weight_after_the_last_row": ([*layer.weight_frames(), weight_frame(12, row)], "weight"),
        "weight_gap": ([weight_frame(1, row)], "weight"),
        "weight_again": ([weight_frame(0, row), weight_frame(0, row)], "weight"),
        "weight_negative_row": ([weight_frame(-1, row)], "weight"),
        "weight_row_overflow": ([weight_frame((1 << 63) - 1, row)], "weight"),
        "weight_part_of_a_row": ([weight_frame(0, row[:-1])], "weight"),
        "weight_no_row": ([weight_frame(0, b"")], "weight"),
        "x_beyond_shape": ([activation_frame(0, row * 65)], "activation"),
        "x_gap": ([activation_frame(7, row)], "activation"),
        "x_part_of_a_row": ([activation_frame(0, row + b"\0")], "activation"),
        "x_no_row": ([activation_frame(0, b"")], "activation"),
        "x_quantized_unannounced": ([activation_frame(0, row, row)], "x_quantized"),
    }


@pytest.mark.parametrize("case", invalid_chunks(Layer.made_up(12, 24, 64)))
def test_chunks_that_do_not_fit(channel: grpc.Channel, layer: Layer, case: str) -> None:
    frames, field = invalid_chunks(layer)[case]
    found = failure(quantize(channel, [layer.header_frame(), *frames]))
    assert found.code == INVALID
    assert any(field in name for name in fields(found)), found
    assert "expected" in found.message


@pytest.mark.parametrize(("weight_rows", "x_rows"), [(12, 63), (11, 64), (12, 0), (0, 64), (0, 0)])
def test_a_stream_that_stops_half_way(
    channel: grpc.Channel, layer: Layer, weight_rows: int, x_rows: int
) -> None:
    def partly() -> Frames:
        yield layer.header_frame()
        if weight_rows:
            yield weight_frame(0, layer.W[:weight_rows].tobytes())
        if x_rows:
            yield activation_frame(0, layer.X[:x_rows].tobytes())

    found = failure(quantize(channel, partly()))
    assert found.code == INVALID
    assert found.violations
    missing = (12, weight_rows) if weight_rows < 12 else (64, x_rows)
    assert all(str(number) in found.message for number in missing)


def test_a_message_over_16_mib(channel: grpc.Channel) -> None:
    layer = Layer.made_up(512, 8193, 1)
    found = failure(quantize(channel, [layer.header_frame(), *layer.weight_frames(512)]))
    assert found.code == EXHAUSTED


# Headers that break the contract.

HeaderChange = Callable[[service_pb2.QuantizeHeader], object]


def set_enum(field: str) -> HeaderChange:
    return lambda header: setattr(header.spec, field, 99)


INVALID_HEADERS: dict[str, tuple[HeaderChange, str]] = {
    "no_weight": (lambda h: h.ClearField("weight"), "weight"),
    "no_x": (lambda h: h.ClearField("x"), "x"),
    "no_dtype": (lambda h: h.weight.ClearField("dtype"), "weight.dtype"),
    "weight_dtype_unknown": (lambda h: setattr(h.weight, "dtype", 99), "weight.dtype"),
    "x_dtype_unknown": (lambda h: setattr(h.x, "dtype", 99), "x.dtype"),
    "weight_dtype_integer": (
        lambda h: setattr(h.weight, "dtype", tensor_pb2.DATA_TYPE_I32),
        "weight.dtype",
    ),
    "shape_empty": (lambda h: h.weight.ClearField("shape"), "weight.shape"),
    "shape_of_one": (lambda h: h.weight.shape.pop(), "weight.shape"),
    "shape_of_three": (lambda h: h.weight.shape.append(1), "weight.shape"),
    "shape_zero": (lambda h: h.weight.shape.__setitem__(0, 0), "weight.shape"),
    "shape_negative": (lambda h: h.x.shape.__setitem__(0, -64), "x.shape"),
    "features_differ": (lambda h: h.x.shape.__setitem__(1, 25), "x.shape"),
    "bits_1": (lambda h: setattr(h.spec, "bits", 1), "spec.bits"),
    "bits_9": (lambda h: setattr(h.spec, "bits", 9), "spec.bits"),
    "group_size_negative": (lambda h: setattr(h.spec, "group_size", -1), "spec.group_size"),
    "group_size_3": (lambda h: setattr(h.spec, "group_size", 3), "spec.group_size"),
    "scale_dtype_integer": (
        lambda h: setattr(h.spec, "scale_dtype", tensor_pb2.DATA_TYPE_U8),
        "spec.scale_dtype",
    ),
    "damping_negative": (lambda h: setattr(h.spec.damping, "absolute", -1), "spec.damping"),
    "damping_nan": (
        lambda h: setattr(h.spec.damping, "relative_trace", float("nan")),
        "spec.damping",
    ),
    "damping_attempts": (lambda h: setattr(h.spec.damping, "max_attempts", 21), "max_attempts"),
    "damping_factor": (lambda h: setattr(h.spec.damping, "factor", 1), "spec.damping.factor"),
    "probability": (
        lambda h: setattr(h.spec.certificate, "failure_probability", 1),
        "failure_probability",
    ),
    "request_id_long": (lambda h: setattr(h, "request_id", "x" * 129), "request_id"),
    "layer_name_long": (lambda h: setattr(h, "layer_name", "x" * 257), "layer_name"),
    "held_out_fraction": (lambda h: setattr(h, "held_out_fraction", 0.75), "held_out_fraction"),
    "sequence_rows": (lambda h: setattr(h, "sequence_rows", -1), "sequence_rows"),
    **{
        f"{field}_unknown": (set_enum(field), f"spec.{field}")
        for field in (
            *("method", "scale_dtype", "group_scales", "scale", "rounding", "order", "format"),
            "quality",
        )
    },
    "on_failure_unknown": (lambda h: setattr(h.spec.damping, "on_failure", 99), "on_failure"),
}


def refused(channel: grpc.Channel, layer: Layer) -> certiq.Error:
    """Refused by its header: with no byte of a tensor sent, and the stream left open."""
    answered = threading.Event()

    def header_alone() -> Frames:
        yield layer.header_frame()
        answered.wait(PATIENCE_SECONDS)

    try:
        found = failure(quantize(channel, header_alone()))
    finally:
        answered.set()
    assert found.code != grpc.StatusCode.DEADLINE_EXCEEDED
    return found


@pytest.mark.parametrize("case", INVALID_HEADERS)
def test_headers_that_make_no_sense(channel: grpc.Channel, layer: Layer, case: str) -> None:
    change, field = INVALID_HEADERS[case]
    change(layer.header)
    found = refused(channel, layer)
    assert found.code == INVALID
    assert any(field in name for name in fields(found)), found
    assert found.message


def test_a_calibration_that_is_not_there(channel: grpc.Channel, layer: Layer) -> None:
    layer.header.ClearField("x")
    layer.header.calibration_id = "none"
    found = refused(channel, layer)
    assert found.code == grpc.StatusCode.NOT_FOUND
    assert "none" in found.message


HUGE = [
    ((1 << 40, 1 << 40), (1, 1 << 40)),
    ((1, 1 << 40), (1, 1 << 40)),
    ((1 << 62, 4), (1, 4)),
    ((1 << 31, 1 << 31), (1, 1 << 31)),
    ((4, 4), (1 << 62, 4)),
    ((4, (1 << 63) - 1), (4, (1 << 63) - 1)),
    ((1 << 20, 1 << 20), (1, 1 << 20)),
    ((1, 1 << 18), (1, 1 << 18)),
]


@pytest.mark.parametrize(("weight", "x"), HUGE, ids=str)
def test_huge_shapes_take_no_memory(
    channel: grpc.Channel,
    layer: Layer,
    weight: tuple[int, int],
    x: tuple[int, int],
) -> None:
    layer.header.weight.CopyFrom(announce("weight", weight))
    layer.header.x.CopyFrom(announce("x", x))
    found = refused(channel, layer)
    assert found.code in (INVALID, EXHAUSTED)
    assert found.message


def test_a_layer_beyond_the_budget(start_server: StartServer, layer: Layer) -> None:
    server = start_server("--memory_budget_bytes", str(16 << 20))
    with connect(server) as channel:
        found = refused(channel, Layer.made_up(2048, 2048, 1))
        assert found.code == EXHAUSTED
        # Waiting would not help.
        assert found.retry_delay is None
        assert "cannot fit" in found.message
        collect(quantize(channel, layer.frames()))
    server.wait_idle()
    assert server.metrics().sum("certiq_rejected_total") == 1


# Calls that end early.


def test_cancelled_mid_upload(server: Server, channel: grpc.Channel) -> None:
    layer = Layer.made_up(64, 64, 256)
    ended = threading.Event()

    def stalled() -> Frames:
        yield layer.header_frame()
        yield weight_frame(0, layer.W[:8].tobytes())
        ended.wait(PATIENCE_SECONDS)

    call = quantize(channel, stalled())
    wait_until(
        lambda: server.metrics().sum("certiq_memory_reserved_bytes") > 0, "the header arrives"
    )
    call.cancel()
    assert failure(call).code == grpc.StatusCode.CANCELLED
    ended.set()
    server.wait_idle()


@pytest.mark.parametrize("phase", ["PHASE_FACTOR", "PHASE_ROUND"])
def test_cancelled_mid_computation(server: Server, channel: grpc.Channel, phase: str) -> None:
    call = quantize(channel, large().frames())
    wanted = service_pb2.Phase.Value(phase)
    with pytest.raises(grpc.RpcError) as error:
        for frame in call:
            assert frame.HasField("progress"), f"no {phase} was seen"
            if frame.progress.phase == wanted:
                call.cancel()
    assert error.value.code() == grpc.StatusCode.CANCELLED
    server.wait_idle()


def test_deadline(server: Server, channel: grpc.Channel) -> None:
    call = quantize(channel, large().frames(), timeout=0.25)
    assert failure(call).code == grpc.StatusCode.DEADLINE_EXCEEDED
    server.wait_idle()


def test_a_connection_that_is_gone(server: Server, channel: grpc.Channel) -> None:
    """The client vanishes, as one that crashed."""
    ended = threading.Event()
    layer = Layer.made_up(64, 64, 256)

    def stalled() -> Frames:
        yield layer.header_frame()
        ended.wait(PATIENCE_SECONDS)

    gone = connect(server)
    call = quantize(gone, stalled())
    wait_until(
        lambda: server.metrics().sum("certiq_memory_reserved_bytes") > 0, "the header arrives"
    )
    gone.close()
    ended.set()
    assert failure(call).code == grpc.StatusCode.CANCELLED
    server.wait_idle()


# Calls that take their time.


def test_a_slow_reader(server: Server, channel: grpc.Channel) -> None:
    """A result larger than any flow control window waits until it is asked for."""
    layer = Layer.made_up(8192, 512, 600)
    done = server.metrics().sum("certiq_weights_quantized_total")
    call = quantize(channel, layer.frames())
    wait_until(
        lambda: server.metrics().sum("certiq_weights_quantized_total") > done, "the job ends"
    )
    # Someone else is served meanwhile.
    with connect(server) as another:
        collect(quantize(another, Layer.made_up(8, 16, 32).frames()))
    result = collect(call)
    assert result.certificate.relative_error == pytest.approx(
        relative_error(layer, result), rel=1e-4
    )


def test_a_slow_writer(server: Server, channel: grpc.Channel, layer: Layer) -> None:
    """A row at a time, each after a round trip of another call."""
    health = health_pb2_grpc.HealthStub(channel)

    def dawdling() -> Frames:
        for frame in layer.frames(rows=1):
            health.Check(health_pb2.HealthCheckRequest())
            yield frame

    result = collect(quantize(channel, dawdling()))
    assert result.certificate.tokens == 64
    np.testing.assert_array_equal(
        result.tensors["weight"], collect(quantize(channel, layer.frames())).tensors["weight"]
    )


def test_32_clients_at_once(server: Server, channel: grpc.Channel) -> None:
    def client(seed: int) -> None:
        layer = Layer.made_up(48 + seed, 96, 300, seed)
        with connect(server) as own:
            result = collect(quantize(own, layer.frames(rows=50)))
        assert result.tensors["weight"].shape == layer.W.shape
        assert result.certificate.relative_error == pytest.approx(
            relative_error(layer, result), rel=1e-4
        )

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(client, range(32)))


def test_a_full_queue_says_when_to_come_back(start_server: StartServer) -> None:
    server = start_server("--workers", "1", "--queue_limit", "1")
    with connect(server) as channel:
        running = quantize(channel, large().frames())
        wait_until(lambda: server.metrics().sum("certiq_workers_busy") == 1, "a job runs")
        for frame in running:
            if frame.progress.phase == service_pb2.PHASE_FACTOR:
                break
        waiting = quantize(channel, Layer.made_up(12, 24, 64).frames())
        wait_until(lambda: server.metrics().sum("certiq_queue_depth") == 1, "a job waits")
        found = failure(quantize(channel, Layer.made_up(12, 24, 64).frames()))
        assert found.code == EXHAUSTED
        assert found.retry_delay is not None
        assert found.retry_delay > 0
        assert server.metrics().sum("certiq_rejected_total") == 1
        running.cancel()
        collect(waiting)
    server.wait_idle()


def test_refused_uploads_end_early(channel: grpc.Channel) -> None:
    """A value that is not finite in the first row ends the call; the rest is not read."""
    layer = large()
    layer.W[0, 5] = np.nan
    found = refusal(lambda: collect(quantize(channel, layer.frames(rows=16))))
    assert found.code == INVALID
    assert any("weight" in name for name in fields(found))
