#!/usr/bin/env python3
"""Makes data_dir_schema_1: a data directory as an earlier server left it, and what it answered.

    CERTIQ_BIN_DIR=FOLDER build/venv/bin/python tests/data/make_data_dir.py COMMIT

FOLDER holds the certiq-server of COMMIT. The work is that of tests/e2e/old_data.py. The server is
killed at the end, while one job runs and one waits; then SQLite folds its log into the database,
and the files that every start makes anew are left out.
"""

import hashlib
import json
import shutil
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))

import certiq  # noqa: E402
import numpy as np  # noqa: E402
import old_data  # noqa: E402
from google.protobuf import json_format  # noqa: E402
from old_data import Wire  # noqa: E402
from programs import Server  # noqa: E402
from raw import StoredResult  # noqa: E402
from sums import FIT, HELD_OUT, Source  # noqa: E402
from work import client_of, fill, wait_state  # noqa: E402

TRIES = 50
# As schema 1 numbers states (server/store/upgrade.cc).
STORED_QUEUED, STORED_RUNNING = 0, 1


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def answer(message: object) -> dict:
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def result_of(result: StoredResult) -> dict:
    assert result.header is not None
    return {
        "sha256": sha256(result.data),
        "header": answer(result.header),
        "certificate": answer(result.certificate),
    }


def sums_of(wire: Wire, calibration_id: str, portion: int) -> dict:
    header, data = wire.sums(calibration_id, portion)
    return {"header": answer(header), "sha256": sha256(data)}


def fill_all(calibration: certiq.Calibration, work: old_data.CalibrationWork) -> None:
    for source in work.sources:
        fill(calibration, source)


class Maker:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.lives = 0
        self.ids: dict[str, str] = {}
        self.tokens = folder / "tokens"
        self.tokens.touch(mode=0o600)
        self.tokens.write_text(old_data.TOKENS)

    def start(self, *flags: str, data: Path | None = None) -> Server:
        self.lives += 1
        return Server(
            self.folder / f"life_{self.lives}",
            ["--data_dir", str(data or self.data), "--workers", "1", *flags],
        )

    def calibrate(self, client: certiq.Client, name: str, work: old_data.CalibrationWork) -> None:
        made = work.create(client, name)
        self.ids[f"calibration {name}"] = made.id
        if name == "open":
            (source,) = work.sources
            taken = source.x[: old_data.CHUNKS_TAKEN * source.chunk_rows]
            fill(made, Source(source.stream_id, taken, None, source.chunk_rows))
        else:
            fill_all(made, work)
        if work.imported is not None:
            work.imported.import_into(made, old_data.IMPORTED)
        if name != "open":
            made.finalize()

    def submit(self, server: Server, name: str) -> certiq.Job:
        work = old_data.JOBS[name]
        features = old_data.CALIBRATIONS[work.calibration].features
        header = work.header(name, self.ids[f"calibration {work.calibration}"])
        job = Wire(server).create_job(header, work.weight(features)).id
        self.ids[f"job {name}"] = job
        return client_of(server).get_job(job)

    def blocker(self, client: certiq.Client) -> certiq.Job:
        """A job that keeps the worker busy meanwhile."""
        W = np.ones((1 << 16, 32), "<f4") * np.arange(1, 33, dtype="<f4")
        calibration = self.ids["calibration matched"]
        job = client.submit(W, calibration=calibration, spec=old_data.SLOW, priority=100)
        wait_state(job, "running")
        return job

    def make_ended(self, server: Server) -> None:
        """Calibrations, and the jobs that have ended."""
        client = client_of(server)
        for name, work in old_data.CALIBRATIONS.items():
            self.calibrate(client, name, work)
        for name in ("dense", "gptq", "held out", "qronos"):
            assert self.submit(server, name).wait().state == "succeeded"
        assert self.submit(server, "failed").wait().state == "failed"
        blocker = self.blocker(client)
        assert self.submit(server, "cancelled").cancel().state == "cancelled"
        expired = self.submit(server, "expired").wait()
        assert expired.state == "expired", expired.info
        blocker.cancel().wait().delete()

    def answers(self, server: Server, token: str = "") -> dict:
        client, wire = client_of(server, token or None), Wire(server, token)
        calibrations = [client.get_calibration(found.id) for found in client.calibrations()]
        jobs = list(client.jobs())
        for job in jobs:
            assert job.info == client.get_job(job.id).info
        return {
            "calibrations": [answer(found.info) for found in calibrations],
            "jobs": [answer(job.info) for job in jobs],
            "results": {
                job.id: result_of(wire.result(job.id)) for job in jobs if job.state == "succeeded"
            },
            "sums": {
                found.id: {
                    str(portion): sums_of(wire, found.id, portion) for portion in (FIT, HELD_OUT)
                }
                for found in calibrations
            },
        }

    def kill_while_running(self) -> None:
        """Begins the last two jobs and kills the server while one of them runs."""
        before = self.folder / "before"
        shutil.copytree(self.data, before)
        for _ in range(TRIES):
            server = self.start()
            running = self.submit(server, "running").id
            queued = self.submit(server, "queued").id
            server.process.kill()
            server.wait()
            if self.fold_log(running, queued):
                return
            shutil.rmtree(self.data)
            shutil.copytree(before, self.data)
        raise SystemExit(f"the job was not met running, {TRIES} times")

    def fold_log(self, running: str, queued: str) -> bool:
        """The log into the database; whether that holds what it should."""
        database = sqlite3.connect(self.data / "state.db")
        states = dict(database.execute("SELECT id, state FROM jobs").fetchall())
        assert database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
        database.close()
        return (states[running], states[queued]) == (STORED_RUNNING, STORED_QUEUED)

    def drop_unnamed(self) -> None:
        """What the next start would remove or make: unnamed tensors, lock, reserve."""
        database = sqlite3.connect(self.data / "state.db")
        named = {
            name
            for query in (
                "SELECT sums_blob FROM calibrations",
                "SELECT weights_blob FROM jobs",
                "SELECT result_blob FROM jobs",
            )
            for (name,) in database.execute(query)
        }
        database.close()
        for file in (self.data / "tensors").iterdir():
            if file.name not in named:
                file.unlink()
        shutil.rmtree(self.data / "incoming")
        for name in ("lock", "reserve"):
            (self.data / name).unlink()
        assert {file.name for file in self.data.iterdir()} == {"state.db", "tensors"}

    def went_on(self) -> dict:
        """What the same server makes of a copy: the two jobs and the open calibration."""
        copy = self.folder / "copy"
        shutil.copytree(self.data, copy)
        server = self.start(data=copy)
        client, wire = client_of(server), Wire(server)
        later: dict[str, dict] = {}
        for name in old_data.UNENDED:
            job = client.get_job(self.ids[f"job {name}"]).wait()
            assert job.state == "succeeded", job.info
            later[name] = {"starts": job.info.starts, **result_of(wire.result(job.id))}
        calibration = client.get_calibration(self.ids["calibration open"])
        fill_all(calibration, old_data.CALIBRATIONS["open"])
        later["open"] = answer(calibration.finalize().info)
        assert server.stop() == 0
        return later


