"""What a server finds again when it starts, and what it says to files that were changed."""

import resource
from pathlib import Path

import grpc
import numpy as np
import pytest
from cluster import Client, JobRequest, refusal
from conftest import StartServer
from programs import Server, wait_until
from stubs import spec_pb2
from sums import Sums, made_up
from work import (
    CANCELLED,
    FAILED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    big_job,
    calibrated,
    small,
    wait_state,
)

DATA_LOSS = grpc.StatusCode.DATA_LOSS


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def start(start_server: StartServer, data: Path) -> StartServer:
    """Servers of one data directory, one after the other."""

    def begin(*flags: str) -> Server:
        return start_server("--data_dir", str(data), "--workers", "1", *flags)

    return begin


def tensors(data: Path) -> set[Path]:
    return set((data / "tensors").iterdir())


def flip(path: Path, where: float = 0.5) -> None:
    """One bit, somewhere in the file."""
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_queued_jobs_run_after_a_restart(start: StartServer, how: str) -> None:
    server = start("--drain_seconds", "0.1")
    client = Client.of(server)
    big, request = big_job(client), small(client)
    big.priority = -1
    blocker = client.create_job(big).id
    wait_state(client, blocker, RUNNING)
    jobs = []
    for number in range(4):
        request.request_id, request.priority = f"r-{number}", number
        jobs.append(client.create_job(request).id)
    watch = client.watch(jobs[0])
    assert next(watch).state == QUEUED
    if how == "stop":
        assert server.stop() == 0
    else:
        server.process.kill()
        server.wait()
    assert refusal(lambda: list(watch)).code == grpc.StatusCode.UNAVAILABLE

    client = Client.of(start())
    # What was asked for before is known again, whatever state it is in.
    request.request_id, request.priority = "r-2", 2
    assert client.create_job(request).id == jobs[2]
    request.priority = 1
    assert refusal(lambda: client.create_job(request)).code == grpc.StatusCode.ALREADY_EXISTS
    ended = [client.wait_job(job) for job in jobs]
    assert [job.state for job in ended] == [SUCCEEDED] * 4
    assert [job.starts for job in ended] == [1] * 4
    times = [job.start_time.ToNanoseconds() for job in ended]
    assert times == sorted(times, reverse=True)
    assert len({bytes(client.read(job).data) for job in jobs}) == 1
    # What ran begins again, after what is more urgent. A stop is no crash.
    wait_state(client, blocker, RUNNING)
    assert client.get_job(blocker).starts == (1 if how == "stop" else 2)
    client.cancel_job(blocker)
    assert client.wait_job(blocker).state == CANCELLED


def test_results_calibrations_and_lists_outlive_a_restart(start: StartServer) -> None:
    server = start()
    client = Client.of(server)
    requests = [small(client, seed=seed) for seed in range(3)]
    jobs = [client.wait_job(client.create_job(request).id) for request in requests]
    results = [client.read(job.id) for job in jobs]
    calibrations = client.list_calibrations()
    deleted = client.wait_job(client.create_job(requests[0]).id).id
    client.delete_job(deleted)
    assert server.stop() == 0

    client = Client.of(start())
    assert client.list_calibrations() == calibrations
    assert client.list_jobs() == jobs[::-1]
    for job, before in zip(jobs, results, strict=True):
        after = client.read(job.id)
        assert (after.data, after.timeless()) == (before.data, before.timeless())
        assert client.wait_job(job.id) == job
    # The same work on sums that were read back gives the same bytes.
    again = client.wait_job(client.create_job(requests[1]).id)
    assert client.read(again.id).data == results[1].data


def test_a_limit_on_file_sizes_is_a_full_disk(start: StartServer, data: Path) -> None:
    server = start()
    client = Client.of(server)
    request = small(client)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    large = JobRequest(request.calibration_id, np.ones((10000, 32), "<f4"))
    answer = refusal(lambda: client.create_job(large))
    assert answer.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert client.wait_job(client.create_job(request).id).state == SUCCEEDED
    assert list((data / "incoming").iterdir()) == []


def test_deleted_jobs_stay_deleted(start: StartServer, data: Path) -> None:
    server = start()
    client = Client.of(server)
    request = small(client, features=8, rows=1)
    for _ in range(100):
        job = client.create_job(request).id
        client.wait_job(job)
        client.delete_job(job)
    server.process.kill()
    server.wait()
    client = Client.of(start())
    assert client.list_jobs() == []
    client.delete(request.calibration_id)
    assert tensors(data) == set()


def test_a_data_directory_has_one_server(start: StartServer) -> None:
    start()
    with pytest.raises(AssertionError, match=r"in use|another|lock"):
        start()


