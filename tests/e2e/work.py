"""Clients, calibrations and jobs that many tests use."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import certiq
import numpy as np
from certiq._proto.calibration_service_pb2 import StreamProgress
from programs import wait_until
from raw import ONCE, Listener
from sums import Source, Sums, made_up

BIG = 2048
# What certiq.Client.submit takes.
Request = dict[str, Any]


def client_of(server: Listener, token: str | None = None, **options: Any) -> certiq.Client:  # noqa: ANN401
    """Its calls are tried once, so that tests see what the server said."""
    return certiq.Client(server.address, token=token, retry=ONCE, **options)


def create(client: certiq.Client, features: int, **options: Any) -> certiq.Calibration:  # noqa: ANN401
    """One that stays until the test deletes it."""
    return client.calibration(features, keep=True, **options)


def stream_of(calibration: certiq.Calibration, source: Source) -> certiq.ActivationStream:
    """Cut as the source says, open, and without a row yet."""
    stream = calibration.stream(source.stream_id, chunk_rows=source.chunk_rows)
    stream.send(source.x[:0], None if source.x_quantized is None else source.x_quantized[:0])
    return stream


def fill(calibration: certiq.Calibration, source: Source) -> StreamProgress:
    """Sends what is missing of it."""
    stream = stream_of(calibration, source)
    stream.send(source.x, source.x_quantized)
    return stream.close()


def calibrated(client: certiq.Client, source: Source, **options: Any) -> certiq.Calibration:  # noqa: ANN401
    """A finalized calibration of these rows."""
    calibration = create(client, source.x.shape[1], **options)
    fill(calibration, source)
    return calibration.finalize()


def small(client: certiq.Client, features: int = 32, rows: int = 16, seed: int = 1) -> Request:
    """A job of milliseconds, with a calibration of its own."""
    random = np.random.default_rng(seed)
    calibration = calibrated(client, made_up(random, "rank-0", 128, features))
    weight = random.standard_normal((rows, features)).astype("<f4")
    return {"weight": weight, "calibration": calibration, "spec": certiq.Spec(bits=4)}


def big_job(client: certiq.Client) -> Request:
    """A job that outlasts every test, on any machine, and uploads little: on a large layer the
    longest search there is. Whoever makes it cancels it."""
    calibration = create(client, BIG, held_out_fraction=0.25)
    random = np.random.default_rng(7)
    X = random.standard_normal((64, BIG))
    sums = Sums(2 * BIG, (X.T @ X + BIG * np.eye(BIG),))
    for name in ("fit", "held-out"):
        sums.import_into(calibration, name, held_out=name == "held-out")
    ladder = ",".join(str(0.01 * step) for step in range(1, 33))
    spec = certiq.Spec(bits=4, damping=f"held_out:{ladder}", scale_trials=32, polish=64)
    weight = random.standard_normal((BIG, BIG)).astype("<f4")
    return {"weight": weight, "calibration": calibration.finalize(), "spec": spec}


def wait_state(job: certiq.Job, state: str) -> None:
    wait_until(lambda: job.refresh().state == state, f"{job} is {state}")


@contextmanager
def busy(client: certiq.Client, request: Request) -> Iterator[certiq.Job]:
    """Keeps the only worker busy meanwhile; the job that does it."""
    blocker = client.submit(**request)
    wait_state(blocker, "running")
    try:
        yield blocker
    finally:
        blocker.cancel()
        wait_until(blocker.done, f"{blocker} ends")
