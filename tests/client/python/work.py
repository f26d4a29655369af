"""Jobs that many tests use."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import certiq
import numpy as np
from programs import wait_until

BIG = 1536


def finalized(client: certiq.Client, X: np.ndarray[Any, Any], **options: Any) -> certiq.Calibration:  # noqa: ANN401
    calibration = client.calibration(X.shape[1], keep=True, **options)
    with calibration.stream("rank-0") as stream:
        stream.send(X)
    return calibration.finalize()


def small(client: certiq.Client, features: int = 32) -> certiq.Calibration:
    random = np.random.default_rng(1)
    return finalized(client, random.standard_normal((256, features), dtype="<f4"))


def weight(rows: int = 16, features: int = 32) -> np.ndarray[Any, Any]:
    return np.random.default_rng(2).standard_normal((rows, features), dtype="<f4")


def submit_big(client: certiq.Client) -> certiq.Job:
    """A job that outlasts every test, on any machine, and uploads little: on a large layer the
    longest search there is. Whoever makes it cancels it."""
    random = np.random.default_rng(7)
    X = random.standard_normal((64, BIG))
    gram = X.T @ X + BIG * np.eye(BIG)
    calibration = client.calibration(BIG, keep=True, held_out_fraction=0.25)
    for name in ("fit", "held-out"):
        calibration.import_statistics(
            stream_id=name, gram=gram, tokens=2 * BIG, held_out=name == "held-out"
        )
    ladder = ",".join(str(0.01 * step) for step in range(1, 33))
    return client.submit(
        random.standard_normal((BIG, BIG), dtype="<f4"),
        calibration=calibration.finalize(),
        spec=certiq.Spec(bits=4, damping=f"held_out:{ladder}", scale_trials=32, polish=64),
        name="big",
    )


@contextmanager
def busy(client: certiq.Client) -> Iterator[certiq.Job]:
    """Keeps the only worker busy meanwhile; the job that does it."""
    job = submit_big(client)
    wait_until(lambda: job.refresh().state == "running", f"{job} runs")
    try:
        yield job
    finally:
        job.cancel()
        job.wait()
