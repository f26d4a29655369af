"""Jobs as futures."""

import threading
from pathlib import Path
from typing import Any

import certiq
import numpy as np
import pytest
from conftest import StartServer
from programs import Server
from relay import Relay
from streams_test import QUICK
from work import busy, finalized, small, submit_big, weight


def test_a_job_gives_what_a_call_gives(client: certiq.Client, random: np.random.Generator) -> None:
    X = random.standard_normal((600, 96), dtype="<f4")
    W = weight(64, 96)
    spec = certiq.Spec(bits=3, group_size=32, format="gptq_v2", order="decreasing_norm")
    calibration = finalized(client, X)
    job = client.submit(W, calibration=calibration, spec=spec, name="q_proj", priority=5)
    assert job.info.calibration_id == calibration.id
    assert job.info.priority == 5
    states = [seen.state for seen in job.watch()]
    assert states[-1] == "succeeded"
    assert set(states) <= {"queued", "running", "succeeded"}
    layer = job.result()
    assert layer.name == job.name == "q_proj"
    assert job.done()
    assert job.error is None
    assert job.info.relative_error == layer.relative_error
    assert layer.certificate.sums_sha256 == calibration.info.sums_sha256
    called = client.quantize(W, calibration=calibration.id, spec=spec)
    assert called.tensors.keys() == layer.tensors.keys()
    for name, array in called.tensors.items():
        np.testing.assert_array_equal(layer.tensors[name], array)
    # Once more, by its id; and then never again.
    np.testing.assert_array_equal(
        client.get_job(job.id).result().dequantized(), layer.dequantized()
    )
    job.delete()
    with pytest.raises(certiq.NotFound):
        job.refresh()
    calibration.delete()


