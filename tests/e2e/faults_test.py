"""Kill -9 at any moment takes back nothing that was promised."""

import os
from pathlib import Path

from cluster import Client, JobRequest
from storm import Clients, Round, StoredJob, Victim, digest, expect, run
from stubs import job_pb2

KILLS = int(os.environ.get("CERTIQ_FAULT_KILLS", "100"))
FLAGS = ["--workers", "2", "--commit_seconds", "0.2"]
SEED = 20240229


def check_job(client: Client, job: StoredJob) -> int:
    """Its state; the only excuse for a failure is that four crashes met it running."""
    now = client.get_job(job.id)
    assert job.last is not None
    assert now.state == job.last.state
    if now.state == job_pb2.JOB_STATE_FAILED:
        assert now.starts == 4, now
        assert "went down" in now.error.message
    elif now.state == job_pb2.JOB_STATE_SUCCEEDED:
        assert digest(client.read(now.id)) == job.digest
    else:
        assert now.state == job_pb2.JOB_STATE_CANCELLED, now
    return now.state


def check_again(client: Client, made: Round, job: StoredJob) -> None:
    """The same work without a crash gives the same bytes."""
    request = JobRequest(
        made.id, job.request.W, job.request.spec, f"{job.request.request_id}-again"
    )
    again = client.wait_job(client.create_job(request).id)
    assert again.state == job_pb2.JOB_STATE_SUCCEEDED, again
    result = client.read(again.id)
    assert digest(result) == job.digest, made.name
    client.delete_job(again.id)


def files(data: Path, folder: str) -> int:
    return len(list((data / folder).iterdir()))


def test_nothing_is_lost_or_counted_twice(tmp_path: Path) -> None:
    victim = Victim(tmp_path, FLAGS)
    clients = [Clients(victim, SEED + number) for number in range(3)]
    try:
        run(victim, clients, KILLS, SEED)
        rounds = [made for one in clients for made in one.rounds]
        jobs = [job for made in rounds for job in made.jobs if not job.deleted]
        client = victim.client
        # Nothing but what was answered, and all of it.
        assert {found.id for found in client.list_calibrations(7)} == {made.id for made in rounds}
        assert {found.id for found in client.list_jobs(7)} == {job.id for job in jobs}
        assert len({job.id for job in jobs}) == len(jobs)
        states = [check_job(client, job) for job in jobs]
        succeeded = states.count(job_pb2.JOB_STATE_SUCCEEDED)
        failed = states.count(job_pb2.JOB_STATE_FAILED)
        starts = [client.get_job(job.id).starts for job in jobs]
        for made in rounds:
            expect(client, made)
            for job in made.jobs:
                if job.digest:
                    check_again(client, made, job)
        given_up = sum(one.given_up for one in clients)
        print(
            f"{KILLS} kills, {len(rounds)} calibrations, {given_up} streams broken off, "
            f"{len(jobs)} jobs, {sum(count > 1 for count in starts)} of them started again, "
            f"{failed} of them given up"
        )
        # Hardly any has such luck: else it would be the kills that are tested, not the jobs.
        assert failed <= KILLS // 20

        victim.kill()
        victim.start()
        client = victim.client
        assert files(victim.data, "incoming") == 0
        assert files(victim.data, "tensors") == len(rounds) + succeeded
        for job in jobs:
            client.delete_job(job.id)
        for made in rounds:
            client.delete(made.id)
        assert files(victim.data, "tensors") == 0
        assert client.list_calibrations() == client.list_jobs() == []
    finally:
        assert victim.server.stop() == 0, victim.server.log()
