"""Limits of the server and of tenants, and what tenants see of each other."""

from collections.abc import Callable
from pathlib import Path

import certiq
import grpc
import numpy as np
import pytest
from conftest import StartServer
from programs import Server, wait_until
from raw import refusal
from sums import Sums, made_up
from work import big_job, busy, calibrated, client_of, create, fill, small, stream_of

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
NOT_FOUND = grpc.StatusCode.NOT_FOUND
ALICE, BOB, READER = "alice-token-0123456789", "bob-token-0123456789", "reader-token-0123456789"


def exhausted(call: Callable[[], object]) -> None:
    failed = refusal(call)
    assert failed.code == EXHAUSTED, failed
    assert failed.retry_delay is not None, failed
    assert failed.retry_delay > 0


def never_fits(call: Callable[[], object]) -> None:
    """No RetryInfo: whoever waits for room waits for ever."""
    failed = refusal(call)
    assert failed.code == EXHAUSTED, failed
    assert "cannot fit, however long you wait" in failed.message
    assert failed.retry_delay is None, failed


def use_up(client: certiq.Client, features: int) -> list[certiq.Calibration]:
    """Calibrations until there is no room for more."""
    made = []
    for _ in range(100):
        try:
            made.append(create(client, features))
        except certiq.ResourceExhausted:
            exhausted(lambda: create(client, features))
            return made
    raise AssertionError("there is room for 100")


