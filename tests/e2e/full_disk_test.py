"""A disk without a byte left: what is refused, and that deleting makes room."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import certiq
import grpc
import numpy as np
import pytest
from programs import SERVER, Server, wait_until
from raw import refusal
from sums import made_up
from work import calibrated, client_of, create, wait_state

MOUNT = ["unshare", "--mount", "--propagation", "private"]
DISK_BYTES = 16 << 20


class SmallDisk:
    """A server whose data directory is a disk of its own, seen by nobody else."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self.data.mkdir()
        self._program = folder / "certiq-server"
        self._program.write_text(
            f"#!/bin/sh\nmount -t tmpfs -o size={DISK_BYTES} disk '{self.data}' && "
            f"exec '{SERVER}' \"$@\"\n"
        )
        self._program.chmod(0o755)
        wrapped = folder / "wrapped"
        wrapped.write_text(f"#!/bin/sh\nexec {' '.join(MOUNT)} '{self._program}' \"$@\"\n")
        wrapped.chmod(0o755)
        flags = ["--data_dir", str(self.data / "store"), "--workers", "1"]
        self.server = Server(folder / "server", flags, program=wrapped)

    def inside(self) -> Path:
        """The disk, through the eyes of the server."""
        return Path(f"/proc/{self.server.process.pid}/root{self.data}")

    def fill(self, leave: int = 0) -> None:
        """To the last byte, or to so many, by somebody else."""
        with (self.inside() / "others").open("ab", buffering=0) as others:
            for size in (1 << 20, 1 << 12):
                try:
                    while others.write(b"x" * size) > 0:
                        pass
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
        assert shutil.disk_usage(self.inside()).free == 0
        others = self.inside() / "others"
        os.truncate(others, max(0, others.stat().st_size - leave))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if subprocess.run([*MOUNT, "mount", "-t", "tmpfs", "disk", str(tmp_path)]).returncode != 0:
        pytest.skip("mounting a small disk takes root that may mount (CAP_SYS_ADMIN)")
    made = SmallDisk(tmp_path)
    yield made
    assert made.server.stop() == 0, made.server.log()


def test_deleting_makes_room(disk: SmallDisk) -> None:
    client = client_of(disk.server)
    random = np.random.default_rng(1)
    calibrations = [calibrated(client, made_up(random, "rank-0", 128, 64)) for _ in range(3)]
    # Results of 2 MiB each.
    W = random.standard_normal((1 << 13, 64)).astype("<f4")
    jobs = [client.submit(W, calibration=calibration) for calibration in calibrations]
    assert {job.wait().state for job in jobs} == {"succeeded"}
    reserve = disk.inside() / "store" / "reserve"
    assert reserve.stat().st_size == 1 << 20

    disk.fill()
    for call in (
        lambda: create(client, 64),
        lambda: client.submit(W, calibration=calibrations[0]),
    ):
        failed = refusal(call)
        assert failed.code == grpc.StatusCode.RESOURCE_EXHAUSTED, failed
        assert failed.retry_delay is not None
    # What is there can be read.
    assert jobs[0].result().tensors["weight"].shape == W.shape

    # Every time, also where others take at once what was freed.
    for job, calibration in zip(jobs, calibrations, strict=True):
        job.delete()
        disk.fill()
        calibration.delete()
        disk.fill()
    assert list(client.jobs()) == []
    assert list(client.calibrations()) == []

    (disk.inside() / "others").unlink()
    again = calibrated(client, made_up(random, "rank-0", 128, 64))
    job = client.submit(W, calibration=again).wait()
    assert job.state == "succeeded"
    job.delete()
    assert reserve.stat().st_size == 1 << 20


def test_what_frees_nothing_is_deleted_too(disk: SmallDisk) -> None:
    """Records without tensors, while others take at once what there is."""
    client = client_of(disk.server)
    for calibration in [create(client, 64) for _ in range(60)]:
        disk.fill()
        calibration.delete()
    assert list(client.calibrations()) == []
    failed = refusal(lambda: calibrated(client, made_up(np.random.default_rng(1), "r", 128, 64)))
    assert failed.code == grpc.StatusCode.RESOURCE_EXHAUSTED


def runs(server: Server) -> float:
    """Jobs that a worker has begun with."""
    return server.metrics().sum("certiq_job_seconds_count", phase="queue")


def without_room(disk: SmallDisk, client: certiq.Client) -> certiq.Job:
    """A job that was accepted, and whose result of 2 MiB found no room once it was there."""
    random = np.random.default_rng(3)
    calibration = calibrated(client, made_up(random, "rank-0", 128, 64))
    W = random.standard_normal((1 << 13, 64)).astype("<f4")
    disk.fill(leave=5 << 19)
    job = client.submit(W, calibration=calibration)
    wait_until(lambda: runs(disk.server) > 0, "it runs")
    wait_state(job, "queued")
    return job


def test_an_accepted_job_waits_for_room(disk: SmallDisk) -> None:
    client = client_of(disk.server)
    job = without_room(disk, client)
    assert job.info.starts == 0
    # Nor does it run again for nothing.
    calibration = job.info.calibration_id
    smaller = client.submit(np.ones((4, 64), "<f4"), calibration=calibration)
    assert (job.refresh().state, runs(disk.server)) == ("queued", 1)
    (disk.inside() / "others").unlink()
    assert job.wait().state == "succeeded"
    assert job.info.starts == 1
    assert job.result().tensors["weight"].shape == (1 << 13, 64)
    assert smaller.wait().state == "succeeded"


def test_what_waits_for_room_is_cancelled_and_deleted(disk: SmallDisk) -> None:
    client = client_of(disk.server)
    job = without_room(disk, client)
    disk.fill()
    assert job.cancel().wait().state == "cancelled"
    disk.fill()
    job.delete()
    assert list(client.jobs()) == []
