"""Accumulate: each token once, whatever happens to the calls that bring it."""

from collections.abc import Iterator
from pathlib import Path

import certiq
import grpc
import numpy as np
import pytest
from conftest import StartServer
from programs import Server
from raw import AccumulateCall, Calls, chunk, fields, refusal
from stubs import calibration_pb2
from sums import Source, Sums, made_up, split_sums
from work import client_of, create, fill, stream_of

N = 24
INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND


@pytest.fixture(scope="module")
def durable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("calibrations")
    flags = ["--data_dir", str(folder / "data"), "--commit_seconds", "0.1", "--workers", "2"]
    server = Server(folder, flags)
    yield server
    assert server.stop() == 0, server.log()


@pytest.fixture
def client(durable: Server) -> certiq.Client:
    return client_of(durable)


@pytest.fixture
def calls(durable: Server) -> Calls:
    return Calls(durable)


@pytest.fixture
def source(random: np.random.Generator) -> Source:
    """Four chunks."""
    return made_up(random, "rank-0", 100, N)


def assert_holds(
    calibration: certiq.Calibration, source: Source, chunks: int | None = None
) -> None:
    """The sums of the stream's first chunks, or all of them."""
    rows = slice(None if chunks is None else chunks * source.chunk_rows)
    quantized = None if source.x_quantized is None else source.x_quantized[rows]
    Sums.exported(calibration).assert_equals(Sums.of(source.x[rows], quantized))


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
@pytest.mark.parametrize("mismatched", [False, True], ids=["matched", "mismatched"])
def test_sums_of_several_streams(
    client: certiq.Client, random: np.random.Generator, dtype: str, mismatched: bool
) -> None:
    calibration = create(client, N, mismatched=mismatched, labels=["a", "b"])
    sources = [
        made_up(random, f"rank-{rank}", 77 + rank, N, mismatched=mismatched, dtype=dtype)
        for rank in range(3)
    ]
    for source in sources:
        end = fill(calibration, source)
        assert (end.stream_id, end.tokens) == (source.stream_id, len(source.x))
        assert end.received == end.durable == source.chunks
    fit, _ = split_sums(sources, 0, 1)
    Sums.exported(calibration).assert_equals(fit)
    now = calibration.refresh()
    assert (now.finalized, now.mismatched, now.features) == (False, mismatched, N)
    assert (now.tokens, now.held_out_tokens, now.labels) == (fit.tokens, 0, ["a", "b"])
    streams = now.info.streams
    assert [stream.stream_id for stream in streams] == ["rank-0", "rank-1", "rank-2"]
    assert not any(stream.live or stream.imported for stream in streams)


def test_repeated_chunks_are_ignored(client: certiq.Client, calls: Calls, source: Source) -> None:
    calibration = create(client, N)
    call = AccumulateCall(calls, calibration, source)
    assert call.next().received == 0
    # One that was received is ignored whatever it holds now.
    call.send(0, 0, 1, 0, 1, 2, 3, 3, 0, chunk(1, b"x"))
    end = call.finish()
    assert (end.received, end.tokens) == (4, 100)
    assert_holds(calibration, source)


@pytest.mark.parametrize("sequence", [2, -1, 1 << 62])
def test_a_gap_is_refused(
    client: certiq.Client, calls: Calls, source: Source, sequence: int
) -> None:
    calibration = create(client, N)
    call = AccumulateCall(calls, calibration, source)
    call.send(0, chunk(sequence, source.x[:32].tobytes()))
    failed = call.failure()
    assert failed.code == INVALID
    assert list(fields(failed)) == ["chunk.sequence"]
    assert "expected 1" in failed.reason
    assert_holds(calibration, source, 1)
    fill(calibration, source)
    assert_holds(calibration, source)


def test_the_newer_call_takes_the_stream_over(
    client: certiq.Client, calls: Calls, source: Source
) -> None:
    calibration = create(client, N)
    older = AccumulateCall(calls, calibration, source)
    older.send(0)
    older.wait_received(1)
    newer = AccumulateCall(calls, calibration, source)
    assert newer.next().received == 1
    # Too late: the older call has ended, or ends now.
    older.send(1)
    assert older.failure().code == grpc.StatusCode.ABORTED
    (stream,) = calibration.refresh().info.streams
    assert (stream.live, stream.received) == (True, 1)
    newer.send(1, 2, 3)
    newer.finish()
    assert_holds(calibration, source)


