"""What exceptions carry."""

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import certiq
import grpc
import ml_dtypes
import numpy as np
import pytest
from certiq import errors
from certiq.progress import Event, Retrying
from conftest import StartServer
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from programs import Server, wait_until
from work import small, weight

W, X = weight(), weight(100)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda c: c.quantize(W, X, certiq.Spec(bits=9)), "spec.bits"),
        (lambda c: c.quantize(W, X, certiq.Spec(damping="absolute:-1")), "spec.damping.absolute"),
        (lambda c: c.quantize(W, X, held_out_fraction=0.7), "held_out_fraction"),
        (lambda c: c.calibration(0), "features"),
        (lambda c: c.calibration(8, ttl=0.01), "ttl"),
        (lambda c: c.quantize(W, X, name="x" * 300), "layer_name"),
        # Found here.
        (lambda c: c.quantize(W, X[:, 1:]), "x.shape"),
        (lambda c: c.quantize(W), "x"),
        (lambda c: c.quantize(W, activations_quantized=X), "x_quantized"),
        (lambda c: c.quantize(W, X, activations_quantized=X[1:]), "x_quantized.shape"),
        (lambda c: c.quantize(W.astype("<i4"), X), "weight.dtype"),
        (lambda c: c.quantize(W[0], X), "weight.shape"),
        (lambda c: c.quantize(W[:0], X), "weight.shape"),
        (lambda c: c.quantize(W, X.astype("<c8")), "x"),
        (lambda c: c.quantize(np.zeros((1, 5 << 20)), X), "weight.shape"),
        (lambda c: c.quantize(W, X, spec={"bits": 4}), "spec"),
        (lambda c: c.quantize(W, X, progress=3), "progress"),
        (lambda c: c.quantize(W, X, timeout=0), "timeout"),
        (lambda c: c.submit(W, calibration=""), "calibration_id"),
        (lambda c: c.submit(W, calibration="x", deadline=float("nan")), "deadline"),
    ],
)
def test_fields(client: certiq.Client, call: Callable[[certiq.Client], object], field: str) -> None:
    with pytest.raises(certiq.InvalidArgument) as caught:
        call(client)
    error = caught.value
    assert error.field == field
    assert error.reason
    assert error.reason in error.message
    assert error.message.startswith(field)
    assert error.code == grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(error, ValueError)


def test_other_codes(client: certiq.Client) -> None:
    with pytest.raises(certiq.NotFound) as caught:
        client.get_job("job-" + "0" * 32)
    assert isinstance(caught.value, LookupError)
    assert caught.value.field is None
    assert caught.value.reason == caught.value.message
    with pytest.raises(certiq.NotFound):
        client.quantize(W, calibration="cal-" + "0" * 32)
    with pytest.raises(certiq.FailedPrecondition):
        client.quantize(W, np.zeros_like(X))


def test_details_of_a_status() -> None:
    status = status_pb2.Status(code=9, message="not yet")
    for detail in (
        error_details_pb2.PreconditionFailure(
            violations=[
                error_details_pb2.PreconditionFailure.Violation(
                    type="STATE", subject="calibration", description="is open"
                )
            ]
        ),
        error_details_pb2.RetryInfo(retry_delay={"seconds": 2, "nanos": 500_000_000}),
        error_details_pb2.ErrorInfo(reason="one that is not read"),
    ):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    status.details.append(
        any_pb2.Any(type_url="type.googleapis.com/google.rpc.BadRequest", value=b"\xff")
    )
    error = errors.from_status(status)
    assert type(error) is certiq.FailedPrecondition
    assert error.preconditions == (certiq.PreconditionViolation("STATE", "calibration", "is open"),)
    assert error.reason == "is open"
    assert error.retry_delay == 2.5
    assert str(error) == "not yet"
    longer = error.with_suffix(" (4 tries)")
    assert (type(longer), longer.retry_delay, str(longer)) == (
        certiq.FailedPrecondition,
        2.5,
        "not yet (4 tries)",
    )
    unknown = errors.from_status(status_pb2.Status(code=4711, message="new"))
    assert type(unknown) is certiq.Error
    assert unknown.code == grpc.StatusCode.UNKNOWN


@pytest.mark.parametrize(
    "text", ["\x1b[2J\x1b[31m", "a\nb", "\r", "\x9b2J", "\u202e", "\u2028", "\0"]
)
def test_nothing_of_a_server_reaches_a_terminal_as_it_is(text: str) -> None:
    status = status_pb2.Status(code=3, message=f"é {text}")
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field=text, description=text)
    failed_precondition = error_details_pb2.PreconditionFailure()
    failed_precondition.violations.add(type=text, subject=text, description=text)
    for detail in (bad, failed_precondition):
        status.details.add().Pack(detail)
    error = errors.from_status(status)
    said = [str(error), error.message, error.reason, str(error.field)]
    said += [error.preconditions[0].type, error.preconditions[0].subject]
    assert all(each.isprintable() for each in said), said
    assert str(error).startswith("é ")


def test_every_code_has_a_class() -> None:
    for code in grpc.StatusCode:
        if code != grpc.StatusCode.OK:
            error = errors.from_status(status_pb2.Status(code=code.value[0]))
            assert error.code == code
            assert (type(error) is certiq.Error) == (code == grpc.StatusCode.UNKNOWN)


def test_errors_go_through_pickle() -> None:
    error = errors.invalid("spec.bits", "expected 2 to 8, got 9")
    error.retry_delay = 3.0
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is certiq.InvalidArgument
    assert (copy.field, copy.reason, copy.retry_delay, str(copy)) == (
        "spec.bits",
        "expected 2 to 8, got 9",
        3.0,
        "spec.bits: expected 2 to 8, got 9",
    )