@pytest.mark.parametrize("where", [0.0, 0.3, 0.999])
def test_a_changed_result(start: StartServer, data: Path, where: float) -> None:
    client = Client.of(start())
    request = small(client, features=64, rows=12000)
    before = tensors(data)
    job = client.wait_job(client.create_job(request).id)
    whole = client.read(job.id)
    (result,) = tensors(data) - before
    flip(result, where)
    part = bytearray()
    with pytest.raises(grpc.RpcError) as error:
        for frame in client.read_frames(job.id):
            part += frame.data.data
    assert error.value.code() == DATA_LOSS
    assert result.name in (error.value.details() or "")
    # What came before it was found is right, and short of it.
    assert part == whole.data[: len(part)]
    assert len(part) < len(whole.data) or where == 0.999
    # Nothing wrong with what needs none of the changed block.
    if where == 0.3:
        assert client.read(job.id, 2 << 20).data == whole.data[2 << 20 :]
    client.delete_job(job.id)
    assert tensors(data) == before


@pytest.mark.parametrize("how", ["short", "long", "gone"])
def test_a_result_of_another_size(start: StartServer, data: Path, how: str) -> None:
    client = Client.of(start())
    request = small(client)
    before = tensors(data)
    job = client.wait_job(client.create_job(request).id)
    (result,) = tensors(data) - before
    content = result.read_bytes()
    if how == "gone":
        result.unlink()
    else:
        result.write_bytes(content[:-1] if how == "short" else content + b"x")
    failed = refusal(lambda: client.read(job.id))
    assert failed.code == DATA_LOSS
    assert result.name in failed.message
    client.delete_job(job.id)
    assert tensors(data) == before


def test_changed_sums(start: StartServer, data: Path) -> None:
    server = start()
    client = Client.of(server)
    request = small(client)
    (sums,) = tensors(data)
    assert server.stop() == 0
    flip(sums)
    client = Client.of(start())
    failed = refusal(lambda: client.export(request.calibration_id))
    assert failed.code == DATA_LOSS
    assert sums.name in failed.message
    job = client.wait_job(client.create_job(request).id)
    assert job.state == FAILED
    assert job.error.code == DATA_LOSS.value[0]
    assert sums.name in job.error.message
    # Everything else works on.
    other = small(client, seed=2)
    assert client.wait_job(client.create_job(other).id).state == SUCCEEDED
    client.delete(request.calibration_id)
    assert not sums.exists()


def test_changed_sums_of_an_open_calibration(start: StartServer, data: Path) -> None:
    server = start()
    client = Client.of(server)
    source = made_up(np.random.default_rng(1), "rank-0", 64, 24)
    calibration = client.create(24).id
    client.accumulate(calibration, source)
    (sums,) = tensors(data)
    assert server.stop() == 0
    flip(sums)
    client = Client.of(start())
    more = made_up(np.random.default_rng(1), "rank-1", 64, 24)
    for call in (
        lambda: client.accumulate(calibration, more),
        lambda: client.import_sums(calibration, "i", Sums.of(source.x)),
        lambda: client.finalize(calibration),
        lambda: client.export(calibration),
    ):
        failed = refusal(call)
        assert failed.code == DATA_LOSS
        assert sums.name in failed.message


def test_changed_weights(start: StartServer, data: Path) -> None:
    client = Client.of(start())
    big, request = big_job(client), small(client)
    blocker = client.create_job(big).id
    wait_state(client, blocker, RUNNING)
    before = tensors(data)
    job = client.create_job(request).id
    (weights,) = tensors(data) - before
    flip(weights)
    assert client.get_job(job).state == QUEUED
    client.cancel_job(blocker)
    ended = client.wait_job(job)
    assert ended.state == FAILED
    assert ended.error.code == DATA_LOSS.value[0]
    assert weights.name in ended.error.message
    wait_until(lambda: not weights.exists(), "the weights are gone")


def test_jobs_share_factors(start: StartServer) -> None:
    server = start()
    client = Client.of(server)
    random = np.random.default_rng(5)
    calibration = calibrated(client, made_up(random, "rank-0", 256, 48))

    def count(result: str) -> float:
        return server.metrics().sum("certiq_factor_cache_total", result=result)

    def run(spec: spec_pb2.QuantizationSpec) -> None:
        W = random.standard_normal((16, 48)).astype("<f4")
        job = client.wait_job(client.create_job(JobRequest(calibration, W, spec)).id)
        assert job.state == SUCCEEDED

    for bits in (2, 3, 4):
        run(spec_pb2.QuantizationSpec(bits=bits))
    assert (count("hit"), count("miss")) == (2, 1)
    run(spec_pb2.QuantizationSpec(damping=spec_pb2.Damping(relative_trace=0.02)))
    assert (count("hit"), count("miss")) == (2, 2)