def test_a_broken_connection_is_taken_up(
    durable: Server, client: certiq.Client, calls: Calls, source: Source
) -> None:
    calibration = create(client, N)
    breaking = Calls(durable)
    call = AccumulateCall(breaking, calibration, source)
    call.send(0, 1)
    call.wait_received(1)
    breaking.channel.close()
    again = AccumulateCall(calls, calibration, source)
    progress = again.next()
    assert progress.received in (1, 2)
    assert progress.tokens == 32 * progress.received
    again.cancel()
    fill(calibration, source)
    assert_holds(calibration, source)


def test_durable_follows_received(
    start_server: StartServer, tmp_path: Path, source: Source
) -> None:
    flags = ["--data_dir", str(tmp_path / "data"), "--commit_seconds", "3600"]
    server = start_server(*flags)
    calls, calibration = Calls(server), create(client_of(server), N)
    call = AccumulateCall(calls, calibration, source)
    call.send(0)
    assert call.wait_received(1).durable == 0
    # Half-closing makes it durable at once.
    end = call.finish()
    assert (end.received, end.durable) == (1, 1)
    call = AccumulateCall(calls, calibration, source)
    call.send(1, 2)
    progress = call.wait_received(3)
    assert (progress.durable, progress.tokens) == (1, 96)
    server.process.kill()
    server.wait()
    assert call.failure().code == grpc.StatusCode.UNAVAILABLE

    calibration = client_of(start_server(*flags)).get_calibration(calibration.id)
    (stream,) = calibration.info.streams
    assert (stream.received, stream.durable, stream.tokens) == (1, 1, 32)
    assert_holds(calibration, source, 1)
    fill(calibration, source)
    assert_holds(calibration, source)


def test_durable_by_itself_after_a_while(
    client: certiq.Client, calls: Calls, source: Source
) -> None:
    """A stream that goes on need not end for its rows to reach the disk."""
    call = AccumulateCall(calls, create(client, N), source)
    call.send(0)
    while call.next().durable < 1:
        pass
    call.finish()


def test_a_stop_makes_open_streams_durable(
    start_server: StartServer, tmp_path: Path, source: Source
) -> None:
    flags = ["--data_dir", str(tmp_path / "data"), "--commit_seconds", "3600"]
    server = start_server(*flags)
    calibration = create(client_of(server), N)
    call = AccumulateCall(Calls(server), calibration, source)
    call.send(0)
    assert call.wait_received(1).durable == 0
    assert server.stop() == 0
    assert call.failure().code == grpc.StatusCode.UNAVAILABLE
    assert_holds(client_of(start_server(*flags)).get_calibration(calibration.id), source, 1)


def test_without_a_disk_received_is_durable(start_server: StartServer, source: Source) -> None:
    server = start_server()
    calibration = create(client_of(server), N)
    call = AccumulateCall(Calls(server), calibration, source)
    call.send(0)
    assert call.wait_received(1).durable == 1
    call.finish()
    assert_holds(calibration, source, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "x_quantized"])
def test_values_that_are_not_finite(
    client: certiq.Client, random: np.random.Generator, where: str, value: float
) -> None:
    mismatched = where == "x_quantized"
    source = made_up(random, "rank-0", 64, N, mismatched=mismatched)
    calibration = create(client, N, mismatched=mismatched)
    bad = {"x": source.x.copy(), "x_quantized": source.x_quantized}
    bad[where] = bad[where].copy()
    bad[where][43, 5] = value
    failed = refusal(lambda: fill(calibration, Source("rank-0", **bad)))
    assert failed.code == INVALID
    assert list(fields(failed)) == [f"chunk.{where}"]
    assert "row 43, column 5" in failed.reason
    # Nothing of that chunk counts; the stream goes on with a better one.
    now = calibration.refresh()
    assert (now.tokens, now.info.streams[0].received) == (32, 1)
    assert_holds(calibration, source, 1)
    fill(calibration, source)
    assert_holds(calibration, source)


def header(calibration: str, **fields: object) -> calibration_pb2.AccumulateRequest:
    known = {"calibration_id": calibration, "stream_id": "s", "x": 2} | fields
    return calibration_pb2.AccumulateRequest(header=calibration_pb2.AccumulateHeader(**known))