def test_progress_of_a_job(client: certiq.Client, capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[tuple[int, str]] = []

    class Bar:
        def __init__(self, total: int, desc: str, **_: Any) -> None:  # noqa: ANN401
            assert (total, desc) == (100, "layer")
            self.n = 0

        def set_postfix_str(self, text: str) -> None:
            shown.append((self.n, text))

        def close(self) -> None:
            shown.append((-1, "closed"))

    calibration = small(client)
    job = client.submit(weight(), calibration=calibration, name="layer").progress(Bar)
    assert job.ended
    assert shown[-1] == (-1, "closed")
    assert shown[-2] == (100, f"relative error {job.info.relative_error:.4g}")
    client.submit(weight(), calibration=calibration, name="with tqdm").progress()
    assert "with tqdm: 100%" in capsys.readouterr().err


def test_cancelling(start_server: StartServer) -> None:
    with certiq.Client(start_server("--workers", "1").address) as client, busy(client) as running:
        queued = client.submit(weight(), calibration=small(client), name="waits")
        # The time is over long before the job is.
        with pytest.raises(certiq.DeadlineExceeded):
            queued.result(timeout=0.05)
        with pytest.raises(TimeoutError):
            queued.wait(timeout=0.05)
        assert not queued.done()
        assert queued.cancel().state == "cancelled"
        with pytest.raises(certiq.Cancelled) as caught:
            queued.result()
        assert any(
            queued.id in note and "ended cancelled" in note for note in caught.value.__notes__
        )
        assert queued.done()
        running.cancel()
        assert running.wait().state == "cancelled"
        with pytest.raises(certiq.Cancelled):
            running.result()


def test_a_job_that_expires(start_server: StartServer) -> None:
    with certiq.Client(start_server("--workers", "1").address) as client, busy(client):
        late = client.submit(weight(), calibration=small(client), deadline=0.01)
        assert late.wait().state == "expired"
        with pytest.raises(certiq.DeadlineExceeded):
            late.result()


def test_a_job_that_fails(client: certiq.Client) -> None:
    zeros = finalized(client, np.zeros((256, 32), "<f4"))
    job = client.submit(weight(), calibration=zeros)
    with pytest.raises(certiq.FailedPrecondition):
        job.result()
    assert job.state == "failed"
    assert isinstance(job.error, certiq.FailedPrecondition)


def test_a_block_ends_before_its_job(start_server: StartServer) -> None:
    """The calibration is in use, and the block says so; but never hides another error."""
    with certiq.Client(start_server("--workers", "1").address) as client, busy(client):

        def leave_early(error: Exception | None) -> None:
            with client.calibration(32) as calibration:
                with calibration.stream("a") as stream:
                    stream.send(weight(300))
                client.submit(weight(), calibration=calibration.finalize())
                if error is not None:
                    raise error

        with pytest.raises(certiq.FailedPrecondition):
            leave_early(None)
        with pytest.raises(KeyError) as caught:
            leave_early(KeyError("mine"))
        assert "could not be deleted" in caught.value.__notes__[0]


def test_a_request_that_is_repeated(client: certiq.Client) -> None:
    calibration = small(client)
    first = client.submit(weight(), calibration=calibration, request_id="run-1/layer-0")
    assert client.submit(weight(), calibration=calibration, request_id="run-1/layer-0").id == (
        first.id
    )
    with pytest.raises(certiq.AlreadyExists):
        client.submit(weight(17), calibration=calibration, request_id="run-1/layer-0")
    assert client.submit(weight(), calibration=calibration).id != first.id


def test_lists_come_in_pages(start_server: StartServer) -> None:
    with certiq.Client(start_server().address) as client:
        calibrations = [client.calibration(32, labels=[f"n{i % 2}"], keep=True) for i in range(7)]
        newest_first = [c.id for c in reversed(calibrations)]
        assert [c.id for c in client.calibrations(page_size=2)] == newest_first
        assert [c.id for c in client.calibrations()] == newest_first
        assert [c.id for c in client.calibrations(label="n1", page_size=1)] == newest_first[1::2]
        # A page is asked for when it is needed.
        first = client.calibrations(page_size=3)
        assert [next(first).id for _ in range(3)] == newest_first[:3]

        used = small(client)
        jobs = [client.submit(weight(), calibration=used) for _ in range(5)]
        for job in jobs:
            job.wait()
        newest_first = [job.id for job in reversed(jobs)]
        assert [job.id for job in client.jobs(page_size=2)] == newest_first
        assert [job.id for job in client.jobs(states=["succeeded"], calibration=used)] == (
            newest_first
        )
        assert not list(client.jobs(states=["queued", "failed"]))
        assert not list(client.jobs(calibration=calibrations[0]))
        with pytest.raises(certiq.InvalidArgument, match="queued, running, succeeded"):
            list(client.jobs(states=["done"]))
        with pytest.raises(certiq.InvalidArgument) as caught:
            list(client.jobs(page_size=-1))
        assert caught.value.field == "page_size"


def test_a_result_that_breaks_off(server: Server, random: np.random.Generator) -> None:
    """It goes on from the byte it came to."""
    X = random.standard_normal((2048, 1024), dtype="<f4")
    W = random.standard_normal((1024, 1024), dtype="<f4")
    with Relay(lambda: server.port) as relay, certiq.Client(relay.address, retry=QUICK) as client:
        job = client.submit(W, calibration=finalized(client, X)).wait()
        whole = job.result().tensors["weight"]
        for count in (100, 1 << 20, 3 << 20):
            before = relay.cuts
            relay.cut_after(count, "to client")
            np.testing.assert_array_equal(job.result().tensors["weight"], whole)
            assert relay.cuts == before + 1


def test_a_server_that_starts_again(start_server: StartServer, tmp_path: Path) -> None:
    """Jobs that were taken end, and who waits for them hears of it."""
    flags = ("--data_dir", str(tmp_path / "data"), "--workers", "1")
    servers = [start_server(*flags)]
    with (
        Relay(lambda: servers[-1].port) as relay,
        certiq.Client(relay.address, retry=QUICK) as client,
    ):
        big = submit_big(client)
        job = client.submit(weight(), calibration=small(client), name="waits")
        found: list[certiq.Layer] = []
        came = threading.Event()

        def wait() -> None:
            for _ in job.watch():
                came.set()
            found.append(job.result())

        waiting = threading.Thread(target=wait)
        waiting.start()
        came.wait()
        servers[-1].process.kill()
        servers[-1].wait()
        servers.append(start_server(*flags))
        big.cancel()
        waiting.join()
        assert found[0].name == "waits"
        assert job.info.state == job.refresh().info.state
        assert relay.connections >= 2
