"""Limits of the server and of tenants, and what tenants see of each other."""

from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from cluster import Client, JobRequest, refusal
from conftest import StartServer
from programs import Server, wait_until
from raw import Failure
from sums import Sums, made_up
from work import CANCELLED, SUCCEEDED, big_job, busy, calibrated, small

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
NOT_FOUND = grpc.StatusCode.NOT_FOUND
ALICE, BOB, READER = "alice-token-0123456789", "bob-token-0123456789", "reader-token-0123456789"


def exhausted(call: Callable[[], object]) -> Failure:
    failed = refusal(call)
    assert failed.code == EXHAUSTED, failed
    assert failed.retry is not None, failed
    assert failed.retry.retry_delay.ToNanoseconds() > 0
    return failed


def never_fits(call: Callable[[], object]) -> None:
    """No RetryInfo: whoever waits for room waits for ever."""
    failed = refusal(call)
    assert failed.code == EXHAUSTED, failed
    assert "cannot fit, however long you wait" in failed.message
    assert failed.retry is None, failed


def fill(client: Client, features: int) -> list[str]:
    """Calibrations until there is no room for more."""
    made = []
    for _ in range(100):
        try:
            made.append(client.create(features).id)
        except grpc.RpcError:
            exhausted(lambda: client.create(features))
            return made
    raise AssertionError("there is room for 100")


