"""Restarts: a server finds everything again, and says which files were changed."""

import resource
from pathlib import Path

import certiq
import grpc
import numpy as np
import pytest
from conftest import StartServer
from programs import PATIENCE_SECONDS, Server, wait_until
from raw import Calls, StoredResult, read_result, refusal, timeless
from stubs import job_pb2
from sums import Sums, made_up
from work import big_job, calibrated, client_of, create, fill, small, wait_state

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
    client = client_of(server)
    request = small(client)
    blocker = client.submit(**big_job(client), priority=-1)
    wait_state(blocker, "running")
    jobs = [client.submit(**request, request_id=f"r-{n}", priority=n) for n in range(4)]
    watch = jobs[0].watch()
    assert next(watch).state == "queued"
    if how == "stop":
        assert server.stop() == 0
    else:
        server.process.kill()
        server.wait()
    assert refusal(lambda: list(watch)).code == grpc.StatusCode.UNAVAILABLE

    client = client_of(start())
    # What was asked for before is known again, whatever state it is in.
    assert client.submit(**request, request_id="r-2", priority=2).id == jobs[2].id
    failed = refusal(lambda: client.submit(**request, request_id="r-2", priority=1))
    assert failed.code == grpc.StatusCode.ALREADY_EXISTS
    ended = [client.get_job(job.id).wait() for job in jobs]
    assert [job.state for job in ended] == ["succeeded"] * 4
    assert [job.info.starts for job in ended] == [1] * 4
    times = [job.info.start_time.ToNanoseconds() for job in ended]
    assert times == sorted(times, reverse=True)
    assert len({job.result().tensors["weight"].tobytes() for job in ended}) == 1
    # What ran begins again, after what is more urgent. A stop is no crash.
    blocker = client.get_job(blocker.id)
    wait_state(blocker, "running")
    assert blocker.info.starts == (1 if how == "stop" else 2)
    assert blocker.cancel().wait().state == "cancelled"


def test_results_calibrations_and_lists_outlive_a_restart(start: StartServer) -> None:
    server = start()
    client, calls = client_of(server), Calls(server)
    requests = [small(client, seed=seed) for seed in range(3)]
    jobs = [client.submit(**request).wait() for request in requests]
    results = [read_result(calls, job) for job in jobs]
    calibrations = [calibration.info for calibration in client.calibrations()]
    client.submit(**requests[0]).wait().delete()
    assert server.stop() == 0

    server = start()
    client, calls = client_of(server), Calls(server)
    assert [calibration.info for calibration in client.calibrations()] == calibrations
    assert [job.info for job in client.jobs()] == [job.info for job in jobs[::-1]]
    for job, before in zip(jobs, results, strict=True):
        after = read_result(calls, job)
        assert after.data == before.data
        assert timeless(after.certificate) == timeless(before.certificate)
        assert client.get_job(job.id).wait().info == job.info
    # The same work on sums that were read back gives the same bytes.
    requests[1]["calibration"] = requests[1]["calibration"].id
    again = client.submit(**requests[1]).wait()
    assert read_result(calls, again).data == results[1].data


def test_a_limit_on_file_sizes_is_a_full_disk(start: StartServer, data: Path) -> None:
    server = start()
    client = client_of(server)
    request = small(client)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    large = request | {"weight": np.ones((10000, 32), "<f4")}
    answer = refusal(lambda: client.submit(**large))
    assert answer.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert client.submit(**request).wait().state == "succeeded"
    assert list((data / "incoming").iterdir()) == []


def test_deleted_jobs_stay_deleted(start: StartServer, data: Path) -> None:
    server = start()
    client = client_of(server)
    request = small(client, features=8, rows=1)
    for _ in range(100):
        client.submit(**request).wait().delete()
    server.process.kill()
    server.wait()
    client = client_of(start())
    assert list(client.jobs()) == []
    client.get_calibration(request["calibration"].id).delete()
    assert tensors(data) == set()


def test_a_data_directory_has_one_server(start: StartServer) -> None:
    start()
    with pytest.raises(AssertionError, match=r"in use|another|lock"):
        start()


@pytest.mark.parametrize("where", [0.0, 0.3, 0.999])
def test_a_changed_result(start: StartServer, data: Path, where: float) -> None:
    server = start()
    client, calls = client_of(server), Calls(server)
    request = small(client, features=64, rows=12000)
    before = tensors(data)
    job = client.submit(**request).wait()
    whole = read_result(calls, job)
    (result,) = tensors(data) - before
    flip(result, where)
    part = StoredResult()
    wanted = job_pb2.ReadResultRequest(job_id=job.id)
    failed = refusal(lambda: part.take(calls.jobs.ReadResult(wanted, timeout=PATIENCE_SECONDS)))
    assert failed.code == DATA_LOSS
    assert result.name in failed.message
    # What came before it was found is right, and short of it.
    assert part.data == whole.data[: len(part.data)]
    assert len(part.data) < len(whole.data) or where == 0.999
    # Nothing wrong with what needs none of the changed block.
    if where == 0.3:
        assert read_result(calls, job, 2 << 20).data == whole.data[2 << 20 :]
    job.delete()
    assert tensors(data) == before


