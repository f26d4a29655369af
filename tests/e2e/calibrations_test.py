"""Calibrations from their creation to their end."""

from collections.abc import Iterator

import certiq
import grpc
import numpy as np
import pytest
from programs import Server, wait_until
from raw import Calls, fields, kinds, refusal
from stubs import calibration_pb2
from sums import Source, Sums, made_up
from work import client_of, create, fill, stream_of

N = 24
INVALID = grpc.StatusCode.INVALID_ARGUMENT
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
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


def begun(calibration: certiq.Calibration, source: Source) -> certiq.ActivationStream:
    """A stream that is open and whose first chunk the server has."""
    stream = stream_of(calibration, source)
    stream.send(source.x[: source.chunk_rows])
    wait_until(lambda: stream.progress.received == 1, "the first chunk arrives")
    return stream


def test_finalize_checks_what_is_expected(client: certiq.Client, source: Source) -> None:
    calibration = create(client, N)
    failed = refusal(calibration.finalize)
    assert (failed.code, kinds(failed)) == (PRECONDITION, ["TOKENS"])
    live = stream_of(calibration, source)
    failed = refusal(lambda: calibration.finalize(expected_streams=["rank-0"]))
    assert (failed.code, kinds(failed)) == (PRECONDITION, ["STREAM"])
    live.send(source.x[:32])
    wait_until(lambda: live.progress.received == 1, "the first chunk arrives")
    for tokens, streams, kind in (
        (31, [], "TOKENS"),
        (33, ["rank-0"], "TOKENS"),
        (32, ["rank-0"], "STREAM"),
        (None, ["rank-0"], "STREAM"),
        (32, ["rank-1"], "STREAM"),
    ):
        failed = refusal(
            lambda t=tokens, s=streams: calibration.finalize(expected_tokens=t, expected_streams=s)
        )
        assert (failed.code, kinds(failed)) == (PRECONDITION, [kind])
    assert not calibration.refresh().finalized
    live.close()
    done = calibration.finalize(expected_tokens=32, expected_streams=["rank-0"])
    assert (done.finalized, done.tokens) == (True, 32)


def test_finalizing_freezes(client: certiq.Client, source: Source) -> None:
    calibration = create(client, N)
    assert calibration.refresh().info.sums_sha256 == ""
    live = begun(calibration, source)
    # Not expected to have ended: it is closed.
    first = calibration.finalize().info
    assert refusal(live.close).code == PRECONDITION
    assert first.state == calibration_pb2.CALIBRATION_STATE_FINALIZED
    assert (first.tokens, len(first.sums_sha256)) == (32, 64)
    assert first.HasField("finalize_time")
    assert not first.streams[0].live
    assert refusal(lambda: fill(calibration, source)).code == PRECONDITION
    imported = refusal(lambda: Sums.of(source.x).import_into(calibration, "i"))
    assert imported.code == PRECONDITION
    again = calibration.finalize(expected_tokens=32, expected_streams=["rank-0"]).info
    assert again == first == calibration.refresh().info
    assert refusal(lambda: calibration.finalize(expected_tokens=33)).code == PRECONDITION
    Sums.exported(calibration).assert_equals(Sums.of(source.x[:32]))


def test_the_digest_is_of_the_sums(client: certiq.Client, source: Source) -> None:
    """Rows that came in other chunks give the same integers, and so the same digest."""

    def digest(rows: Source) -> str:
        calibration = create(client, N)
        fill(calibration, rows)
        return calibration.finalize().info.sums_sha256

    digests = {digest(Source(source.stream_id, source.x, None, rows)) for rows in (100, 32, 1)}
    assert len(digests) == 1
    assert digest(Source(source.stream_id, source.x + 1)) not in digests


def test_request_ids(client: certiq.Client, random: np.random.Generator) -> None:
    once = {"request_id": "once", "labels": ["x"]}
    first = create(client, N, **once)
    assert create(client, N, **once).info == first.info
    for different in ({"labels": ["y"]}, {"held_out_fraction": 0.1}):
        failed = refusal(lambda d=different: create(client, N, **once | d))
        assert failed.code == grpc.StatusCode.ALREADY_EXISTS
        assert first.id in failed.message
    # As it is now, not as it was.
    fill(first, made_up(random, "s", 10, N))
    assert create(client, N, **once).tokens == 10
    assert create(client, N, request_id="").id != create(client, N, request_id="").id
    first.delete()
    assert create(client, N, **once).id != first.id


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
    calls: Calls, field: str, request_fields: dict[str, object]
) -> None:
    request = calibration_pb2.CreateCalibrationRequest(**{"features": N} | request_fields)
    failed = refusal(lambda: calls.calibrations.CreateCalibration(request, timeout=60))
    assert (failed.code, list(fields(failed))) == (INVALID, [field])


def test_labels_and_pages(client: certiq.Client, calls: Calls) -> None:
    made = [create(client, N, labels=["page", f"n{i % 2}"]) for i in range(7)]
    newest_first = [calibration.id for calibration in made[::-1]]

    def found(size: int, label: str) -> list[str]:
        return [c.id for c in client.calibrations(label=label, page_size=size)]

    for size in (0, 1, 2, 3, 7, 1000, 5000):
        assert found(size, "page") == newest_first, size
    assert found(2, "n1") == newest_first[1::2]
    assert found(0, "none such") == []

    def page(size: int, token: str = "") -> calibration_pb2.ListCalibrationsResponse:
        request = calibration_pb2.ListCalibrationsRequest(
            page_size=size, page_token=token, label="page"
        )
        return calls.calibrations.ListCalibrations(request, timeout=60)

    whole = page(7)
    assert whole.next_page_token == ""
    assert all(not c.streams for c in whole.calibrations)
    # What comes and goes between two pages shifts nothing.
    first = page(3)
    made[-3].delete()
    create(client, N, labels=["page"])
    assert [c.id for c in page(3, first.next_page_token).calibrations] == newest_first[3:6]
    for token in ("garbage", "1", "1.", "x.cal-1", "." * 1000):
        failed = refusal(lambda t=token: page(3, t))
        assert (failed.code, list(fields(failed))) == (INVALID, ["page_token"]), token
    failed = refusal(lambda: page(-1))
    assert (failed.code, list(fields(failed))) == (INVALID, ["page_size"])


def test_deleting_ends_live_streams(client: certiq.Client, source: Source) -> None:
    calibration = create(client, N)
    live = begun(calibration, source)
    calibration.delete()
    assert refusal(live.close).code == NOT_FOUND
    for call in (calibration.refresh, calibration.delete, lambda: fill(calibration, source)):
        assert refusal(call).code == NOT_FOUND


def test_what_nobody_touches_expires(client: certiq.Client, source: Source) -> None:
    made = create(client, N, ttl=1)
    times = made.info.expire_time.ToNanoseconds(), made.info.create_time.ToNanoseconds()
    assert times[0] - times[1] == 10**9
    live = stream_of(made, source)
    other = create(client, N, ttl=1)

    def gone(calibration: certiq.Calibration) -> bool:
        return calibration.id not in [found.id for found in client.calibrations(page_size=1000)]

    wait_until(lambda: gone(other), "a calibration expires")
    assert refusal(other.refresh).code == NOT_FOUND
    # An open stream keeps it.
    assert not gone(made)
    live.send(source.x[:32])
    live.close()
    wait_until(lambda: gone(made), "a calibration expires once its streams have ended")
