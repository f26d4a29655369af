"""The two ways of deploy/README.md to keep a data directory, and what comes back from them."""

import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from cluster import Client, JobRequest
from programs import ROOT, Server
from sums import made_up
from work import SUCCEEDED, big_job, calibrated, small

GUIDE = ROOT / "deploy" / "README.md"


def commands() -> str:
    _, _, section = GUIDE.read_text().partition("\n## Backup\n")
    section, _, _ = section.partition("\n## ")
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    return block


@dataclass
class Kept:
    """What a server had promised."""

    calibration: str
    sums: str
    job: str
    result: bytes
    waiting: list[str]


def fill(client: Client) -> Kept:
    random = np.random.default_rng(1)
    calibration = calibrated(client, made_up(random, "rank-0", 256, 64), fraction=0.25)
    W = random.standard_normal((32, 64)).astype("<f4")
    job = client.create_job(JobRequest(calibration, W)).id
    assert client.wait_job(job).state == SUCCEEDED
    result = bytes(client.read(job).data)
    # One that runs, and one that waits for it.
    client.create_job(big_job(client))
    waiting = [client.create_job(small(client)).id]
    return Kept(calibration, client.get(calibration).sums_sha256, job, result, waiting)


def check(client: Client, kept: Kept) -> None:
    assert client.get(kept.calibration).sums_sha256 == kept.sums
    assert bytes(client.read(kept.job).data) == kept.result
    (running,) = (job.id for job in client.list_jobs() if job.id not in {kept.job, *kept.waiting})
    client.cancel_job(running)
    for job in kept.waiting:
        assert client.wait_job(job).state == SUCCEEDED


@pytest.mark.parametrize("how", ["stopped", "snapshot"])
def test_a_copy_has_everything_that_was_durable(tmp_path: Path, how: str) -> None:
    data, elsewhere = tmp_path / "here" / "data", tmp_path / "elsewhere"
    data.parent.mkdir()
    elsewhere.mkdir()
    flags = ["--workers", "1", "--drain_seconds", "0"]
    server = Server(tmp_path / "server", [*flags, "--data_dir", str(data)])
    try:
        kept = fill(Client.of(server))
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
        check(Client.of(restored), kept)
    finally:
        assert restored.stop() == 0, restored.log()
