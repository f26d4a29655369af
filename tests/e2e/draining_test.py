"""A server that drains says so in one way, whatever it is asked for."""

import itertools
from collections.abc import Iterator

import certiq
import grpc
import numpy as np
import pytest
from answers import (
    EVERY,
    FEATURES,
    ON_THE_WIRE,
    PYTHON,
    PYTHON_X,
    QUANTIZE,
    QUANTIZE_X,
    RAW,
    SUBMIT,
    Answer,
    Caller,
    Request,
    answered,
    begun,
    weights,
)
from programs import PATIENCE_SECONDS, Server, wait_until
from raw import Pipe, header
from stubs import calibration_pb2, tensor_pb2
from sums import made_up
from work import calibrated, create

UNAVAILABLE = "UNAVAILABLE"
ACCUMULATE = "Accumulate"
IMPORT = "ImportStatistics"
CREATE_CALIBRATION = "CreateCalibration"
WATCH = "WatchJob"


class Draining:
    """A server that was told to end and waits for one call, and calls that were open before."""

    def __init__(self, server: Server) -> None:
        self.caller = Caller(server)
        self.client = self.caller.client
        random = np.random.default_rng(3)
        self.source = made_up(random, "rank-0", 128, FEATURES)
        self.calibration = calibrated(self.client, self.source)
        self.request = Request(self.calibration.id)
        self.open_calibration = create(self.client, FEATURES).id
        self.ended = self._slow(8).wait()
        # Ends long after the tests do, unless it is cancelled.
        self.running = self._slow(1 << 17)
        self.watch = self.running.watch()
        next(self.watch)
        self.without_header = {
            way: self._open(way) for way in (*ON_THE_WIRE, QUANTIZE_X, ACCUMULATE, IMPORT)
        }
        self.pipe, self.call = begun(self.caller, QUANTIZE, self.request)
        server.terminate()
        wait_until(lambda: "draining" in server.log(), "the server drains")

    def _slow(self, rows: int) -> certiq.Job:
        spec = certiq.Spec(bits=4, scale_trials=32, polish=64)
        return self.client.submit(weights(rows), calibration=self.calibration, spec=spec)

    def _open(self, way: str) -> tuple[Pipe, grpc.Call]:
        """A call that has not said anything yet."""
        if way in RAW:
            return self.caller.begin(way, [])
        pipe = Pipe()
        stub = self.caller.calls.calibrations
        if way == ACCUMULATE:
            return pipe, stub.Accumulate(iter(pipe), timeout=PATIENCE_SECONDS)
        return pipe, stub.ImportStatistics.future(iter(pipe), timeout=PATIENCE_SECONDS)

    def header(self, way: str) -> object:
        if way in RAW:
            return self.request.header(way)
        if way == ACCUMULATE:
            return header(self.open_calibration, self.source)
        return calibration_pb2.ImportStatisticsRequest(
            header=calibration_pb2.StatisticsHeader(
                calibration_id=self.open_calibration,
                stream_id="import-0",
                tokens=1,
                dtype=tensor_pb2.DATA_TYPE_F64,
            )
        )

    def end_of(self, way: str, call: grpc.Call) -> Answer:
        if way in RAW:
            return self.caller.finish(way, call)
        return answered(call.result if way == IMPORT else lambda: list(call))

    def answer(self, way: str) -> Answer:
        """To a call of now, of which the header is all that is sent."""
        if way in (PYTHON, PYTHON_X, SUBMIT):
            return self.caller.whole(way, self.request)
        if way == CREATE_CALIBRATION:
            return answered(lambda: create(self.client, FEATURES))
        if way == WATCH:
            return answered(lambda: list(self.ended.watch()))
        pipe, call = self._open(way)
        pipe.send(self.header(way))
        answer = self.end_of(way, call)
        pipe.close()
        return answer

    def answer_to_the_header(self, way: str) -> Answer:
        """To a header now, in a call that was open before; it may have ended already."""
        pipe, call = self.without_header.pop(way)
        pipe.send(self.header(way))
        answer = self.end_of(way, call)
        pipe.close()
        return answer


@pytest.fixture(scope="module")
def draining(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Draining]:
    server = Server(
        tmp_path_factory.mktemp("draining"), ["--workers", "1", "--drain_seconds", "3600"]
    )
    try:
        yield Draining(server)
    finally:
        # The second signal ends what is left.
        assert server.stop() == 0, server.log()


def check_draining(answer: Answer) -> None:
    assert answer.code == UNAVAILABLE
    assert "draining" in answer.message
    assert (answer.fields, answer.preconditions) == ([], ())
    assert answer.retry, answer


@pytest.mark.parametrize("way", [*EVERY, ACCUMULATE, IMPORT, CREATE_CALIBRATION, WATCH])
def test_draining(draining: Draining, way: str) -> None:
    answer = draining.answer(way)
    check_draining(answer)
    if way != WATCH:
        assert answer.message == "the server is draining and takes no new work"


@pytest.mark.parametrize("way", [*ON_THE_WIRE, QUANTIZE_X, ACCUMULATE, IMPORT])
def test_a_header_that_comes_while_the_server_drains(draining: Draining, way: str) -> None:
    answer = draining.answer_to_the_header(way)
    check_draining(answer)
    assert answer.message == "the server is draining and takes no new work"


def test_who_watches_hears_that_the_server_drains(draining: Draining) -> None:
    check_draining(answered(lambda: list(draining.watch)))


def test_what_was_begun_goes_on(draining: Draining) -> None:
    """Last: with this call the server has nothing more to wait for."""
    # It has the only worker.
    draining.running.cancel()
    for message in draining.request.tensors(QUANTIZE):
        draining.pipe.send(message)
    draining.pipe.close()
    kinds = [frame.WhichOneof("payload") for frame in draining.call]
    assert kinds[-1] in ("result", "certificate")
    assert "result" in [kind for kind, _ in itertools.groupby(kinds)]
