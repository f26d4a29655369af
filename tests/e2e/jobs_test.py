"""Jobs from their creation to their end."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import certiq
import grpc
import numpy as np
import pytest
from conftest import StartServer
from programs import Server, wait_until
from raw import Calls, Pipe, fields, job_frames, kinds, read_result, refusal, timeless
from stubs import job_pb2, tensor_pb2
from sums import made_up
from work import Request, big_job, busy, calibrated, client_of, create, fill, small

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
def client(one_worker: Server) -> certiq.Client:
    return client_of(one_worker)


@pytest.fixture
def calls(one_worker: Server) -> Calls:
    return Calls(one_worker)


@pytest.fixture(scope="module")
def big(one_worker: Server) -> Request:
    return big_job(client_of(one_worker))


def ids(client: certiq.Client, calibration: certiq.Calibration, **options: object) -> list[str]:
    """The jobs of a calibration, as a list shows them."""
    return [job.id for job in client.jobs(calibration=calibration, **options)]


def test_a_job_from_begin_to_end(client: certiq.Client, calls: Calls) -> None:
    request = small(client)
    calibration, weight = request["calibration"], request["weight"]
    job = client.submit(**request, name="layer", request_id="life", priority=3)
    assert job.state in ("queued", "running", "succeeded")
    done = job.wait().info
    assert done == job.refresh().info
    assert (job.state, done.starts, done.request_id) == ("succeeded", 1, "life")
    assert (done.rows, done.features, done.priority) == (*weight.shape, 3)
    assert (done.calibration_id, done.layer_name) == (calibration.id, "layer")
    assert done.spec == request["spec"].to_proto()
    times = [done.create_time, done.start_time, done.end_time]
    assert sorted(times, key=lambda t: t.ToNanoseconds()) == times
    day = 24 * 3600 * 10**9
    assert done.expire_time.ToNanoseconds() - done.end_time.ToNanoseconds() == day
    assert not done.HasField("deadline_time")
    assert not done.HasField("error")

    certificate = job.result().certificate
    calibration.refresh()
    assert certificate.calibration_id == calibration.id
    assert certificate.sums_sha256 == calibration.info.sums_sha256
    assert certificate.weights_sha256 == hashlib.sha256(weight.tobytes()).hexdigest()
    assert certificate.tokens == calibration.tokens
    assert (done.relative_error, done.lambda_used) == (
        certificate.relative_error,
        certificate.lambda_used,
    )
    first, again = read_result(calls, job), read_result(calls, job)
    assert done.result_bytes == len(first.data)
    assert (again.data, timeless(again.certificate)) == (first.data, timeless(first.certificate))

    job.delete()
    for call in (job.refresh, job.result, job.cancel, job.delete, job.wait):
        assert refusal(call).code == NOT_FOUND


def test_watching(client: certiq.Client, big: Request) -> None:
    request = small(client)
    with busy(client, big):
        job = client.submit(**request)
        watch = job.watch()
        first = next(watch)
        assert (first.state, first.info.queue_position) == ("queued", 0)
    states = [job_pb2.JOB_STATE_QUEUED, *(now.info.state for now in watch)]
    assert states == sorted(states)
    # Slow readers may miss that it ran.
    assert set(states) - {job_pb2.JOB_STATE_RUNNING} == {
        job_pb2.JOB_STATE_QUEUED,
        job_pb2.JOB_STATE_SUCCEEDED,
    }
    assert states.count(job_pb2.JOB_STATE_SUCCEEDED) == 1


def test_watching_what_has_ended(client: certiq.Client, calls: Calls) -> None:
    """There is one thing to say, and the call ends by itself."""
    job = client.submit(**small(client)).wait()
    (last,) = calls.jobs.WatchJob(job_pb2.WatchJobRequest(job_id=job.id), timeout=60)
    assert last.job == job.refresh().info


def test_a_running_job_tells_how_far_it_is(client: certiq.Client, big: Request) -> None:
    with busy(client, big) as job:
        seen = set()
        for now in job.watch():
            assert now.state == "running"
            assert 0 <= now.info.fraction <= 1
            seen.add((now.info.phase, now.info.fraction))
            if len(seen) == 5:
                break
        assert len(seen) == 5


def test_priorities(client: certiq.Client, big: Request) -> None:
    request = small(client)
    jobs = {}
    with busy(client, big):
        for name, priority in (("a", 0), ("b", 5), ("c", 0), ("d", -100), ("e", 5), ("f", 100)):
            jobs[name] = client.submit(**request, priority=priority)
        order = sorted(jobs, key=lambda name: jobs[name].refresh().info.queue_position)
        assert "".join(order) == "fbeacd"
        assert [jobs[name].info.queue_position for name in order] == list(range(6))
    started = sorted(jobs, key=lambda name: jobs[name].wait().info.start_time.ToNanoseconds())
    assert "".join(started) == "fbeacd"


def test_cancelling(client: certiq.Client, calls: Calls, big: Request) -> None:
    request = small(client)
    with busy(client, big) as blocker:
        job = client.submit(**request).cancel()
        assert job.state == "cancelled"
        assert job.error.code == grpc.StatusCode.CANCELLED
        assert job.info.starts == 0
        assert blocker.refresh().state == "running"
        assert blocker.cancel().state in ("running", "cancelled")
        assert blocker.wait().state == "cancelled"
    # What has ended stays as it is.
    ended = job.info
    assert job.cancel().info == ended
    assert client.submit(**request).wait().cancel().state == "succeeded"
    failed = refusal(lambda: read_result(calls, job))
    assert (failed.code, kinds(failed)) == (PRECONDITION, ["NOT_SUCCEEDED"])


def test_deadlines(client: certiq.Client, big: Request) -> None:
    request = small(client)
    with busy(client, big):
        queued = client.submit(**request, deadline=0.3)
        times = queued.info.deadline_time.ToNanoseconds(), queued.info.create_time.ToNanoseconds()
        assert times[0] - times[1] == 3e8
        assert (queued.wait().state, queued.info.starts) == ("expired", 0)
        assert queued.error.code == grpc.StatusCode.DEADLINE_EXCEEDED
    running = client.submit(**big, deadline=0.6).wait()
    assert (running.state, running.info.starts) == ("expired", 1)
    assert client.submit(**request, deadline=3600).wait().state == "succeeded"


def test_a_result_from_every_kind_of_offset(client: certiq.Client, calls: Calls) -> None:
    random = np.random.default_rng(3)
    calibration = calibrated(client, made_up(random, "rank-0", 64, 48))
    W = random.standard_normal((11000, 48)).astype("<f4")
    spec = certiq.Spec(bits=4, symmetric=False, group_size=16)
    job = client.submit(W, calibration=calibration, spec=spec)
    layer = job.result()
    whole = read_result(calls, job)
    total = len(whole.data)
    assert total > 2 << 20
    assert len(layer.tensors) == 4
    assert b"".join(tensor.tobytes() for tensor in layer.tensors.values()) == whole.data
    offsets = {0, 1, 7, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, total - 1, total, total // 2 + 1}
    at = 0
    for tensor in layer.tensors.values():
        at += tensor.nbytes
        offsets |= {at - 1, at, at + 1} - {total + 1}
    for offset in offsets:
        part = read_result(calls, job, offset)
        assert part.data == whole.data[offset:], offset
        assert timeless(part.certificate) == timeless(whole.certificate)
    for offset in (-1, total + 1, 1 << 62):
        failed = refusal(lambda o=offset: read_result(calls, job, o))
        assert (failed.code, list(fields(failed))) == (INVALID, ["byte_offset"])


def test_what_is_in_use_cannot_be_deleted(client: certiq.Client, big: Request) -> None:
    request = small(client)
    calibration = request["calibration"]
    with busy(client, big) as blocker:
        job = client.submit(**request)
        for found in (job, blocker):
            failed = refusal(found.delete)
            assert (failed.code, kinds(failed)) == (PRECONDITION, ["NOT_ENDED"])
        assert calibration.refresh().info.jobs == 1
        failed = refusal(calibration.delete)
        assert (failed.code, kinds(failed)) == (PRECONDITION, ["IN_USE"])
        job.cancel()
        calibration.delete()
    assert refusal(lambda: client.submit(**request)).code == NOT_FOUND
    # The job is still there, without it.
    assert job.refresh().state == "cancelled"


def test_what_has_ended_expires(client: certiq.Client, big: Request) -> None:
    request = small(client)

    def gone(job: certiq.Job) -> bool:
        return all(found.id != job.id for found in client.jobs())

    with busy(client, big):
        queued = client.submit(**request, ttl=1).cancel()
        waiting = client.submit(**request, ttl=1)
        wait_until(lambda: gone(queued), "it expires")
        # Its time begins with its end.
        assert waiting.refresh().state == "queued"
        assert not waiting.info.HasField("expire_time")
    wait_until(lambda: gone(waiting), "it expires")
    assert refusal(waiting.refresh).code == NOT_FOUND


def test_request_ids(client: certiq.Client) -> None:
    request = small(client) | {"request_id": "once"}
    first = client.submit(**request)
    assert client.submit(**request).id == first.id
    done = first.wait().info
    assert client.submit(**request).info == done
    other = request["weight"].copy()
    other[3, 3] += 1
    for different in ({"weight": other}, {"priority": 1}):
        failed = refusal(lambda d=different: client.submit(**request | d))
        assert failed.code == grpc.StatusCode.ALREADY_EXISTS
        assert first.id in failed.message
    first.delete()
    assert client.submit(**request, priority=1).id != first.id


def test_lists(client: certiq.Client, calls: Calls) -> None:
    request = small(client)
    made = [client.submit(**request).wait().id for _ in range(5)][::-1]
    calibration = request["calibration"]
    for size in (0, 1, 2, 5, 1000):
        assert ids(client, calibration, page_size=size) == made
        assert ids(client, calibration, page_size=size, states=["succeeded"]) == made
    assert ids(client, calibration, states=["queued", "running", "cancelled"]) == []
    bad = job_pb2.ListJobsRequest(states=[99])
    failed = refusal(lambda: calls.jobs.ListJobs(bad, timeout=60))
    assert (failed.code, list(fields(failed))) == (INVALID, ["states"])


def header_of(request: Request, **changes: object) -> job_pb2.CreateJobHeader:
    """The header of a job to be sent frame by frame."""
    known = {"spec": request["spec"].to_proto(), "calibration_id": request["calibration"].id}
    return job_pb2.CreateJobHeader(**known | changes)


def rows_message(weight: np.ndarray) -> job_pb2.CreateJobRequest:
    return job_pb2.CreateJobRequest(
        weight=tensor_pb2.TensorChunk(row_offset=0, data=weight.tobytes())
    )


def test_half_an_upload_leaves_no_trace(
    one_worker: Server, client: certiq.Client, calls: Calls
) -> None:
    request = small(client)
    calibration = request["calibration"]
    pipe = Pipe()
    pipe.send(next(job_frames(header_of(request), request["weight"])))
    pipe.send(rows_message(request["weight"][:3]))
    incoming = one_worker.port_file.parent / "data" / "incoming"
    call = calls.jobs.CreateJob.future(iter(pipe), timeout=60)
    wait_until(lambda: any(incoming.iterdir()), "the upload begins")
    assert calibration.refresh().info.jobs == 1
    call.cancel()
    pipe.close()
    wait_until(lambda: not any(incoming.iterdir()), "the upload is gone")
    wait_until(lambda: calibration.refresh().info.jobs == 0, "its calibration is free")
    assert ids(client, calibration) == []


def test_a_calibration_must_be_ready(client: certiq.Client) -> None:
    request = small(client)
    weight, calibration = request["weight"], request["calibration"]

    def failed(calibration: certiq.Calibration | str, **spec: object) -> certiq.Error:
        bits = certiq.Spec(bits=4, **spec)
        return refusal(lambda: client.submit(weight, calibration=calibration, spec=bits))

    still_open = create(client, 32)
    fill(still_open, made_up(np.random.default_rng(1), "rank-0", 64, 32))
    assert failed("cal-none").code == NOT_FOUND
    for error, kind in (
        (failed(still_open), "NOT_FINALIZED"),
        (failed(calibration, min_tokens=129), "TOKENS"),
        (failed(calibration, min_tokens=128, damping="held_out:0.1"), "HELD_OUT"),
    ):
        assert (error.code, kinds(error)) == (PRECONDITION, [kind])
    spec = certiq.Spec(bits=4, min_tokens=128)
    job = client.submit(weight, calibration=calibration, spec=spec)
    assert job.wait().state == "succeeded"


def test_uploads_that_make_no_sense(client: certiq.Client, calls: Calls) -> None:
    request = small(client, features=32, rows=4)
    W = request["weight"]
    header, weight = job_frames(header_of(request), W)

    def refused(*frames: job_pb2.CreateJobRequest) -> list[str]:
        failed = refusal(lambda: calls.jobs.CreateJob(iter(frames), timeout=60))
        assert failed.code == INVALID
        return list(fields(failed))

    part = rows_message(W[:3])
    bad, wide = W.copy(), np.ones((4, 33), "<f4")
    bad[2, 9] = np.nan
    assert refused() == ["header"]
    assert refused(weight) == ["header"]
    assert refused(header, header) == ["header"]
    assert refused(header, job_pb2.CreateJobRequest()) == ["payload"]
    assert refused(header) == ["weight"]
    assert refused(header, part) == ["weight"]
    assert refused(header, part, part) == ["weight.row_offset"]
    assert refused(header, weight, weight) != []
    assert refused(*job_frames(header_of(request), bad)) == ["weight.data"]
    assert refused(*job_frames(header_of(request), wide)) == ["weight.shape"]
    nowhere = header_of(request, calibration_id="")
    assert refused(*job_frames(nowhere, wide)) == ["calibration_id"]
    for priority in (-101, 101):
        assert refused(*job_frames(header_of(request, priority=priority), W)) == ["priority"]
    assert ids(client, request["calibration"]) == []
    assert request["calibration"].refresh().info.jobs == 0


def test_a_deleted_job_stays_deleted(client: certiq.Client, one_worker: Server) -> None:
    """Deleted in the moment it ends, while its end is still being written down."""
    request = small(client, features=8, rows=1)
    ended = one_worker.metrics().sum("certiq_jobs_total")
    for _ in range(200):
        client.submit(**request).wait().delete()
    assert ids(client, request["calibration"]) == []

    def counted() -> float:
        return one_worker.metrics().sum("certiq_jobs_total") - ended

    wait_until(lambda: counted() >= 200, "the jobs are counted")
    assert counted() == 200


def test_a_seen_end_frees_what_was_held(start_server: StartServer, tmp_path: Path) -> None:
    """Who sees a job's end may delete its calibration, or use its place, at once."""
    client = client_of(start_server("--data_dir", str(tmp_path / "data"), "--workers", "2"))
    for seed in range(20):
        # Weights that take a moment to delete.
        request = small(client, features=32, rows=20000, seed=seed)
        job = client.submit(**request).wait()
        request["calibration"].delete()
        job.delete()
