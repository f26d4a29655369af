"""The blocking client."""

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from certiq._client_base import ClientBase
from certiq._job_state import state_of
from certiq._requests import calibration_request, job_request, layer_request
from certiq._transport import BlockingTransport, iterate, run
from certiq.calibration import Calibration, CalibrationInfo, calibration_id
from certiq.jobs import Job
from certiq.layer import Layer
from certiq.progress import ProgressLike
from certiq.spec import SpecLike
from certiq.tensors import TensorLike


class Client(ClientBase):
    """A connection to a certiq server, made when it is needed.

    Thread-safe, but for one stream or job object at a time; not to be used in a child process
    that was forked after it was made.

    Every call raises an Error: the server's, once the tries that `retry` allows are over;
    InvalidArgument, before anything is sent, where arguments do not fit together; Unavailable
    where no server could be reached; Internal where the server's answer breaks the contract. A
    `timeout` is for the whole call in seconds, retries included; then DeadlineExceeded.
    """

    _transport = BlockingTransport

    def close(self) -> None:
        """Ends the calls that still run with Cancelled."""
        run(self._core.transport.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def quantize(
        self,
        weight: TensorLike,
        activations: TensorLike | None = None,
        spec: SpecLike = None,
        *,
        activations_quantized: TensorLike | None = None,
        calibration: CalibrationInfo | str | None = None,
        held_out_fraction: float | None = None,
        sequence_rows: int = 0,
        name: str = "",
        request_id: str = "",
        progress: ProgressLike = None,
        timeout: float | None = None,
    ) -> Layer:
        """Quantizes one layer in one call.

        `weight` W [R, N] is of a floating type; `activations` X [..., N] are the inputs of the
        layer in the float model, `activations_quantized` X~ those it sees after the layers before
        it were quantized. A finalized `calibration` stands for both. `held_out_fraction` of the
        rows, in blocks of 256 or `sequence_rows`, measure the error on unseen tokens. `progress`:
        True for a bar, or a function that gets each certiq.progress.Event.
        """
        request = layer_request(
            weight,
            activations,
            spec,
            activations_quantized=activations_quantized,
            calibration_id=calibration_id(calibration),
            held_out_fraction=held_out_fraction,
            sequence_rows=sequence_rows,
            name=name,
            request_id=request_id,
        )
        return run(self._core.quantize(request, progress, timeout))

    def calibration(
        self,
        features: int,
        *,
        mismatched: bool = False,
        held_out_fraction: float = 0.0,
        sequence_rows: int = 0,
        labels: Iterable[str] = (),
        ttl: float | None = None,
        keep: bool = False,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Calibration:
        """Makes an empty calibration of N = `features`. `with` deletes it at the end, unless
        `keep`; the server does when nothing has changed for `ttl` seconds (default a day)."""
        request = calibration_request(
            features,
            mismatched=mismatched,
            held_out_fraction=held_out_fraction,
            sequence_rows=sequence_rows,
            labels=labels,
            ttl=ttl,
            request_id=request_id,
        )
        info = run(self._core.create_calibration(request, timeout))
        return Calibration(self._core, info, keep)

    def get_calibration(self, id_or_label: str, *, timeout: float | None = None) -> Calibration:
        """One that exists, for other ranks for example. NotFound: neither an id nor a label;
        FailedPrecondition: several carry the label."""
        info = run(self._core.find_calibration(id_or_label, timeout))
        return Calibration(self._core, info, keep=True)

    def calibrations(
        self, *, label: str = "", page_size: int = 0, timeout: float | None = None
    ) -> Iterator[Calibration]:
        """Newest first, page by page as they are read; their info has no streams. `timeout` is
        for each page."""
        for info in iterate(self._core.list_calibrations(label, page_size, timeout)):
            yield Calibration(self._core, info, keep=True)

    def submit(
        self,
        weight: TensorLike,
        *,
        calibration: CalibrationInfo | str,
        spec: SpecLike = None,
        name: str = "",
        priority: int = 0,
        deadline: float | None = None,
        ttl: float | None = None,
        request_id: str | None = None,
        progress: ProgressLike = None,
        timeout: float | None = None,
    ) -> Job:
        """Sends a layer and queues it; the job is durable when this returns.

        `priority` is -100 to 100, higher goes first. The job ends expired `deadline` seconds after
        its creation; it and its result are kept `ttl` seconds after its end (default a day). The
        same `request_id` and content give the same job.
        """
        header, w = job_request(
            weight,
            calibration_id(calibration),
            spec,
            name=name,
            priority=priority,
            deadline=deadline,
            ttl=ttl,
            request_id=request_id,
        )
        return Job(self._core, run(self._core.submit(header, w, progress, timeout)))

    def get_job(self, job_id: str, *, timeout: float | None = None) -> Job:
        return Job(self._core, run(self._core.get_job(job_id, timeout)))

    def jobs(
        self,
        *,
        states: Iterable[str] = (),
        calibration: CalibrationInfo | str | None = None,
        page_size: int = 0,
        timeout: float | None = None,
    ) -> Iterator[Job]:
        """Newest first, page by page as they are read; of these states ("queued", ...) only."""
        wanted = [state_of(state) for state in states]
        found = self._core.list_jobs(wanted, calibration_id(calibration), page_size, timeout)
        for info in iterate(found):
            yield Job(self._core, info)