@pytest.mark.parametrize("how", ["short", "long", "gone"])
def test_a_result_of_another_size(start: StartServer, data: Path, how: str) -> None:
    client = client_of(start())
    request = small(client)
    before = tensors(data)
    job = client.submit(**request).wait()
    (result,) = tensors(data) - before
    content = result.read_bytes()
    if how == "gone":
        result.unlink()
    else:
        result.write_bytes(content[:-1] if how == "short" else content + b"x")
    failed = refusal(job.result)
    assert failed.code == DATA_LOSS
    assert result.name in failed.message
    job.delete()
    assert tensors(data) == before


def test_changed_sums(start: StartServer, data: Path) -> None:
    server = start()
    request = small(client_of(server))
    (sums,) = tensors(data)
    assert server.stop() == 0
    flip(sums)
    client = client_of(start())
    calibration = client.get_calibration(request["calibration"].id)
    request["calibration"] = calibration
    failed = refusal(calibration.export_statistics)
    assert failed.code == DATA_LOSS
    assert sums.name in failed.message
    job = client.submit(**request).wait()
    assert job.state == "failed"
    assert job.error.code == DATA_LOSS
    assert sums.name in job.error.message
    # Everything else works on.
    assert client.submit(**small(client, seed=2)).wait().state == "succeeded"
    calibration.delete()
    assert not sums.exists()


def test_changed_sums_of_an_open_calibration(start: StartServer, data: Path) -> None:
    server = start()
    source = made_up(np.random.default_rng(1), "rank-0", 64, 24)
    calibration = create(client_of(server), 24)
    fill(calibration, source)
    (sums,) = tensors(data)
    assert server.stop() == 0
    flip(sums)
    calibration = client_of(start()).get_calibration(calibration.id)
    for call in (
        lambda: fill(calibration, made_up(np.random.default_rng(1), "rank-1", 64, 24)),
        lambda: Sums.of(source.x).import_into(calibration, "i"),
        calibration.finalize,
        calibration.export_statistics,
    ):
        failed = refusal(call)
        assert failed.code == DATA_LOSS
        assert sums.name in failed.message


def test_changed_weights(start: StartServer, data: Path) -> None:
    client = client_of(start())
    request = small(client)
    blocker = client.submit(**big_job(client))
    wait_state(blocker, "running")
    before = tensors(data)
    job = client.submit(**request)
    (weights,) = tensors(data) - before
    flip(weights)
    assert job.refresh().state == "queued"
    blocker.cancel()
    assert job.wait().state == "failed"
    assert job.error.code == DATA_LOSS
    assert weights.name in job.error.message
    wait_until(lambda: not weights.exists(), "the weights are gone")


def lost(start: StartServer, *flags: str) -> str:
    """What a start says that refuses; the code that would accept."""
    with pytest.raises(AssertionError, match=r"--accept_loss [0-9a-f]{8}") as refused:
        start(*flags)
    said = str(refused.value)
    assert "state.db" in said
    return said.split("--accept_loss ")[1][:8]


def test_records_do_not_go_back_in_time(start: StartServer, data: Path) -> None:
    server = start()
    jobs = [client_of(server).submit(**small(client_of(server), seed=seed)) for seed in range(3)]
    assert {job.wait().state for job in jobs} == {"succeeded"}
    server.process.kill()
    server.wait()
    log, kept = data / "state.db-wal", tensors(data)
    whole = log.read_bytes()
    # Its header, a page, the head of a frame, the last frame; none of it; the first half.
    damaged = [bytearray(whole) for _ in range(4)]
    for content, at in zip(damaged, (17, 5000, 32 + 4120 + 9, len(whole) - 100), strict=True):
        content[at] ^= 4
    for content in (*damaged, b"", whole[: len(whole) // 2]):
        log.write_bytes(content)
        code = lost(start)
        assert log.read_bytes() == bytes(content)
        assert tensors(data) == kept
    lost(start, "--accept_loss", "12345678")

    # Accepted, everything is somewhere still, and the server works on.
    server = start("--accept_loss", code)
    left = len(list(client_of(server).jobs()))
    assert left < 3
    quarantine = {path.name for path in (data / "quarantine").iterdir()}
    assert quarantine | {path.name for path in tensors(data)} >= {path.name for path in kept}
    assert client_of(server).submit(**small(client_of(server), seed=9)).wait().state == "succeeded"
    assert server.stop() == 0
    server = start("--accept_loss", code)
    assert len(list(client_of(server).jobs())) == left + 1


def test_jobs_share_factors(start: StartServer) -> None:
    server = start()
    client = client_of(server)
    random = np.random.default_rng(5)
    calibration = calibrated(client, made_up(random, "rank-0", 256, 48))

    def count(result: str) -> float:
        return server.metrics().sum("certiq_factor_cache_total", result=result)

    def run(spec: certiq.Spec) -> None:
        W = random.standard_normal((16, 48)).astype("<f4")
        job = client.submit(W, calibration=calibration, spec=spec)
        assert job.wait().state == "succeeded"

    for bits in (2, 3, 4):
        run(certiq.Spec(bits=bits))
    assert (count("hit"), count("miss")) == (2, 1)
    run(certiq.Spec(damping="relative_trace:0.02"))
    assert (count("hit"), count("miss")) == (2, 2)
