"""Rows on their way into a calibration: counted once, whatever breaks meanwhile."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import certiq
import ml_dtypes
import numpy as np
import pytest
import sums
from conftest import StartServer
from programs import Server, wait_until
from relay import Relay
from sums import Sums

Array = np.ndarray[Any, np.dtype[Any]]
N = 64
# Short waits between tries, and many of them: a machine may be busy.
QUICK = certiq.Retry(initial_backoff=0.05, max_backoff=0.2, max_attempts=100, unreachable_budget=60)


def rows(random: np.random.Generator, count: int, features: int = N) -> Array:
    return sums.integers(random, count, features)


def sums_in(calibration: certiq.Calibration, *, held_out: bool = False) -> Sums:
    found = calibration.export_statistics(held_out=held_out)
    parts = (found.gram, found.gram_quantized, found.cross)
    return Sums(found.tokens, tuple(part for part in parts if part is not None))


@pytest.fixture
def calibration(client: certiq.Client) -> Iterator[certiq.Calibration]:
    with client.calibration(N) as made:
        yield made


def test_sends_of_any_size(calibration: certiq.Calibration, random: np.random.Generator) -> None:
    X = rows(random, 1000)
    with calibration.stream("rank-0", chunk_rows=96) as stream:
        at = 0
        for count in (1, 2, 95, 0, 300, 96, 7):
            stream.send(X[at : at + count])
            at += count
        # The memory may be used again.
        last = X[at:].copy()
        stream.send(last)
        last[:] = 99
    assert stream.progress.tokens == 1000
    assert stream.progress.durable == stream.progress.received == 11
    sums_in(calibration).assert_equals(Sums.of(X))
    assert calibration.refresh().tokens == 1000
    assert [s.stream_id for s in calibration.info.streams] == ["rank-0"]
    assert calibration.finalize(expected_tokens=1000, expected_streams=["rank-0"]).finalized


def test_mismatched_rows(client: certiq.Client, random: np.random.Generator) -> None:
    X = rows(random, 700)
    seen = X + random.integers(-1, 2, X.shape).astype("<f4")
    with client.calibration(N, mismatched=True) as calibration:
        assert calibration.mismatched
        with calibration.stream("a") as stream:
            # Batches; types of their own.
            stream.send(X[:600].reshape(2, 300, N), seen[:600].reshape(2, 300, N).astype("<f2"))
            stream.send(X[600:], seen[600:].astype("<f2"))
        sums_in(calibration).assert_equals(Sums.of(X, seen))


@pytest.mark.parametrize("kind", ["<f8", "<f2", "bfloat16", "<i4", "u1"])
def test_types_of_rows(client: certiq.Client, random: np.random.Generator, kind: str) -> None:
    dtype = np.dtype(ml_dtypes.bfloat16) if kind == "bfloat16" else np.dtype(kind)
    X = np.abs(rows(random, 300)).astype(dtype)
    with client.calibration(N) as calibration:
        with calibration.stream("a") as stream:
            stream.send(X)
        sums_in(calibration).assert_equals(Sums.of(X.astype("<f8")))


def test_some_rows_are_held_out(client: certiq.Client, random: np.random.Generator) -> None:
    X = rows(random, 2048)
    with client.calibration(N, held_out_fraction=0.25, sequence_rows=64) as calibration:
        with calibration.stream("rank-3") as stream:
            stream.send(X)
        held_out = sums.held_out_rows("rank-3", len(X), 0.25, 64)
        sums_in(calibration).assert_equals(Sums.of(X[~held_out]))
        sums_in(calibration, held_out=True).assert_equals(Sums.of(X[held_out]))
        calibration.refresh()
        assert (calibration.tokens, calibration.held_out_tokens) == (
            np.count_nonzero(~held_out),
            np.count_nonzero(held_out),
        )


def test_connections_that_are_cut(server: Server, random: np.random.Generator) -> None:
    X = rows(random, 4000)
    with (
        Relay(lambda: server.port) as relay,
        certiq.Client(relay.address, retry=QUICK) as client,
        client.calibration(N) as calibration,
    ):
        with calibration.stream("rank-0", chunk_rows=50) as stream:
            for cut, at in enumerate(range(0, len(X), 500), start=1):
                # Within a chunk; the header and some frames of HTTP take a little too.
                relay.cut_after(60_000 + at)
                stream.send(X[at : at + 500])
                # Rows leave after send has returned.
                wait_until(lambda cut=cut: relay.cuts == cut, "the connection is cut")
        assert stream.progress.tokens == len(X)
        sums_in(calibration).assert_equals(Sums.of(X))


def test_a_server_that_is_killed(
    start_server: StartServer, tmp_path: Path, random: np.random.Generator
) -> None:
    """What was not durable is sent again, what was is not counted twice."""
    flags = ("--data_dir", str(tmp_path / "data"), "--commit_seconds", "0.05")
    X = rows(random, 6000)
    servers = [start_server(*flags)]
    with (
        Relay(lambda: servers[-1].port) as relay,
        certiq.Client(relay.address, retry=QUICK) as client,
        client.calibration(N) as calibration,
        calibration.stream("rank-0", chunk_rows=40) as stream,
    ):
        for part, at in enumerate(range(0, len(X), 1000)):
            stream.send(X[at : at + 500])
            if part in (1, 3):
                servers[-1].process.kill()
                servers[-1].wait()
                servers.append(start_server(*flags))
            stream.send(X[at + 500 : at + 1000])
        assert stream.close().tokens == len(X)
        assert relay.connections >= len(servers) == 3
        sums_in(calibration).assert_equals(Sums.of(X))
        assert calibration.finalize(expected_tokens=len(X)).tokens == len(X)


def test_a_process_that_starts_again(
    calibration: certiq.Calibration, random: np.random.Generator
) -> None:
    """It sends the same rows from the first one on; what the server has is skipped."""
    X = rows(random, 1000)

    class CrashError(Exception):
        pass

    with pytest.raises(CrashError), calibration.stream("rank-0", chunk_rows=32) as first:
        first.send(X[:400])
        raise CrashError
    with calibration.stream("rank-0", chunk_rows=32) as second:
        for at in range(0, len(X), 250):
            second.send(X[at : at + 250])
    assert second.progress.tokens == len(X)
    sums_in(calibration).assert_equals(Sums.of(X))
    with pytest.raises(certiq.FailedPrecondition, match="has ended"):
        first.send(X)


def test_other_rows_are_no_continuation(
    calibration: certiq.Calibration, random: np.random.Generator
) -> None:
    X = rows(random, 320)
    with calibration.stream("rank-0", chunk_rows=32) as stream:
        stream.send(X)
    fewer = calibration.stream("rank-0", chunk_rows=32)
    fewer.send(X[:200])
    with pytest.raises(certiq.FailedPrecondition, match="these are other rows"):
        fewer.close()
    cut_otherwise = calibration.stream("rank-0", chunk_rows=16)
    with pytest.raises(certiq.FailedPrecondition, match="another chunk_rows"):
        cut_otherwise.send(X)
    with pytest.raises(certiq.FailedPrecondition, match="another chunk_rows"):
        cut_otherwise.close()
    sums_in(calibration).assert_equals(Sums.of(X))


def test_a_newer_stream_takes_over(
    calibration: certiq.Calibration, random: np.random.Generator
) -> None:
    X = rows(random, 64)
    older = calibration.stream("rank-0", chunk_rows=32)
    older.send(X[:32])
    with calibration.stream("rank-0", chunk_rows=32) as newer:
        newer.send(X)
    with pytest.raises(certiq.Aborted):
        older.close()
    sums_in(calibration).assert_equals(Sums.of(X))


def test_mistakes_are_found_here(
    calibration: certiq.Calibration, random: np.random.Generator
) -> None:
    X = rows(random, 32)
    with calibration.stream("rank-0") as stream:
        for wrong, field in ((X[:, :10], "x.shape"), (X[0], "x.shape"), (X.astype(bool), "x")):
            with pytest.raises(certiq.InvalidArgument) as caught:
                stream.send(wrong)
            assert caught.value.field == field
        stream.send(X)
        # Nothing that was refused has ended the stream.
        with pytest.raises(certiq.InvalidArgument, match="rows of 64 F32"):
            stream.send(X.astype("<f8"))
        with pytest.raises(certiq.InvalidArgument) as caught:
            stream.send(X, X)
        assert caught.value.field == "x_quantized"
    assert stream.progress.tokens == 32
    assert stream.close().tokens == 32
    for name in ("", "x" * 129):
        with pytest.raises(certiq.InvalidArgument) as caught:
            calibration.stream(name)
        assert caught.value.field == "stream_id"
    for arguments in ({"chunk_rows": -1}, {"chunk_rows": 1 << 20}, {"window_bytes": -1}):
        with pytest.raises(certiq.InvalidArgument) as caught:
            calibration.stream("s", **arguments).send(X)
        assert caught.value.field in arguments


def test_a_value_that_is_not_finite(
    calibration: certiq.Calibration, random: np.random.Generator
) -> None:
    X = rows(random, 100)
    stream = calibration.stream("rank-0")
    stream.send(X)
    # The row counts from the stream's first one.
    X[70, 5] = np.nan
    stream.send(X)
    with pytest.raises(certiq.InvalidArgument, match=r"x.*finite.*nan at row 170, column 5"):
        stream.close()


def test_a_stream_takes_little_memory(server: Server, random: np.random.Generator) -> None:
    """However long it is: no more than its window and a few chunks."""
    x = rows(random, 1024, 512)
    with certiq.Client(server.address) as client, client.calibration(512) as calibration:
        with calibration.stream("long", window_bytes=4 << 20) as stream:
            stream.send(x)
            tracemalloc.start()
            for _ in range(40):
                stream.send(x)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert stream.progress.tokens == 41 * 1024
    assert x.nbytes * 40 >= 80 << 20
    assert peak < 12 << 20


def test_what_is_expected(calibration: certiq.Calibration, random: np.random.Generator) -> None:
    with pytest.raises(certiq.FailedPrecondition):
        calibration.finalize()
    with calibration.stream("a") as stream:
        stream.send(rows(random, 10))
    with pytest.raises(certiq.FailedPrecondition) as caught:
        calibration.finalize(expected_tokens=11)
    assert caught.value.preconditions
    with pytest.raises(certiq.FailedPrecondition) as caught:
        calibration.finalize(expected_streams=["a", "b"])
    assert any("b" in (p.subject, *p.description.split()) for p in caught.value.preconditions)
    assert not calibration.refresh().finalized
    calibration.finalize(expected_tokens=10, expected_streams=["a"])
    assert calibration.info.sums_sha256
    with pytest.raises(certiq.FailedPrecondition):
        calibration.stream("c").send(rows(random, 10))


@pytest.mark.parametrize("layout", ["full", "upper"])
@pytest.mark.parametrize("kind", ["<f8", "<f4"])
def test_sums_that_are_imported(
    client: certiq.Client, random: np.random.Generator, kind: str, layout: str
) -> None:
    X = rows(random, 200)
    seen = X + random.integers(-1, 2, X.shape).astype("<f4")
    fit, kept = Sums.of(X[:150], seen[:150]), Sums.of(X[150:], seen[150:])

    def laid_out(part: Array) -> Array:
        return (part[np.triu_indices(N)] if layout == "upper" else part).astype(kind)

    with client.calibration(N, mismatched=True, held_out_fraction=0.25) as calibration:
        for name, found, held_out in (("gpu-0", fit, False), ("gpu-1", kept, True)):
            for again in (False, True):
                assert again is not calibration.import_statistics(
                    stream_id=name,
                    tokens=found.tokens,
                    gram=laid_out(found.parts[0]),
                    gram_quantized=laid_out(found.parts[1]),
                    cross=found.parts[2].astype(kind),
                    held_out=held_out,
                )
        sums_in(calibration).assert_equals(fit)
        sums_in(calibration, held_out=True).assert_equals(kept)
        assert (calibration.tokens, calibration.held_out_tokens) == (150, 50)


def test_sums_that_do_not_fit(calibration: certiq.Calibration) -> None:
    gram = np.eye(N)
    for arguments, field in (
        ({"gram": gram.astype("<f2")}, "gram"),
        ({"gram": gram[:, 1:]}, "gram"),
        ({"gram": np.ones(5)}, "gram"),
        ({"gram": gram, "cross": gram}, "gram_quantized, cross"),
        ({"gram": gram, "cross": gram[1:], "gram_quantized": gram}, "cross"),
        ({"gram": gram, "cross": gram, "gram_quantized": gram.astype("<f4")}, "gram_quantized"),
        ({"gram": gram, "tokens": 0}, "tokens"),
    ):
        with pytest.raises(certiq.InvalidArgument) as caught:
            calibration.import_statistics(**{"stream_id": "s", "tokens": 3, **arguments})
        assert caught.value.field == field
    # What only the server can tell.
    with pytest.raises(certiq.InvalidArgument):
        calibration.import_statistics(stream_id="s", tokens=3, gram=-gram)


def test_a_calibration_goes_with_its_block(
    client: certiq.Client, random: np.random.Generator
) -> None:
    with client.calibration(N, labels=["gone"], ttl=60) as gone:
        assert gone.info.expire_time.seconds > 0
    with pytest.raises(certiq.NotFound):
        gone.refresh()
    with client.calibration(N, labels=["kept"], keep=True) as kept:
        pass
    with client.get_calibration("kept") as found:
        assert found.id == kept.id
        assert found.labels == ["kept"]
    # Deleted within: that is as good.
    with client.get_calibration(kept.id) as found:
        found.keep = False
        found.delete()
    with pytest.raises(certiq.NotFound, match='label "kept"'):
        client.get_calibration("kept")


def test_a_label_of_several(client: certiq.Client) -> None:
    with client.calibration(N, labels=["twice"]) as a, client.calibration(N, labels=["twice"]) as b:
        with pytest.raises(certiq.FailedPrecondition) as caught:
            client.get_calibration("twice")
        assert a.id in caught.value.message
        assert b.id in caught.value.message
    with pytest.raises(certiq.InvalidArgument) as wrong:
        client.calibration(N, labels="letters")
    assert wrong.value.field == "labels"


def test_a_calibration_that_is_made_once(client: certiq.Client) -> None:
    with client.calibration(N, request_id="run-7/layer-0") as made:
        again = client.calibration(N, request_id="run-7/layer-0", keep=True)
        assert again.id == made.id
        with pytest.raises(certiq.AlreadyExists):
            client.calibration(N + 1, request_id="run-7/layer-0")
