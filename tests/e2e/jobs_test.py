"""Jobs from their creation to their end."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from cluster import Client, JobRequest, Pipe, refusal
from conftest import StartServer
from programs import Server, wait_until
from stubs import job_pb2, spec_pb2, tensor_pb2
from sums import made_up
from work import (
    CANCELLED,
    EXPIRED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    big_job,
    busy,
    calibrated,
    small,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
NOT_FOUND = grpc.StatusCode.NOT_FOUND


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("jobs")
    server = Server(folder, ["--data_dir", str(folder / "data"), "--workers", "1"])
    yield server
    assert server.stop() == 0, server.log()


@pytest.fixture
def client(one_worker: Server) -> Client:
    return Client.of(one_worker)


@pytest.fixture(scope="module")
def big(one_worker: Server) -> JobRequest:
    return big_job(Client.of(one_worker))


def test_a_job_from_begin_to_end(client: Client) -> None:
    request = small(client)
    request.request_id = "life"
    request.priority = 3
    made = client.create_job(request)
    assert made.state in (QUEUED, RUNNING, SUCCEEDED)
    done = client.wait_job(made.id)
    assert done == client.get_job(made.id)
    assert (done.state, done.starts, done.request_id) == (SUCCEEDED, 1, "life")
    assert (done.rows, done.features, done.priority) == (*request.W.shape, 3)
    assert (done.calibration_id, done.spec, done.layer_name) == (
        request.calibration_id,
        request.spec,
        "layer",
    )
    times = [done.create_time, done.start_time, done.end_time]
    assert sorted(times, key=lambda t: t.ToNanoseconds()) == times
    day = 24 * 3600 * 10**9
    assert done.expire_time.ToNanoseconds() - done.end_time.ToNanoseconds() == day
    assert not done.HasField("deadline_time")
    assert not done.HasField("error")

    result = client.read(made.id)
    certificate = result.certificate
    assert certificate is not None
    calibration = client.get(request.calibration_id)
    assert certificate.calibration_id == calibration.id
    assert certificate.sums_sha256 == calibration.sums_sha256
    assert certificate.weights_sha256 == hashlib.sha256(request.W.tobytes()).hexdigest()
    assert certificate.tokens == calibration.tokens
    assert (done.relative_error, done.lambda_used) == (
        certificate.relative_error,
        certificate.lambda_used,
    )
    assert done.result_bytes == len(result.data)
    again = client.read(made.id)
    assert (again.data, again.timeless()) == (result.data, result.timeless())

    client.delete_job(made.id)
    for call in (client.get_job, client.read, client.cancel_job, client.delete_job):
        assert refusal(lambda c=call: c(made.id)).code == NOT_FOUND
    assert refusal(lambda: list(client.watch(made.id))).code == NOT_FOUND


def test_watching(client: Client, big: JobRequest) -> None:
    request = small(client)
    with busy(client, big):
        job = client.create_job(request).id
        watch = client.watch(job)
        first = next(watch)
        assert (first.state, first.queue_position) == (QUEUED, 0)
    states = [first.state, *(now.state for now in watch)]
    assert states == sorted(states)
    # Slow readers may miss that it ran.
    assert set(states) - {RUNNING} == {QUEUED, SUCCEEDED}
    assert states.count(SUCCEEDED) == 1
    # Once it has ended there is one thing to say.
    (last,) = client.watch(job)
    assert last == client.get_job(job)


def test_a_running_job_tells_how_far_it_is(client: Client, big: JobRequest) -> None:
    with busy(client, big) as job:
        seen = set()
        for now in client.watch(job):
            assert now.state == RUNNING
            assert 0 <= now.fraction <= 1
            seen.add((now.phase, now.fraction))
            if len(seen) == 5:
                break
        assert len(seen) == 5


def test_priorities(client: Client, big: JobRequest) -> None:
    request = small(client)
    jobs = {}
    with busy(client, big):
        for name, priority in (("a", 0), ("b", 5), ("c", 0), ("d", -100), ("e", 5), ("f", 100)):
            request.priority = priority
            jobs[name] = client.create_job(request).id
        order = sorted(jobs, key=lambda name: client.get_job(jobs[name]).queue_position)
        assert "".join(order) == "fbeacd"
        assert [client.get_job(jobs[name]).queue_position for name in order] == list(range(6))
    ended = {name: client.wait_job(job) for name, job in jobs.items()}
    started = sorted(ended, key=lambda name: ended[name].start_time.ToNanoseconds())
    assert "".join(started) == "fbeacd"


def test_cancelling(client: Client, big: JobRequest) -> None:
    request = small(client)
    with busy(client, big) as blocker:
        job = client.create_job(request).id
        cancelled = client.cancel_job(job)
        assert cancelled.state == CANCELLED
        assert cancelled.error.code == grpc.StatusCode.CANCELLED.value[0]
        assert cancelled.starts == 0
        assert client.get_job(blocker).state == RUNNING
        assert client.cancel_job(blocker).state in (RUNNING, CANCELLED)
        assert client.wait_job(blocker).state == CANCELLED
    # What has ended stays as it is.
    assert client.cancel_job(job) == cancelled
    done = client.wait_job(client.create_job(request).id)
    assert client.cancel_job(done.id).state == SUCCEEDED
    failed = refusal(lambda: client.read(job))
    assert (failed.code, failed.preconditions) == (PRECONDITION, ["NOT_SUCCEEDED"])


def test_deadlines(client: Client, big: JobRequest) -> None:
    request = small(client)
    request.deadline = 0.3
    with busy(client, big):
        queued = client.create_job(request)
        assert queued.deadline_time.ToNanoseconds() - queued.create_time.ToNanoseconds() == 3e8
        ended = client.wait_job(queued.id)
        assert (ended.state, ended.starts) == (EXPIRED, 0)
        assert ended.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    running = JobRequest(big.calibration_id, big.W, big.spec, deadline=0.6)
    ended = client.wait_job(client.create_job(running).id)
    assert (ended.state, ended.starts) == (EXPIRED, 1)
    request.deadline = 3600
    assert client.wait_job(client.create_job(request).id).state == SUCCEEDED


def test_a_result_from_every_kind_of_offset(client: Client) -> None:
    random = np.random.default_rng(3)
    calibration = calibrated(client, made_up(random, "rank-0", 64, 48))
    W = random.standard_normal((11000, 48)).astype("<f4")
    spec = spec_pb2.QuantizationSpec(bits=4, symmetric=False, group_size=16)
    job = client.wait_job(client.create_job(JobRequest(calibration, W, spec)).id)
    whole = client.read(job.id)
    total = len(whole.data)
    assert total > 2 << 20
    offsets = {0, 1, 7, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, total - 1, total, total // 2 + 1}
    at = 0
    assert len(whole.tensors) == 4
    for tensor in whole.tensors.values():
        at += tensor.nbytes
        offsets |= {at - 1, at, at + 1} - {total + 1}
    for offset in offsets:
        part = client.read(job.id, offset)
        assert part.data == whole.data[offset:], offset
        assert part.timeless() == whole.timeless()
    for offset in (-1, total + 1, 1 << 62):
        failed = refusal(lambda o=offset: client.read(job.id, o))
        assert (failed.code, list(failed.fields)) == (INVALID, ["byte_offset"])


def test_what_is_in_use_cannot_be_deleted(client: Client, big: JobRequest) -> None:
    request = small(client)
    with busy(client, big) as blocker:
        job = client.create_job(request).id
        for found in (job, blocker):
            failed = refusal(lambda j=found: client.delete_job(j))
            assert (failed.code, failed.preconditions) == (PRECONDITION, ["NOT_ENDED"])
        assert client.get(request.calibration_id).jobs == 1
        failed = refusal(lambda: client.delete(request.calibration_id))
        assert (failed.code, failed.preconditions) == (PRECONDITION, ["IN_USE"])
        client.cancel_job(job)
        client.delete(request.calibration_id)
    failed = refusal(lambda: client.create_job(request))
    assert failed.code == NOT_FOUND
    # The job is still there, without it.
    assert client.get_job(job).state == CANCELLED


def test_what_has_ended_expires(client: Client, big: JobRequest) -> None:
    request = small(client)
    request.ttl = 1
    with busy(client, big):
        queued = client.create_job(request).id
        client.cancel_job(queued)
        waiting = client.create_job(request).id
        wait_until(lambda: not any(j.id == queued for j in client.list_jobs()), "it expires")
        # Its time begins with its end.
        assert client.get_job(waiting).state == QUEUED
        assert not client.get_job(waiting).HasField("expire_time")
    wait_until(lambda: not any(j.id == waiting for j in client.list_jobs()), "it expires")
    assert refusal(lambda: client.get_job(waiting)).code == NOT_FOUND


def test_request_ids(client: Client) -> None:
    request = small(client)
    request.request_id = "once"
    first = client.create_job(request).id
    assert client.create_job(request).id == first
    done = client.wait_job(first)
    assert client.create_job(request) == done
    other = JobRequest(request.calibration_id, request.W.copy(), request.spec, "once")
    other.W[3, 3] += 1
    assert refusal(lambda: client.create_job(other)).code == grpc.StatusCode.ALREADY_EXISTS
    other = JobRequest(request.calibration_id, request.W, request.spec, "once", priority=1)
    failed = refusal(lambda: client.create_job(other))
    assert failed.code == grpc.StatusCode.ALREADY_EXISTS
    assert first in failed.message
    client.delete_job(first)
    assert client.create_job(other).id != first


def test_lists(client: Client) -> None:
    request = small(client)
    made = [client.create_job(request).id for _ in range(5)][::-1]
    for job in made:
        client.wait_job(job)
    mine = {"calibration_id": request.calibration_id}
    for size in (0, 1, 2, 5, 1000):
        assert [job.id for job in client.list_jobs(size, **mine)] == made
        assert [job.id for job in client.list_jobs(size, [SUCCEEDED], **mine)] == made
    assert client.list_jobs(0, [QUEUED, RUNNING, CANCELLED], **mine) == []
    bad = job_pb2.ListJobsRequest(states=[99])
    failed = refusal(lambda: client.jobs.ListJobs(bad, timeout=60))
    assert (failed.code, list(failed.fields)) == (INVALID, ["states"])


def test_half_an_upload_leaves_no_trace(one_worker: Server, client: Client) -> None:
    request = small(client)
    pipe = Pipe()
    frames = request.frames()
    pipe.send(next(frames))
    pipe.send(
        job_pb2.CreateJobRequest(
            weight=tensor_pb2.TensorChunk(row_offset=0, data=request.W[:3].tobytes())
        )
    )
    incoming = one_worker.port_file.parent / "data" / "incoming"
    call = client.jobs.CreateJob.future(iter(pipe), timeout=60)
    wait_until(lambda: any(incoming.iterdir()), "the upload begins")
    assert client.get(request.calibration_id).jobs == 1
    call.cancel()
    pipe.close()
    wait_until(lambda: not any(incoming.iterdir()), "the upload is gone")
    wait_until(lambda: client.get(request.calibration_id).jobs == 0, "its calibration is free")
    assert client.list_jobs(calibration_id=request.calibration_id) == []


def test_a_calibration_must_be_ready(client: Client) -> None:
    request = small(client)
    still_open = client.create(32).id
    client.accumulate(still_open, made_up(np.random.default_rng(1), "rank-0", 64, 32))
    job = JobRequest(still_open, request.W)
    failed = refusal(lambda: client.create_job(job))
    assert (failed.code, failed.preconditions) == (PRECONDITION, ["NOT_FINALIZED"])
    job = JobRequest("cal-none", request.W)
    assert refusal(lambda: client.create_job(job)).code == NOT_FOUND
    request.spec.min_tokens = 129
    failed = refusal(lambda: client.create_job(request))
    assert (failed.code, failed.preconditions) == (PRECONDITION, ["TOKENS"])
    request.spec.min_tokens = 128
    assert client.wait_job(client.create_job(request).id).state == SUCCEEDED
    request.spec.damping.held_out.ladder[:] = [0.1]
    failed = refusal(lambda: client.create_job(request))
    assert (failed.code, failed.preconditions) == (PRECONDITION, ["HELD_OUT"])


def test_uploads_that_make_no_sense(client: Client) -> None:
    request = small(client, features=32, rows=4)
    header, weight = request.frames()

    def fields(*frames: job_pb2.CreateJobRequest) -> list[str]:
        failed = refusal(lambda: client.jobs.CreateJob(iter(frames), timeout=60))
        assert failed.code == INVALID
        return list(failed.fields)

    part = job_pb2.CreateJobRequest(
        weight=tensor_pb2.TensorChunk(row_offset=0, data=request.W[:3].tobytes())
    )
    bad = request.W.copy()
    bad[2, 9] = np.nan
    other = small(client, features=33, rows=4)
    assert fields() == ["header"]
    assert fields(weight) == ["header"]
    assert fields(header, header) == ["header"]
    assert fields(header, job_pb2.CreateJobRequest()) == ["payload"]
    assert fields(header) == ["weight"]
    assert fields(header, part) == ["weight"]
    assert fields(header, part, part) == ["weight.row_offset"]
    assert fields(header, weight, weight) != []
    assert fields(*JobRequest(request.calibration_id, bad).frames()) == ["weight.data"]
    assert fields(*JobRequest(request.calibration_id, other.W).frames()) == ["weight.shape"]
    assert fields(*JobRequest("", other.W).frames()) == ["calibration_id"]
    for priority in (-101, 101):
        wrong = JobRequest(request.calibration_id, request.W, priority=priority)
        assert fields(*wrong.frames()) == ["priority"]
    assert client.list_jobs(calibration_id=request.calibration_id) == []
    assert client.get(request.calibration_id).jobs == 0


def test_a_deleted_job_stays_deleted(client: Client, one_worker: Server) -> None:
    """Deleted in the moment it ends, while its end is still being written down."""
    request = small(client, features=8, rows=1)
    ended = one_worker.metrics().sum("certiq_jobs_total")
    for _ in range(200):
        job = client.create_job(request).id
        client.wait_job(job)
        client.delete_job(job)
    assert client.list_jobs(calibration_id=request.calibration_id) == []

    def counted() -> float:
        return one_worker.metrics().sum("certiq_jobs_total") - ended

    wait_until(lambda: counted() >= 200, "the jobs are counted")
    assert counted() == 200


def test_a_seen_end_frees_what_was_held(start_server: StartServer, tmp_path: Path) -> None:
    """Who sees a job's end may delete its calibration, or use its place, at once."""
    client = Client.of(start_server("--data_dir", str(tmp_path / "data"), "--workers", "2"))
    for seed in range(20):
        # Weights that take a moment to delete.
        request = small(client, features=32, rows=20000, seed=seed)
        job = client.wait_job(client.create_job(request).id)
        client.delete(request.calibration_id)
        client.delete_job(job.id)