def test_a_full_queue(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(
        *("--data_dir", str(tmp_path / "data"), "--workers", "1", "--queue_limit", "2")
    )
    client = Client.of(server)
    request = small(client)
    with busy(client, big_job(client)):
        queued = [client.create_job(request).id for _ in range(2)]
        exhausted(lambda: client.create_job(request))
        assert client.cancel_job(queued[0]).state == CANCELLED
        queued[0] = client.create_job(request).id
        exhausted(lambda: client.create_job(request))
    assert {client.wait_job(job).state for job in queued} == {SUCCEEDED}
    assert server.metrics().sum("certiq_rejected_total", reason="queue_full") == 2


def test_a_memory_budget(start_server: StartServer) -> None:
    server = start_server("--memory_budget_bytes", str(16 << 20))
    client = Client.of(server)
    # Sums of 2048 features take 32 MiB.
    never_fits(lambda: client.create(2048))
    # A few small ones fit, of 1 MiB and more.
    made = fill(client, 512)
    assert 1 <= len(made) <= 16
    client.delete(made.pop())
    made.append(client.create(512).id)
    # A job that would never fit is refused at once.
    for calibration in made:
        client.delete(calibration)
    request = small(client)
    W = np.zeros((1 << 17, 32), "<f4")
    never_fits(lambda: client.create_job(JobRequest(request.calibration_id, W)))
    assert client.wait_job(client.create_job(request).id).state == SUCCEEDED
    assert server.metrics().sum("certiq_rejected_total", reason="over_budget") > 0


def test_a_disk_budget(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(
        *("--data_dir", str(tmp_path / "data"), "--disk_budget_bytes", str(10 << 20))
    )
    client = Client.of(server)
    never_fits(lambda: client.create(2048))
    calibration = calibrated(client, made_up(np.random.default_rng(1), "rank-0", 64, 32))
    W = np.random.default_rng(1).standard_normal((20000, 32)).astype("<f4")
    request = JobRequest(calibration, W)
    first = client.wait_job(client.create_job(request).id).id
    second = client.wait_job(client.create_job(request).id).id
    # Results stay, and take their space.
    exhausted(lambda: client.create_job(request))
    client.delete_job(first)
    third = client.create_job(request).id
    assert client.wait_job(third).state == SUCCEEDED
    assert client.read(third).data == client.read(second).data


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
    alice, bob = Client.of(tenants, ALICE), Client.of(tenants, BOB)
    request = small(alice)
    request.request_id = "mine"
    job = alice.wait_job(alice.create_job(request).id)
    calibration = request.calibration_id
    source = made_up(np.random.default_rng(1), "rank-9", 10, 32)
    for call in (
        lambda: bob.get(calibration),
        lambda: bob.export(calibration),
        lambda: bob.finalize(calibration),
        lambda: bob.delete(calibration),
        lambda: bob.accumulate(calibration, source),
        lambda: bob.import_sums(calibration, "i", Sums.of(source.x)),
        lambda: bob.create_job(request),
        lambda: bob.get_job(job.id),
        lambda: bob.wait_job(job.id),
        lambda: bob.read(job.id),
        lambda: bob.cancel_job(job.id),
        lambda: bob.delete_job(job.id),
    ):
        assert refusal(call).code == NOT_FOUND
    assert bob.list_jobs() == bob.list_calibrations() == []
    assert alice.list_jobs() == [job]
    # The same words of another tenant are another request.
    own = small(bob)
    own.request_id = "mine"
    assert bob.create_job(own).id != job.id
    assert alice.create_job(request).id == job.id


def test_readers_only_read(tenants: Server) -> None:
    alice, reader = Client.of(tenants, ALICE), Client.of(tenants, READER)
    request = small(alice)
    job = alice.wait_job(alice.create_job(request).id)
    assert reader.read(job.id).data == alice.read(job.id).data
    assert reader.list_jobs() == [job]
    assert reader.wait_job(job.id) == job
    assert reader.get(request.calibration_id).tokens == reader.export(request.calibration_id).tokens
    source = made_up(np.random.default_rng(1), "rank-9", 10, 32)
    for call in (
        lambda: reader.create(32),
        lambda: reader.accumulate(request.calibration_id, source),
        lambda: reader.import_sums(request.calibration_id, "i", Sums.of(source.x)),
        lambda: reader.finalize(request.calibration_id),
        lambda: reader.delete(request.calibration_id),
        lambda: reader.create_job(request),
        lambda: reader.cancel_job(job.id),
        lambda: reader.delete_job(job.id),
    ):
        assert refusal(call).code == grpc.StatusCode.PERMISSION_DENIED
    for token in ("", "nobody-token-0123456789"):
        nobody = Client.of(tenants, token)
        for call in (nobody.list_jobs, nobody.list_calibrations, lambda c=nobody: c.create(3)):
            assert refusal(call).code == grpc.StatusCode.UNAUTHENTICATED


def test_a_quota_of_jobs(tenants: Server) -> None:
    alice, bob = Client.of(tenants, ALICE), Client.of(tenants, BOB)
    request = small(alice)
    with busy(bob, big_job(bob)):
        jobs = [alice.create_job(request).id for _ in range(2)]
        exhausted(lambda: alice.create_job(request))
        # It is hers alone.
        other = bob.create_job(small(bob)).id
        alice.cancel_job(jobs[0])
        jobs[0] = alice.create_job(request).id
    assert {alice.wait_job(job).state for job in jobs} == {SUCCEEDED}
    assert bob.wait_job(other).state == SUCCEEDED
    assert alice.wait_job(alice.create_job(request).id).state == SUCCEEDED


def test_a_quota_of_streams(tenants: Server) -> None:
    alice, bob = Client.of(tenants, ALICE), Client.of(tenants, BOB)
    random = np.random.default_rng(1)
    sources = [made_up(random, f"rank-{rank}", 64, 16) for rank in range(3)]
    calibration = alice.create(16).id
    live = [alice.open(calibration, source) for source in sources[:2]]
    for call in live:
        call.next()
    exhausted(lambda: alice.accumulate(calibration, sources[2]))
    exhausted(lambda: alice.import_sums(calibration, "i", Sums.of(sources[2].x)))
    calibrated(bob, sources[2])
    live[0].finish()
    alice.accumulate(calibration, sources[2])
    # A call that breaks gives its place back too.
    live[1].cancel()
    wait_until(
        lambda: not any(stream.live for stream in alice.get(calibration).streams), "it is gone"
    )
    for source in sources:
        alice.accumulate(calibration, source)
    assert alice.get(calibration).tokens == 3 * 64


def test_quotas_of_memory_and_disk(tenants: Server) -> None:
    alice, bob = Client.of(tenants, ALICE), Client.of(tenants, BOB)
    never_fits(lambda: alice.create(4096))
    bob.delete(bob.create(4096).id)
    # The upper triangle of 1400 features takes 7.5 MiB, and twice that on the disk.
    made = fill(alice, 1400)
    assert 1 <= len(made) <= 4
    bob.delete(bob.create(1400).id)
    alice.delete(made[0])
    alice.create(1400)