@pytest.mark.parametrize(
    "address",
    ["", "localhost", "localhost:", "a:b", "a:0", "a:65536", "::1:80", "http://a:1", "a b:1"],
)
def test_addresses(address: str) -> None:
    with pytest.raises(certiq.InvalidArgument) as caught:
        certiq.Client(address)
    assert caught.value.field == "address"


def test_settings_that_make_no_sense() -> None:
    for field, make in (
        ("retry.max_attempts", lambda: certiq.Retry(max_attempts=0)),
        ("retry.multiplier", lambda: certiq.Retry(multiplier=0.5)),
        ("retry.resume_budget", lambda: certiq.Retry(resume_budget=-1)),
        ("chunk_bytes", lambda: certiq.Client("a:1", chunk_bytes=0)),
        ("connect_timeout", lambda: certiq.Client("a:1", connect_timeout=0)),
        ("token", lambda: certiq.Client("a:1", token="with blank")),
    ):
        with pytest.raises(certiq.InvalidArgument) as caught:
            make()
        assert caught.value.field == field


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as taken:
        # Bound, so that nobody else listens there.
        taken.bind(("127.0.0.1", 0))
        events: list[Event] = []
        retry = certiq.Retry(initial_backoff=0.01, max_attempts=3)
        with certiq.Client(f"127.0.0.1:{taken.getsockname()[1]}", retry=retry) as client:
            with pytest.raises(certiq.Unavailable, match=r"\(3 tries\)") as caught:
                client.quantize(W, X, progress=events.append)
            with pytest.raises(certiq.Unavailable):
                client.get_job("any")
    assert caught.value.code == grpc.StatusCode.UNAVAILABLE
    assert [event.attempt for event in events if isinstance(event, Retrying)] == [1, 2]


def test_a_client_that_was_closed(server: Server) -> None:
    client = certiq.Client(server.address)
    list(client.jobs())
    client.close()
    with pytest.raises(certiq.Error, match="closed"):
        list(client.jobs())


class DeviceError(Exception):
    pass


def test_rows_that_cannot_be_read(client: certiq.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why they could not, not what gRPC makes of it."""

    def fail(_: object) -> None:
        raise DeviceError

    calibration = small(client)
    monkeypatch.setattr("certiq.tensors._memory", fail)
    with pytest.raises(DeviceError):
        client.quantize(W, X)
    with pytest.raises(DeviceError):
        client.submit(W, calibration=calibration)


INTERRUPTED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the parent does
import sys, certiq, numpy as np
from work import submit_big
client = certiq.Client(sys.argv[1])
job = submit_big(client)
print(job.id, flush=True)
try:
    job.result()
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c(start_server: StartServer) -> None:
    """Ends the wait at once; the job goes on."""
    server = start_server("--workers", "1")
    here = Path(__file__).parent
    folders = os.pathsep.join([str(here), str(here.parents[1] / "e2e")])
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, server.address],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": folders},
    ) as process:
        assert process.stdout is not None
        job_id = process.stdout.readline().strip()
        with certiq.Client(server.address) as client:
            job = client.get_job(job_id)
            wait_until(lambda: job.refresh().state == "running", "the job runs")
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "interrupted\n"
            assert process.wait() == 0
            assert not job.done()
            job.cancel()


def bad_matrix(rows: int, row: int, column: int, kind: str) -> Any:  # noqa: ANN401
    """Of ones, but for one value that is not finite, in numpy's or torch's types."""
    values = np.ones((rows, 8))
    values[row, column] = np.nan if kind != "float64 beyond float32" else 1e300
    library, _, name = kind.partition(" ")
    if library == "torch":
        torch = pytest.importorskip("torch")
        return torch.from_numpy(values).to(getattr(torch, name))
    if kind == "bfloat16":
        return values.astype(ml_dtypes.bfloat16)
    return values.astype(library)


KINDS = (
    *("float16", "float32", "float64", "bfloat16", "float64 beyond float32"),
    *("torch float32", "torch bfloat16"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_finite_are_named_whatever_way_they_come(
    client: certiq.Client, kind: str
) -> None:
    value = "inf" if kind == "float64 beyond float32" else "nan"
    good_w, good_x = np.ones((6, 8), np.float32), np.ones((300, 8), np.float32)

    def expect(field: str, row: int, call: Callable[[], object]) -> None:
        with pytest.raises(
            certiq.InvalidArgument, match=rf"^{field}: .*got {value} at row {row}, column 5$"
        ) as caught:
            call()
        assert caught.value.field == field

    weight, x = bad_matrix(6, 4, 5, kind), bad_matrix(300, 280, 5, kind)
    expect("weight.data", 4, lambda: client.quantize(weight, good_x))
    expect("activation.x", 280, lambda: client.quantize(good_w, x))
    expect(
        "activation.x_quantized",
        280,
        lambda: client.quantize(
            good_w, good_x, certiq.Spec(method="qronos"), activations_quantized=x
        ),
    )
    with client.calibration(8) as calibration:

        def stream() -> None:
            with calibration.stream("bad") as sender:
                # Rows count from the stream\'s first one.
                sender.send(x[:280])
                sender.send(x)

        expect("chunk.x", 560, stream)
        with calibration.stream("good") as sender:
            sender.send(good_x)
        calibration.finalize(expected_streams=["good"])
        expect("weight.data", 4, lambda: client.submit(weight, calibration=calibration).result())
    if "16" in kind:
        # Sums are not taken in half types.
        return
    with client.calibration(8) as sums:
        gram = bad_matrix(8, 4, 5, kind)
        with pytest.raises(certiq.InvalidArgument, match=r"(nan|inf|1e\+300).*row 4.*column 5"):
            sums.import_statistics(stream_id="bad", gram=gram, tokens=9)