def test_a_full_queue(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(
        *("--data_dir", str(tmp_path / "data"), "--workers", "1", "--queue_limit", "2")
    )
    client = client_of(server)
    request = small(client)
    with busy(client, big_job(client)):
        queued = [client.submit(**request) for _ in range(2)]
        exhausted(lambda: client.submit(**request))
        assert queued[0].cancel().state == "cancelled"
        queued[0] = client.submit(**request)
        exhausted(lambda: client.submit(**request))
    assert {job.wait().state for job in queued} == {"succeeded"}
    assert server.metrics().sum("certiq_rejected_total", reason="queue_full") == 2


def test_a_memory_budget(start_server: StartServer) -> None:
    server = start_server("--memory_budget_bytes", str(16 << 20))
    client = client_of(server)
    # Sums of 2048 features take 32 MiB.
    never_fits(lambda: create(client, 2048))
    # A few small ones fit, of 1 MiB and more.
    made = use_up(client, 512)
    assert 1 <= len(made) <= 16
    made.pop().delete()
    made.append(create(client, 512))
    # A job that would never fit is refused at once.
    for calibration in made:
        calibration.delete()
    request = small(client)
    never_fits(lambda: client.submit(**request | {"weight": np.zeros((1 << 17, 32), "<f4")}))
    assert client.submit(**request).wait().state == "succeeded"
    assert server.metrics().sum("certiq_rejected_total", reason="over_budget") > 0


def test_a_disk_budget(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(
        *("--data_dir", str(tmp_path / "data"), "--disk_budget_bytes", str(10 << 20))
    )
    client = client_of(server)
    never_fits(lambda: create(client, 2048))
    request = small(client, rows=20000)
    first, second = (client.submit(**request).wait() for _ in range(2))
    # Results stay, and take their space.
    exhausted(lambda: client.submit(**request))
    first.delete()
    third = client.submit(**request).wait()
    assert third.state == "succeeded"
    found = third.result().tensors["weight"].tobytes()
    assert found == second.result().tensors["weight"].tobytes()


@pytest.fixture
def tenants(start_server: StartServer, tmp_path: Path) -> Server:
    tokens = tmp_path / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text(
        f"{ALICE} alice read,write jobs=2 streams=2 memory_bytes={32 << 20} "
        f"disk_bytes={64 << 20}\n"
        f"{BOB} bob read,write\n{READER} alice read jobs=2 streams=2 memory_bytes={32 << 20} "
        f"disk_bytes={64 << 20}\n"
    )
    data = str(tmp_path / "data")
    return start_server("--token_file", str(tokens), "--data_dir", data, "--workers", "1")


def test_tenants_do_not_see_each_other(tenants: Server) -> None:
    alice, bob = client_of(tenants, ALICE), client_of(tenants, BOB)
    request = small(alice) | {"request_id": "mine"}
    job = alice.submit(**request).wait()
    # His words for what is hers.
    calibration, theirs = create(bob, 32), bob.submit(**small(bob)).wait()
    calibration.info.id, theirs.info.id = request["calibration"].id, job.id
    source = made_up(np.random.default_rng(1), "rank-9", 10, 32)
    for call in (
        calibration.refresh,
        calibration.export_statistics,
        calibration.finalize,
        calibration.delete,
        lambda: fill(calibration, source),
        lambda: Sums.of(source.x).import_into(calibration, "i"),
        lambda: bob.submit(**request),
        theirs.refresh,
        theirs.wait,
        theirs.result,
        theirs.cancel,
        theirs.delete,
    ):
        assert refusal(call).code == NOT_FOUND
    assert job.id not in {found.id for found in bob.jobs()}
    assert request["calibration"].id not in {found.id for found in bob.calibrations()}
    assert [found.info for found in alice.jobs()] == [job.info]
    # The same words of another tenant are another request.
    assert bob.submit(**small(bob), request_id="mine").id != job.id
    assert alice.submit(**request).id == job.id


def test_readers_only_read(tenants: Server) -> None:
    alice, reader = client_of(tenants, ALICE), client_of(tenants, READER)
    request = small(alice)
    job = alice.submit(**request).wait()
    calibration, same = reader.get_calibration(request["calibration"].id), reader.get_job(job.id)
    found = same.result().tensors["weight"].tobytes()
    assert found == job.result().tensors["weight"].tobytes()
    assert [one.info for one in reader.jobs()] == [job.info]
    assert same.wait().info == job.info
    assert calibration.tokens == Sums.exported(calibration).tokens
    source = made_up(np.random.default_rng(1), "rank-9", 10, 32)
    for call in (
        lambda: create(reader, 32),
        lambda: fill(calibration, source),
        lambda: Sums.of(source.x).import_into(calibration, "i"),
        calibration.finalize,
        calibration.delete,
        lambda: reader.submit(**request),
        same.cancel,
        same.delete,
    ):
        assert refusal(call).code == grpc.StatusCode.PERMISSION_DENIED
    for token in (None, "nobody-token-0123456789"):
        nobody = client_of(tenants, token)
        for call in (
            lambda c=nobody: list(c.jobs()),
            lambda c=nobody: list(c.calibrations()),
            lambda c=nobody: create(c, 3),
        ):
            assert refusal(call).code == grpc.StatusCode.UNAUTHENTICATED


def test_a_quota_of_jobs(tenants: Server) -> None:
    alice, bob = client_of(tenants, ALICE), client_of(tenants, BOB)
    request = small(alice)
    with busy(bob, big_job(bob)):
        jobs = [alice.submit(**request) for _ in range(2)]
        exhausted(lambda: alice.submit(**request))
        # It is hers alone.
        other = bob.submit(**small(bob))
        jobs[0].cancel()
        jobs[0] = alice.submit(**request)
    assert {job.wait().state for job in jobs} == {"succeeded"}
    assert other.wait().state == "succeeded"
    assert alice.submit(**request).wait().state == "succeeded"


def test_a_quota_of_streams(tenants: Server) -> None:
    alice, bob = client_of(tenants, ALICE), client_of(tenants, BOB)
    random = np.random.default_rng(1)
    sources = [made_up(random, f"rank-{rank}", 64, 16) for rank in range(3)]
    calibration = create(alice, 16)
    live = [stream_of(calibration, source) for source in sources[:2]]
    exhausted(lambda: fill(calibration, sources[2]))
    exhausted(lambda: Sums.of(sources[2].x).import_into(calibration, "i"))
    calibrated(bob, sources[2])
    live[0].close()
    fill(calibration, sources[2])
    # A call that breaks gives its place back too.
    live[1].abort()
    wait_until(
        lambda: not any(stream.live for stream in calibration.refresh().info.streams), "it is gone"
    )
    for source in sources:
        fill(calibration, source)
    assert calibration.refresh().tokens == 3 * 64


def test_quotas_of_memory_and_disk(tenants: Server) -> None:
    alice, bob = client_of(tenants, ALICE), client_of(tenants, BOB)
    never_fits(lambda: create(alice, 4096))
    create(bob, 4096).delete()
    # The upper triangle of 1400 features takes 7.5 MiB, and twice that on the disk.
    made = use_up(alice, 1400)
    assert 1 <= len(made) <= 4
    create(bob, 1400).delete()
    made[0].delete()
    create(alice, 1400)
