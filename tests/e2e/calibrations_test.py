"""Calibrations from their creation to their end."""

from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from cluster import Client, refusal
from programs import Server, wait_until
from stubs import calibration_pb2
from sums import MATCHED, MISMATCHED, Source, Sums, made_up

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


def test_finalize_checks_what_is_expected(client: Client, source: Source) -> None:
    calibration = client.create(N).id
    failed = refusal(lambda: client.finalize(calibration))
    assert (failed.code, failed.preconditions) == (PRECONDITION, ["TOKENS"])
    live = client.open(calibration, source)
    live.next()
    failed = refusal(lambda: client.finalize(calibration, streams=["rank-0"]))
    assert (failed.code, failed.preconditions) == (PRECONDITION, ["STREAM"])
    live.send(source.chunk(0))
    live.wait_received(1)
    for tokens, streams, kind in (
        (31, [], "TOKENS"),
        (33, ["rank-0"], "TOKENS"),
        (32, ["rank-0"], "STREAM"),
        (None, ["rank-0"], "STREAM"),
        (32, ["rank-1"], "STREAM"),
    ):
        failed = refusal(lambda t=tokens, s=streams: client.finalize(calibration, t, s))
        assert (failed.code, failed.preconditions) == (PRECONDITION, [kind])
    assert client.get(calibration).state == OPEN
    live.finish()
    done = client.finalize(calibration, 32, ["rank-0"])
    assert (done.state, done.tokens) == (FINALIZED, 32)


def test_finalizing_freezes(client: Client, source: Source) -> None:
    calibration = client.create(N).id
    assert client.get(calibration).sums_sha256 == ""
    live = client.open(calibration, source)
    live.send(source.chunk(0))
    live.wait_received(1)
    # Not expected to have ended: it is closed.
    first = client.finalize(calibration)
    assert live.failure().code == PRECONDITION
    assert (first.state, first.tokens, len(first.sums_sha256)) == (FINALIZED, 32, 64)
    assert first.HasField("finalize_time")
    assert not first.streams[0].live
    assert refusal(lambda: client.accumulate(calibration, source)).code == PRECONDITION
    assert (
        refusal(lambda: client.import_sums(calibration, "i", Sums.of(source.x))).code
        == PRECONDITION
    )
    again = client.finalize(calibration, 32, ["rank-0"])
    assert again == first == client.get(calibration)
    assert refusal(lambda: client.finalize(calibration, 33)).code == PRECONDITION
    client.export(calibration).assert_equals(head(source, 1))


def test_the_digest_is_of_the_sums(client: Client, source: Source) -> None:
    """Rows that came in other chunks give the same integers, and so the same digest."""
    digests = set()
    for rows in (100, 32, 1):
        cut = Source(source.stream_id, source.x, None, rows)
        digests.add(client.finalize(filled(client, cut)).sums_sha256)
    assert len(digests) == 1
    other = Source(source.stream_id, source.x + 1)
    assert client.finalize(filled(client, other)).sums_sha256 not in digests


def test_request_ids(client: Client, random: np.random.Generator) -> None:
    first = client.create(N, request_id="once", labels=["x"])
    assert client.create(N, request_id="once", labels=["x"]) == first
    for different in ({"labels": ["y"]}, {"labels": ["x"], "fraction": 0.1}):
        failed = refusal(lambda d=different: client.create(N, request_id="once", **d))
        assert failed.code == grpc.StatusCode.ALREADY_EXISTS
        assert first.id in failed.message
    # As it is now, not as it was.
    client.accumulate(first.id, made_up(random, "s", 10, N))
    assert client.create(N, request_id="once", labels=["x"]).tokens == 10
    assert client.create(N).id != client.create(N).id
    client.delete(first.id)
    assert client.create(N, request_id="once", labels=["x"]).id != first.id


@pytest.mark.parametrize(
    ("field", "request_fields"),
    [
        ("features", {"features": 0}),
        ("features", {"features": 65537}),
        ("held_out_fraction", {"held_out_fraction": 0.51}),
        ("held_out_fraction", {"held_out_fraction": -0.1}),
        ("held_out_fraction", {"held_out_fraction": float("nan")}),
        ("sequence_rows", {"sequence_rows": -1}),
        ("kind", {"kind": 9}),
        ("labels", {"labels": ["l"] * 17}),
        ("labels", {"labels": ["l" * 257]}),
        ("request_id", {"request_id": "r" * 129}),
        ("ttl", {"ttl": {"nanos": 999999999}}),
        ("ttl", {"ttl": {"seconds": 365 * 86400 + 1}}),
        ("ttl", {"ttl": {"seconds": -5}}),
    ],
)
def test_creations_that_make_no_sense(
    client: Client, field: str, request_fields: dict[str, object]
) -> None:
    request = calibration_pb2.CreateCalibrationRequest(**{"features": N} | request_fields)
    failed = refusal(lambda: client.calibrations.CreateCalibration(request, timeout=60))
    assert (failed.code, list(failed.fields)) == (INVALID, [field])


def test_labels_and_pages(client: Client) -> None:
    made = [client.create(N, labels=["page", f"n{i % 2}"]).id for i in range(7)]
    newest_first = made[::-1]
    assert [c.id for c in client.list_calibrations(label="page")] == newest_first
    for size in (1, 2, 3, 7, 1000, 5000):
        assert [c.id for c in client.list_calibrations(size, "page")] == newest_first, size
    assert [c.id for c in client.list_calibrations(2, "n1")] == newest_first[1::2]
    assert client.list_calibrations(label="none such") == []
    page = client.calibration_page(7, label="page")
    assert page.next_page_token == ""
    assert all(not c.streams for c in page.calibrations)
    # What comes and goes between two pages shifts nothing.
    page = client.calibration_page(3, label="page")
    client.delete(newest_first[2])
    client.create(N, labels=["page"])
    page = client.calibration_page(3, page.next_page_token, "page")
    assert [c.id for c in page.calibrations] == newest_first[3:6]
    for token in ("garbage", "1", "1.", "x.cal-1", "." * 1000):
        failed = refusal(lambda t=token: client.calibration_page(3, t))
        assert (failed.code, list(failed.fields)) == (INVALID, ["page_token"]), token
    failed = refusal(lambda: client.calibration_page(-1))
    assert (failed.code, list(failed.fields)) == (INVALID, ["page_size"])


def test_deleting_ends_live_streams(client: Client, source: Source) -> None:
    calibration = client.create(N).id
    live = client.open(calibration, source)
    live.send(source.chunk(0))
    live.wait_received(1)
    client.delete(calibration)
    assert live.failure().code == NOT_FOUND
    assert refusal(lambda: client.get(calibration)).code == NOT_FOUND
    assert refusal(lambda: client.delete(calibration)).code == NOT_FOUND
    assert refusal(lambda: client.accumulate(calibration, source)).code == NOT_FOUND


def test_what_nobody_touches_expires(client: Client, source: Source) -> None:
    made = client.create(N, ttl=1)
    assert made.expire_time.ToNanoseconds() - made.create_time.ToNanoseconds() == 10**9
    live = client.open(made.id, source)
    live.next()
    other = client.create(N, ttl=1).id

    def gone(calibration: str) -> bool:
        return calibration not in [found.id for found in client.list_calibrations(1000)]

    wait_until(lambda: gone(other), "a calibration expires")
    assert refusal(lambda: client.get(other)).code == NOT_FOUND
    # An open stream keeps it.
    assert not gone(made.id)
    live.send(source.chunk(0))
    live.finish()
    wait_until(lambda: gone(made.id), "a calibration expires once its streams have ended")
