"""Accumulate: each token once, whatever happens to the calls that bring it."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from cluster import Client, refusal
from conftest import StartServer
from programs import Server
from stubs import calibration_pb2
from sums import HELD_OUT, MATCHED, MISMATCHED, Source, Sums, chunk, made_up, split_sums

N = 24
INVALID = grpc.StatusCode.INVALID_ARGUMENT
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
NOT_FOUND = grpc.StatusCode.NOT_FOUND
OPEN = calibration_pb2.CALIBRATION_STATE_OPEN
FINALIZED = calibration_pb2.CALIBRATION_STATE_FINALIZED


@pytest.fixture(scope="module")
def durable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("calibrations")
    flags = ["--data_dir", str(folder / "data"), "--commit_seconds", "0.1", "--workers", "2"]
    server = Server(folder, flags)
    yield server
    assert server.stop() == 0, server.log()


@pytest.fixture
def client(durable: Server) -> Client:
    return Client.of(durable)


@pytest.fixture
def source(random: np.random.Generator) -> Source:
    """Four chunks."""
    return made_up(random, "rank-0", 100, N)


def head(source: Source, chunks: int) -> Sums:
    rows = slice(0, chunks * source.chunk_rows)
    return Sums.of(source.x[rows], None if source.x_quantized is None else source.x_quantized[rows])


def filled(client: Client, source: Source) -> str:
    """A calibration that holds this stream and is open."""
    kind = MATCHED if source.x_quantized is None else MISMATCHED
    calibration = client.create(source.x.shape[1], kind=kind).id
    client.accumulate(calibration, source)
    return calibration


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
@pytest.mark.parametrize("mismatched", [False, True], ids=["matched", "mismatched"])
def test_sums_of_several_streams(
    client: Client, random: np.random.Generator, dtype: str, mismatched: bool
) -> None:
    kind = MISMATCHED if mismatched else MATCHED
    calibration = client.create(N, kind=kind, labels=["a", "b"]).id
    sources = [
        made_up(random, f"rank-{rank}", 77 + rank, N, mismatched=mismatched, dtype=dtype)
        for rank in range(3)
    ]
    for source in sources:
        end = client.accumulate(calibration, source)
        assert end is not None
        assert (end.stream_id, end.tokens) == (source.stream_id, len(source.x))
        assert end.received == end.durable == source.chunks
    fit, _ = split_sums(sources, 0, 1)
    client.export(calibration).assert_equals(fit)
    now = client.get(calibration)
    assert (now.state, now.kind, now.features) == (OPEN, kind, N)
    assert (now.tokens, now.held_out_tokens, list(now.labels)) == (fit.tokens, 0, ["a", "b"])
    assert [stream.stream_id for stream in now.streams] == ["rank-0", "rank-1", "rank-2"]
    assert not any(stream.live or stream.imported for stream in now.streams)


def test_repeated_chunks_are_ignored(client: Client, source: Source) -> None:
    calibration = client.create(N).id
    call = client.open(calibration, source)
    assert call.next().received == 0
    for sequence in (0, 0, 1, 0, 1, 2, 3, 3, 0):
        call.send(source.chunk(sequence))
    # One that was received is ignored whatever it holds now.
    call.send(chunk(1, b"x"))
    end = call.finish()
    assert end is not None
    assert (end.received, end.tokens) == (4, 100)
    client.export(calibration).assert_equals(Sums.of(source.x))


@pytest.mark.parametrize("sequence", [2, -1, 1 << 62])
def test_a_gap_is_refused(client: Client, source: Source, sequence: int) -> None:
    calibration = client.create(N).id
    call = client.open(calibration, source)
    call.send(source.chunk(0))
    call.send(chunk(sequence, source.x[:32].tobytes()))
    failed = call.failure()
    assert failed.code == INVALID
    assert list(failed.fields) == ["chunk.sequence"]
    assert "expected 1" in failed.fields["chunk.sequence"]
    client.export(calibration).assert_equals(head(source, 1))
    client.accumulate(calibration, source)
    client.export(calibration).assert_equals(Sums.of(source.x))


def test_the_newer_call_takes_the_stream_over(client: Client, source: Source) -> None:
    calibration = client.create(N).id
    older = client.open(calibration, source)
    older.send(source.chunk(0))
    older.wait_received(1)
    newer = client.open(calibration, source)
    assert newer.next().received == 1
    # Too late: the older call has ended, or ends now.
    older.send(source.chunk(1))
    assert older.failure().code == grpc.StatusCode.ABORTED
    (stream,) = client.get(calibration).streams
    assert (stream.live, stream.received) == (True, 1)
    for sequence in range(1, source.chunks):
        newer.send(source.chunk(sequence))
    newer.finish()
    client.export(calibration).assert_equals(Sums.of(source.x))


def test_a_broken_connection_is_taken_up(durable: Server, client: Client, source: Source) -> None:
    calibration = client.create(N).id
    breaking = Client.of(durable)
    call = breaking.open(calibration, source)
    call.send(source.chunk(0))
    call.send(source.chunk(1))
    call.wait_received(1)
    breaking.channel.close()
    again = client.open(calibration, source)
    progress = again.next()
    assert progress.received in (1, 2)
    assert progress.tokens == 32 * progress.received
    again.cancel()
    client.accumulate(calibration, source)
    client.export(calibration).assert_equals(Sums.of(source.x))


def test_durable_follows_received(start_server: StartServer, tmp_path: Path) -> None:
    flags = ["--data_dir", str(tmp_path / "data"), "--commit_seconds", "3600"]
    server = start_server(*flags)
    client = Client.of(server)
    source = made_up(np.random.default_rng(1), "rank-0", 100, N)
    calibration = client.create(N).id
    call = client.open(calibration, source)
    call.send(source.chunk(0))
    assert call.wait_received(1).durable == 0
    # Half-closing makes it durable at once.
    end = call.finish()
    assert end is not None
    assert (end.received, end.durable) == (1, 1)
    call = client.open(calibration, source)
    call.send(source.chunk(1))
    call.send(source.chunk(2))
    progress = call.wait_received(3)
    assert (progress.durable, progress.tokens) == (1, 96)
    server.process.kill()
    server.wait()
    assert call.failure().code == grpc.StatusCode.UNAVAILABLE

    client = Client.of(start_server(*flags))
    (stream,) = client.get(calibration).streams
    assert (stream.received, stream.durable, stream.tokens) == (1, 1, 32)
    client.export(calibration).assert_equals(head(source, 1))
    client.accumulate(calibration, source)
    client.export(calibration).assert_equals(Sums.of(source.x))


def test_durable_by_itself_after_a_while(client: Client, source: Source) -> None:
    """A stream that goes on need not end for its rows to reach the disk."""
    calibration = client.create(N).id
    call = client.open(calibration, source)
    call.send(source.chunk(0))
    while call.next().durable < 1:
        pass
    call.finish()


def test_a_stop_makes_open_streams_durable(start_server: StartServer, tmp_path: Path) -> None:
    flags = ["--data_dir", str(tmp_path / "data"), "--commit_seconds", "3600"]
    server = start_server(*flags)
    client = Client.of(server)
    source = made_up(np.random.default_rng(1), "rank-0", 100, N)
    calibration = client.create(N).id
    call = client.open(calibration, source)
    call.send(source.chunk(0))
    assert call.wait_received(1).durable == 0
    assert server.stop() == 0
    assert call.failure().code == grpc.StatusCode.UNAVAILABLE
    client = Client.of(start_server(*flags))
    client.export(calibration).assert_equals(head(source, 1))


def test_without_a_disk_received_is_durable(start_server: StartServer, source: Source) -> None:
    client = Client.of(start_server())
    calibration = client.create(N).id
    call = client.open(calibration, source)
    call.send(source.chunk(0))
    progress = call.wait_received(1)
    assert progress.durable == 1
    call.finish()
    client.export(calibration).assert_equals(head(source, 1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "x_quantized"])
def test_values_that_are_not_finite(
    client: Client, random: np.random.Generator, where: str, value: float
) -> None:
    source = made_up(random, "rank-0", 64, N, mismatched=where == "x_quantized")
    calibration = client.create(N, kind=MISMATCHED if where == "x_quantized" else MATCHED).id
    bad = {"x": source.x.copy(), "x_quantized": source.x_quantized}
    bad[where] = bad[where].copy()
    bad[where][43, 5] = value
    call = client.open(calibration, source)
    call.send(source.chunk(0))
    call.send(Source("rank-0", **bad).chunk(1))
    failed = call.failure()
    assert failed.code == INVALID
    assert list(failed.fields) == [f"chunk.{where}"]
    assert "row 43, column 5" in failed.fields[f"chunk.{where}"]
    # Nothing of that chunk counts; the stream goes on with a better one.
    now = client.get(calibration)
    assert (now.tokens, now.streams[0].received) == (32, 1)
    client.export(calibration).assert_equals(head(source, 1))
    client.accumulate(calibration, source)
    client.export(calibration).assert_equals(Sums.of(source.x, source.x_quantized))


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
def test_streams_that_make_no_sense(client: Client, name: str) -> None:
    frames, field = BAD_STREAMS[name]
    calibration = client.create(N).id
    for frame in frames:
        if frame.HasField("header"):
            frame.header.calibration_id = calibration
    failed = refusal(lambda: list(client.calibrations.Accumulate(iter(frames), timeout=60)))
    assert failed.code == INVALID
    assert list(failed.fields) == [field]
    assert client.get(calibration).tokens == 0


def test_mismatched_streams_need_both(client: Client) -> None:
    calibration = client.create(N, kind=MISMATCHED).id
    frames = [header(calibration)]
    failed = refusal(lambda: list(client.calibrations.Accumulate(iter(frames), timeout=60)))
    assert (failed.code, list(failed.fields)) == (INVALID, ["x_quantized"])
    frames = [header(calibration, x_quantized=2), chunk(0, ROW + ROW, ROW)]
    failed = refusal(lambda: list(client.calibrations.Accumulate(iter(frames), timeout=60)))
    assert (failed.code, list(failed.fields)) == (INVALID, ["chunk.x_quantized"])


def test_an_unknown_calibration(client: Client, source: Source) -> None:
    for call in (
        lambda: client.accumulate("cal-none", source),
        lambda: client.import_sums("cal-none", "s", Sums.of(source.x)),
        lambda: client.export("cal-none"),
        lambda: client.finalize("cal-none"),
        lambda: client.get("cal-none"),
        lambda: client.delete("cal-none"),
    ):
        assert refusal(call).code == NOT_FOUND


@pytest.mark.parametrize(("fraction", "sequence_rows"), [(0.25, 8), (0.1, 7), (0.5, 0)])
@pytest.mark.parametrize("mismatched", [False, True], ids=["matched", "mismatched"])
def test_held_out_rows_follow_the_rule(
    client: Client,
    random: np.random.Generator,
    fraction: float,
    sequence_rows: int,
    mismatched: bool,
) -> None:
    calibration = client.create(
        N,
        kind=MISMATCHED if mismatched else MATCHED,
        fraction=fraction,
        sequence_rows=sequence_rows,
    )
    blocks = sequence_rows or 256
    assert calibration.held_out_block_rows == blocks
    assert calibration.held_out_fraction == fraction
    sources = [
        made_up(random, name, rows, N, mismatched=mismatched, chunk_rows=53)
        for name, rows in (("rank-0", 1100), ("rank-1", 1100), ("ü" * 64, 600))
    ]
    for source in sources:
        client.accumulate(calibration.id, source, 3)
        client.accumulate(calibration.id, source)
    fit, held_out = split_sums(sources, fraction, blocks)
    assert held_out.tokens > 0
    for _ in range(2):
        now = client.get(calibration.id)
        assert (now.tokens, now.held_out_tokens) == (fit.tokens, held_out.tokens)
        client.export(calibration.id).assert_equals(fit)
        client.export(calibration.id, HELD_OUT).assert_equals(held_out)
        client.finalize(calibration.id, fit.tokens + held_out.tokens)
