"""Calls against a server that refuses, breaks off and lies."""

from collections.abc import Iterator
from typing import Any

import certiq
import grpc
import numpy as np
import pytest
from certiq import _methods as m
from certiq._proto import calibration_service_pb2 as c
from certiq._proto import job_service_pb2 as j
from certiq._proto import tensor_pb2
from certiq._proto.certificate_pb2 import Certificate
from certiq._proto.quantization_service_pb2 import (
    QuantizeRequest,
    QuantizeResponse,
    ResultChunk,
    ResultHeader,
)
from certiq._transport import BlockingTransport
from fake import refuse, serving

W = np.arange(12, dtype="<f4").reshape(3, 4)
X = np.ones((5, 4), "<f4")
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
Context = grpc.ServicerContext

HEADER = ResultHeader(
    tensors=[tensor_pb2.TensorHeader(name="weight", dtype=tensor_pb2.DATA_TYPE_F32, shape=W.shape)],
    total_bytes=W.nbytes,
)
CERTIFICATE = Certificate(rows=3, features=4)


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between tries, which nobody waits for."""
    waits: list[float] = []

    async def sleep(_: object, seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(BlockingTransport, "sleep", sleep)
    return waits


def test_when_the_server_says(slept: list[float]) -> None:
    """And every try asks for the same."""
    requests: list[c.CreateCalibrationRequest] = []

    def create(request: c.CreateCalibrationRequest, context: Context) -> c.Calibration:
        requests.append(request)
        if len(requests) < 3:
            refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_delay=20)
        return c.Calibration(id="cal-1", features=4)

    with serving({m.CREATE_CALIBRATION: create}) as address, certiq.Client(address) as client:
        assert client.calibration(4, keep=True).id == "cal-1"
    assert len(slept) == 2
    assert all(20 <= delay <= 25 for delay in slept)
    assert requests[0].request_id
    assert requests == [requests[0]] * 3


def test_when_to_give_up(slept: list[float]) -> None:
    tries = 0
    delay: float | None = 61

    def get(_: object, context: Context) -> None:
        nonlocal tries
        tries += 1
        refuse(context, UNAVAILABLE, "it drains", retry_delay=delay)

    with serving({m.GET_JOB: get}) as address:
        with certiq.Client(address) as client:
            with pytest.raises(certiq.Unavailable) as caught:
                client.get_job("job")
            assert caught.value.retry_delay == 61
            assert tries == 1
            delay = 0.5
            with pytest.raises(certiq.Unavailable, match=r"^it drains \(4 tries\)$") as caught:
                client.get_job("job")
            assert caught.value.retry_delay == 0.5
            assert tries == 5
        with (
            certiq.Client(address, retry=certiq.Retry(max_attempts=1)) as client,
            pytest.raises(certiq.Unavailable, match=r"^it drains$"),
        ):
            client.get_job("job")
    assert len(slept) == 3


@pytest.mark.parametrize("started", [False, True])
def test_a_result_that_has_begun_is_not_computed_again(started: bool) -> None:
    tries = 0

    def quantize(requests: Iterator[QuantizeRequest], context: Context) -> Iterator[Any]:
        nonlocal tries
        tries += 1
        assert len(list(requests)) == 3
        if tries == 1:
            if started:
                yield QuantizeResponse(result=HEADER)
            refuse(context, UNAVAILABLE)
        yield QuantizeResponse(result=HEADER)
        yield QuantizeResponse(chunk=ResultChunk(data=W.tobytes()))
        yield QuantizeResponse(certificate=CERTIFICATE)

    with serving({m.QUANTIZE: quantize}) as address, certiq.Client(address) as client:
        if started:
            with pytest.raises(certiq.Unavailable):
                client.quantize(W, X)
            assert tries == 1
        else:
            np.testing.assert_array_equal(client.quantize(W, X).tensors["weight"], W)
            assert tries == 2


def test_an_answer_that_comes_too_early() -> None:
    def quantize(requests: Iterator[QuantizeRequest], _: Context) -> Iterator[Any]:
        next(requests)
        return iter(())

    with serving({m.QUANTIZE: quantize}) as address, certiq.Client(address) as client:
        with pytest.raises(certiq.Error) as caught:
            client.quantize(np.ones((1 << 14, 1024), "<f4"), np.ones((4, 1024), "<f4"))
        assert isinstance(caught.value, certiq.Internal | certiq.DataLoss)


def test_an_answer_that_is_no_answer() -> None:
    def quantize(requests: Iterator[QuantizeRequest], _: Context) -> Iterator[Any]:
        list(requests)
        yield QuantizeResponse(result=HEADER)
        yield QuantizeResponse(chunk=ResultChunk(row_offset=1, data=W.tobytes()))

    def create(requests: Iterator[j.CreateJobRequest], _: Context) -> j.Job:
        list(requests)
        return j.Job()

    calls = {m.QUANTIZE: quantize, m.CREATE_JOB: create}
    with serving(calls) as address, certiq.Client(address) as client:
        with pytest.raises(certiq.Internal, match="row_offset"):
            client.quantize(W, X)
        with pytest.raises(certiq.Internal, match=r"job\.id"):
            client.submit(W, calibration="cal")


def test_a_watch_that_breaks_goes_on(slept: list[float]) -> None:
    calls = 0

    def watch(_: object, context: Context) -> Iterator[j.WatchJobResponse]:
        nonlocal calls
        calls += 1
        if calls in (2, 3, 4, 5, 6):
            # More often than a call that never began is tried.
            refuse(context, UNAVAILABLE)
        state = j.JOB_STATE_RUNNING if calls == 1 else j.JOB_STATE_CANCELLED
        yield j.WatchJobResponse(job=j.Job(id="job", state=state))
        refuse(context, UNAVAILABLE)

    def get(_: object, __: Context) -> j.Job:
        return j.Job(id="job", state=j.JOB_STATE_QUEUED)

    calling = {m.WATCH_JOB: watch, m.GET_JOB: get}
    with serving(calling) as address, certiq.Client(address) as client:
        job = client.get_job("job")
        assert [seen.state for seen in job.watch()] == ["running", "cancelled"]
    assert calls == 7
    assert len(slept) == 6


def test_a_watch_that_ends_before_the_job() -> None:
    def watch(_: object, __: Context) -> Iterator[j.WatchJobResponse]:
        yield j.WatchJobResponse(job=j.Job(id="job", state=j.JOB_STATE_RUNNING))

    def get(_: object, __: Context) -> j.Job:
        return j.Job(id="job", state=j.JOB_STATE_QUEUED)

    calling = {m.WATCH_JOB: watch, m.GET_JOB: get}
    with (
        serving(calling) as address,
        certiq.Client(address) as client,
        pytest.raises(certiq.Internal, match="before the job did"),
    ):
        client.get_job("job").result()


def test_a_page_that_comes_twice() -> None:
    def pages(request: j.ListJobsRequest, _: Context) -> j.ListJobsResponse:
        return j.ListJobsResponse(jobs=[j.Job(id="job")], next_page_token="more")

    with serving({m.LIST_JOBS: pages}) as address, certiq.Client(address) as client:
        jobs = client.jobs()
        assert [next(jobs).id for _ in range(2)] == ["job", "job"]
        with pytest.raises(certiq.Internal, match="next_page_token"):
            next(jobs)


class FakeStream:
    """Accumulate calls, each as its script says."""

    def __init__(self, *scripts: list[tuple[int, int] | grpc.StatusCode]) -> None:
        self.scripts = list(scripts)
        self.sequences: list[list[int]] = []

    def create(self, _: object, __: Context) -> c.Calibration:
        return c.Calibration(id="cal", features=4)

    def accumulate(
        self, requests: Iterator[c.AccumulateRequest], context: Context
    ) -> Iterator[Any]:
        """A pair is an answer, once as many chunks have come as it calls received."""
        assert next(requests).header.stream_id == "a"
        came: list[int] = []
        self.sequences.append(came)
        start: int | None = None
        for step in self.scripts.pop(0):
            if isinstance(step, grpc.StatusCode):
                refuse(context, step, retry_delay=None)
                return
            received, durable = step
            start = received if start is None else start
            while start + len(came) < received:
                came.append(next(requests).chunk.sequence)
            yield c.AccumulateResponse(
                progress=c.StreamProgress(
                    stream_id="a", received=received, durable=durable, tokens=received
                )
            )
        # No server ends a call well before its client did.
        came += [request.chunk.sequence for request in requests]

    def send(self, rows: int = 5, window_bytes: int = 1 << 20) -> None:
        calls = {m.CREATE_CALIBRATION: self.create, m.ACCUMULATE: self.accumulate}
        with serving(calls) as address, certiq.Client(address) as client:
            calibration = client.calibration(4, keep=True)
            with calibration.stream("a", chunk_rows=1, window_bytes=window_bytes) as stream:
                stream.send(X[:rows])
            assert not self.scripts


def test_a_stream_goes_on_where_the_server_says() -> None:
    fake = FakeStream(
        [(0, 0), (2, 1), (3, 2), UNAVAILABLE],
        # Back to what is durable, forward again, and nothing twice.
        [(2, 2), (4, 2), UNAVAILABLE],
        [UNAVAILABLE],
        [(4, 4), (5, 5)],
    )
    fake.send()
    assert fake.sequences == [[0, 1, 2], [2, 3], [], [4]]


def test_what_was_durable_must_stay() -> None:
    fake = FakeStream([(0, 0), (2, 2), UNAVAILABLE], [(1, 1)])
    with pytest.raises(certiq.DataLoss, match="asks for 1"):
        # A full window waits, and so drops what is durable.
        fake.send(window_bytes=30)


@pytest.mark.parametrize(
    ("script", "error", "match"),
    [
        ([(0, 0), (3, 1), (3, 0)], certiq.Internal, "durable"),
        ([(0, 0), (3, 4)], certiq.Internal, "durable"),
        ([(0, 0), (5, 3)], certiq.Internal, "3 of 5 chunks durable"),
        ([(0, 0), (1, 1), grpc.StatusCode.ABORTED], certiq.Aborted, "no"),
        ([grpc.StatusCode.FAILED_PRECONDITION], certiq.FailedPrecondition, "no"),
        ([(7, 7)], certiq.FailedPrecondition, "these are other rows"),
    ],
)
def test_ends_of_a_stream(
    script: list[tuple[int, int] | grpc.StatusCode], error: type[certiq.Error], match: str
) -> None:
    with pytest.raises(error, match=match):
        FakeStream(script).send()


def test_a_stream_that_never_opens(slept: list[float]) -> None:
    # As a server that nobody reaches, it is tried for two seconds, which are four tries at most.
    with pytest.raises(certiq.Unavailable, match=r"\([34] tries\)"):
        FakeStream(*[[UNAVAILABLE]] * 4).send()
    assert 2 <= len(slept) <= 3


def test_a_stream_that_gets_no_further(slept: list[float]) -> None:
    """Two minutes of waits, as they are drawn."""
    first: list[tuple[int, int] | grpc.StatusCode] = [(0, 0), (1, 0), UNAVAILABLE]
    with pytest.raises(certiq.Unavailable):
        FakeStream(first, *[[(1, 0), UNAVAILABLE]] * 100).send()
    assert 100 < sum(slept) <= 120