ROW = bytes(4 * N)
BAD_STREAMS = {
    "no message": ([], "header"),
    "a chunk first": ([chunk(0, ROW)], "header"),
    "two headers": ([header("ID"), header("ID")], "header"),
    "an empty message": ([header("ID"), calibration_pb2.AccumulateRequest()], "header"),
    "no stream_id": ([header("ID", stream_id="")], "stream_id"),
    "a long stream_id": ([header("ID", stream_id="s" * 129)], "stream_id"),
    "no dtype": ([header("ID", x=0)], "x"),
    "an unknown dtype": ([header("ID", x=99)], "x"),
    "x_quantized announced": ([header("ID", x_quantized=2)], "x_quantized"),
    "no rows": ([header("ID"), chunk(0, b"")], "chunk.x"),
    "part of a row": ([header("ID"), chunk(0, ROW + b"1234")], "chunk.x"),
    "x_quantized sent": ([header("ID"), chunk(0, ROW, ROW)], "chunk.x_quantized"),
}


@pytest.mark.parametrize("name", BAD_STREAMS)
def test_streams_that_make_no_sense(client: certiq.Client, calls: Calls, name: str) -> None:
    frames, field = BAD_STREAMS[name]
    calibration = create(client, N)
    for frame in frames:
        if frame.HasField("header"):
            frame.header.calibration_id = calibration.id
    failed = refusal(lambda: list(calls.calibrations.Accumulate(iter(frames), timeout=60)))
    assert failed.code == INVALID
    assert list(fields(failed)) == [field]
    assert calibration.refresh().tokens == 0


def test_mismatched_streams_need_both(client: certiq.Client, calls: Calls) -> None:
    calibration = create(client, N, mismatched=True).id
    for frames, field in (
        ([header(calibration)], "x_quantized"),
        ([header(calibration, x_quantized=2), chunk(0, ROW + ROW, ROW)], "chunk.x_quantized"),
    ):
        failed = refusal(lambda f=frames: list(calls.calibrations.Accumulate(iter(f), timeout=60)))
        assert (failed.code, list(fields(failed))) == (INVALID, [field])


def test_an_unknown_calibration(client: certiq.Client, source: Source) -> None:
    calibration = create(client, N)
    calibration.info.id = "cal-none"
    for call in (
        lambda: fill(calibration, source),
        lambda: Sums.of(source.x).import_into(calibration, "s"),
        calibration.export_statistics,
        calibration.finalize,
        calibration.refresh,
        calibration.delete,
    ):
        assert refusal(call).code == NOT_FOUND


@pytest.mark.parametrize(("fraction", "sequence_rows"), [(0.25, 8), (0.1, 7), (0.5, 0)])
@pytest.mark.parametrize("mismatched", [False, True], ids=["matched", "mismatched"])
def test_held_out_rows_follow_the_rule(
    client: certiq.Client,
    random: np.random.Generator,
    fraction: float,
    sequence_rows: int,
    mismatched: bool,
) -> None:
    calibration = create(
        client,
        N,
        mismatched=mismatched,
        held_out_fraction=fraction,
        sequence_rows=sequence_rows,
    )
    blocks = sequence_rows or 256
    assert calibration.info.held_out_block_rows == blocks
    assert calibration.info.held_out_fraction == fraction
    sources = [
        made_up(random, name, rows, N, mismatched=mismatched, chunk_rows=53)
        for name, rows in (("rank-0", 1100), ("rank-1", 1100), ("ü" * 64, 600))
    ]
    for source in sources:
        # Broken off, and taken up.
        part = stream_of(calibration, source)
        rows = slice(3 * source.chunk_rows)
        part.send(source.x[rows], None if source.x_quantized is None else source.x_quantized[rows])
        part.abort()
        fill(calibration, source)
    fit, held_out = split_sums(sources, fraction, blocks)
    assert held_out.tokens > 0
    for _ in range(2):
        now = calibration.refresh()
        assert (now.tokens, now.held_out_tokens) == (fit.tokens, held_out.tokens)
        Sums.exported(calibration).assert_equals(fit)
        Sums.exported(calibration, held_out=True).assert_equals(held_out)
        calibration.finalize(expected_tokens=fit.tokens + held_out.tokens)
