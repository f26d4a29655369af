"""Names and ends of a job's states."""

from typing import cast

from certiq._proto import job_service_pb2 as j
from certiq.errors import Error, from_status, invalid

_STATES = {number: name for name, number in j.JobState.items()}


def state_name(state: int) -> str:
    """ "queued", "running", "succeeded", ..."""
    return _STATES.get(state, "JOB_STATE_UNSPECIFIED").removeprefix("JOB_STATE_").lower()


def state_of(name: str) -> j.JobState:
    for number in _STATES:
        if number != j.JOB_STATE_UNSPECIFIED and name.lower() == state_name(number):
            return cast(j.JobState, number)
    choices = ", ".join(state_name(number) for number in _STATES if number)
    raise invalid("states", f"expected some of {choices}, got {name!r}")


def is_final(job: j.Job) -> bool:
    """Succeeded, failed, cancelled or expired: states that never change."""
    return job.state >= j.JOB_STATE_SUCCEEDED


def job_error(job: j.Job) -> Error | None:
    """Why it failed, was cancelled or expired."""
    if not is_final(job) or job.state == j.JOB_STATE_SUCCEEDED:
        return None
    error = from_status(job.error)
    what = f'job {job.id} "{job.layer_name}"' if job.layer_name else f"job {job.id}"
    error.add_note(f"{what} ended {state_name(job.state)}")
    return error
