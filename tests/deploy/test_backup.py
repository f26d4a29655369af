"""The two ways of deploy/backup.md to keep a data directory, and what comes back from them."""

import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import certiq
import numpy as np
import pytest
from programs import ROOT, Server
from sums import made_up
from work import big_job, calibrated, client_of, small

GUIDE = ROOT / "deploy" / "backup.md"


def commands() -> str:
    (block,) = re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    return block


@dataclass
class Kept:
    """What a server had promised."""

    calibration: str
    sums: str
    job: str
    result: bytes
    waiting: list[str]


def weight_of(job: certiq.Job) -> bytes:
    return job.result().tensors["weight"].tobytes()


def fill(client: certiq.Client) -> Kept:
    random = np.random.default_rng(1)
    source = made_up(random, "rank-0", 256, 64)
    calibration = calibrated(client, source, held_out_fraction=0.25)
    W = random.standard_normal((32, 64)).astype("<f4")
    job = client.submit(W, calibration=calibration)
    result = weight_of(job)
    # One that runs, and one that waits for it.
    client.submit(**big_job(client))
    waiting = [client.submit(**small(client)).id]
    return Kept(calibration.id, calibration.info.sums_sha256, job.id, result, waiting)


def check(client: certiq.Client, kept: Kept) -> None:
    assert client.get_calibration(kept.calibration).info.sums_sha256 == kept.sums
    assert weight_of(client.get_job(kept.job)) == kept.result
    (running,) = (job for job in client.jobs() if job.id not in {kept.job, *kept.waiting})
    running.cancel()
    for job in kept.waiting:
        assert client.get_job(job).wait().state == "succeeded"


@pytest.mark.parametrize("how", ["stopped", "snapshot"])
def test_a_copy_has_everything_that_was_durable(tmp_path: Path, how: str) -> None:
    data, elsewhere = tmp_path / "here" / "data", tmp_path / "elsewhere"
    data.parent.mkdir()
    elsewhere.mkdir()
    flags = ["--workers", "1", "--drain_seconds", "0"]
    server = Server(tmp_path / "server", [*flags, "--data_dir", str(data)])
    try:
        kept = fill(client_of(server))
        if how == "stopped":
            assert server.stop() == 0
            env = os.environ | {"DATA_DIR": str(data), "ELSEWHERE": str(elsewhere)}
            subprocess.run(["bash", "-euc", commands()], cwd=tmp_path, env=env, check=True)
        else:
            # Between two instructions of the server: what a snapshot of the volume holds.
            server.process.send_signal(signal.SIGSTOP)
            shutil.copytree(data, elsewhere / "data")
            server.process.send_signal(signal.SIGCONT)
    finally:
        server.stop()
    restored = Server(tmp_path / "restored", [*flags, "--data_dir", str(elsewhere / "data")])
    try:
        check(client_of(restored), kept)
    finally:
        assert restored.stop() == 0, restored.log()
