"""Calibrations and jobs that tests of jobs share."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from cluster import Client, JobRequest
from programs import wait_until
from stubs import job_pb2, spec_pb2
from sums import HELD_OUT, Source, Sums, made_up

QUEUED = job_pb2.JOB_STATE_QUEUED
RUNNING = job_pb2.JOB_STATE_RUNNING
SUCCEEDED = job_pb2.JOB_STATE_SUCCEEDED
FAILED = job_pb2.JOB_STATE_FAILED
CANCELLED = job_pb2.JOB_STATE_CANCELLED
EXPIRED = job_pb2.JOB_STATE_EXPIRED

BIG = 2048


def calibrated(client: Client, source: Source, **more: object) -> str:
    """A finalized calibration of these rows."""
    calibration = client.create(source.x.shape[1], **more).id
    client.accumulate(calibration, source)
    client.finalize(calibration)
    return calibration


def small(client: Client, features: int = 32, rows: int = 16, seed: int = 1) -> JobRequest:
    """A job of milliseconds, with a calibration of its own."""
    random = np.random.default_rng(seed)
    calibration = calibrated(client, made_up(random, "rank-0", 128, features))
    return JobRequest(calibration, random.standard_normal((rows, features)).astype("<f4"))


def big_job(client: Client) -> JobRequest:
    """A job that outlasts every test, on any machine, and uploads little: on a large layer the
    longest search there is. Whoever makes it cancels it."""
    calibration = client.create(BIG, fraction=0.25).id
    random = np.random.default_rng(7)
    X = random.standard_normal((64, BIG))
    sums = Sums(2 * BIG, (X.T @ X + BIG * np.eye(BIG),))
    for portion, name in ((1, "fit"), (HELD_OUT, "held-out")):
        client.import_sums(calibration, name, sums, portion=portion, chunk_bytes=1 << 20)
    client.finalize(calibration)
    spec = spec_pb2.QuantizationSpec(bits=4, scale_trials=32, polish=64)
    spec.damping.held_out.ladder[:] = [0.01 * step for step in range(1, 33)]
    return JobRequest(calibration, random.standard_normal((BIG, BIG)).astype("<f4"), spec)


def wait_state(client: Client, job_id: str, state: int) -> None:
    wait_until(lambda: client.get_job(job_id).state == state, f"job {job_id} is in state {state}")


@contextmanager
def busy(client: Client, request: JobRequest) -> Iterator[str]:
    """Keeps the only worker busy meanwhile; the job that does it."""
    blocker = client.create_job(request).id
    wait_state(client, blocker, RUNNING)
    try:
        yield blocker
    finally:
        client.cancel_job(blocker)
        client.wait_job(blocker)
