"""Jobs: quantizations that outlive the call that asked for them."""

from collections.abc import Iterator
from typing import Any, Self

from certiq._core import Core
from certiq._job_state import is_final, job_error, state_name
from certiq._proto import job_service_pb2 as j
from certiq._transport import iterate, run
from certiq._tries import Deadline
from certiq.errors import Error
from certiq.layer import Layer
from certiq.progress import new_bar, phase_name


class JobInfo:
    """A job as it was last seen; the blocking and the asynchronous one extend it."""

    def __init__(self, core: Core, info: j.Job) -> None:
        self._core = core
        self.info = info
        """The message of the contract, as it was last seen."""

    @property
    def id(self) -> str:
        return self.info.id

    @property
    def name(self) -> str:
        return self.info.layer_name

    @property
    def state(self) -> str:
        """ "queued", "running", "succeeded", "failed", "cancelled" or "expired", as last seen."""
        return state_name(self.info.state)

    @property
    def ended(self) -> bool:
        """True: it had ended when it was last seen."""
        return is_final(self.info)

    @property
    def error(self) -> Error | None:
        """The reason why it failed, was cancelled or expired; else None."""
        return job_error(self.info)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.name!r}: {self.state}>"


class JobBar:
    """A progress bar: the fraction of the phase that the job is in."""

    def __init__(self, job: JobInfo, tqdm: Any) -> None:
        self._bar = new_bar(
            tqdm,
            total=100,
            desc=job.name or job.id,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}]",
        )

    def show(self, info: j.Job) -> None:
        if info.state == j.JOB_STATE_QUEUED:
            self._bar.n = 0
            self._bar.set_postfix_str(f"queued, {info.queue_position} ahead")
        elif info.state == j.JOB_STATE_RUNNING:
            self._bar.n = round(100 * info.fraction)
            self._bar.set_postfix_str(phase_name(info.phase))
        else:
            self._bar.n = 100
            error = info.relative_error
            succeeded = info.state == j.JOB_STATE_SUCCEEDED
            self._bar.set_postfix_str(
                f"relative error {error:.4g}" if succeeded else state_name(info.state)
            )

    def close(self) -> None:
        self._bar.close()


class Job(JobInfo):
    """A layer on its way, like a future. It goes on without this object and this process."""

    def refresh(self, *, timeout: float | None = None) -> Self:
        self.info = run(self._core.get_job(self.id, timeout))
        return self

    def done(self) -> bool:
        """True once it has ended, well or not; asks the server unless that is known."""
        return self.ended or self.refresh().ended

    def cancel(self, *, timeout: float | None = None) -> Self:
        """Asks it to end: at once while it is queued, soon while it runs. One that has ended stays
        as it is."""
        self.info = run(self._core.cancel_job(self.id, timeout))
        return self

    def delete(self, *, timeout: float | None = None) -> None:
        """Deletes it with its result. FailedPrecondition: it has not ended."""
        run(self._core.delete_job(self.id, timeout))

    def watch(self, *, timeout: float | None = None) -> Iterator[Self]:
        """Yields this job, now and whenever it has changed, until it has ended. DeadlineExceeded
        after `timeout` seconds; the job goes on."""
        for info in iterate(self._core.watch(self.id, timeout)):
            self.info = info
            yield self

    def wait(self, *, timeout: float | None = None) -> Self:
        """Waits until it has ended, well or not."""
        for _ in self.watch(timeout=timeout):
            pass
        return self

    def progress(self, tqdm: Any = None, *, timeout: float | None = None) -> Self:
        """Waits with a progress bar; of tqdm.auto unless another tqdm class is given."""
        bar = JobBar(self, tqdm)
        try:
            for job in self.watch(timeout=timeout):
                bar.show(job.info)
        finally:
            bar.close()
        return self

    def result(self, timeout: float | None = None) -> Layer:
        """Waits for it and reads what came out; again, if called again.

        Raises why it failed: FailedPrecondition, Cancelled, DeadlineExceeded for one that expired.
        The latter also after `timeout` seconds; then done() is False and the job goes on.
        """
        deadline = Deadline(timeout)
        if not self.ended:
            self.wait(timeout=deadline.remaining())
        if self.error is not None:
            raise self.error
        return run(self._core.read_result(self.id, deadline.remaining()))