def main(commit: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        maker = Maker(Path(folder))
        server = maker.start("--token_file", str(maker.tokens))
        alice = client_of(server, old_data.TOKEN)
        # Under the names of others' work: request ids belong to tenants.
        work = old_data.ALICES_CALIBRATION
        made = work.create(alice, "matched")
        fill_all(made, work)
        made.finalize()
        header = old_data.ALICES_JOB.header("dense", made.id)
        asked = Wire(server, old_data.TOKEN).create_job(
            header, old_data.ALICES_JOB.weight(work.features)
        )
        job = alice.get_job(asked.id).wait()
        assert job.state == "succeeded"
        maker.ids |= {"calibration alice": made.id, "job alice": job.id}
        tenants = {old_data.ALICE: maker.answers(server, old_data.TOKEN)}
        assert server.stop() == 0

        server = maker.start()
        maker.make_ended(server)
        tenants[""] = maker.answers(server)
        assert server.stop() == 0

        maker.kill_while_running()
        maker.drop_unnamed()
        (build,) = (
            labels for name, labels, _ in _metrics(maker).samples if name == "certiq_build_info"
        )
        expected = {
            "made": {"commit": commit, "unix_micros": time.time_ns() // 1000, **build},
            "ids": maker.ids,
            "tenants": tenants,
            "later": maker.went_on(),
        }
        shutil.rmtree(old_data.FOLDER, ignore_errors=True)
        old_data.FOLDER.mkdir()
        shutil.copytree(maker.data, old_data.DATA)
    old_data.EXPECTED.write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


def _metrics(maker: Maker) -> object:
    server = maker.start(data=maker.folder / "empty")
    page = server.metrics()
    assert server.stop() == 0
    return page


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
