"""The calls of the client, each written once for the blocking and the asynchronous one."""

import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, TypeVar

from certiq import _methods
from certiq._collector import ResultCollector
from certiq._frames import statistics_frames, weight_frames
from certiq._job_state import is_final
from certiq._methods import Method, Request, Response
from certiq._proto import calibration_service_pb2 as c
from certiq._proto import job_service_pb2 as j
from certiq._proto import quantization_service_pb2 as q
from certiq._proto.tensor_pb2 import DataType
from certiq._requests import LayerRequest
from certiq._sender import CHUNK_BYTES, StreamSender, row_bytes
from certiq._transport import Answers, Frames, Transport
from certiq._tries import Failed, Tries
from certiq.errors import (
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    broken,
    invalid,
)
from certiq.layer import Layer
from certiq.progress import Event, ProgressLike, Reporter, Stage, Upload, phase_name
from certiq.retry import Outcome, Retry
from certiq.statistics import Statistics, StatisticsCollector, Sums
from certiq.tensors import MAX_ROW_BYTES, Tensor, rows_in_chunk

T = TypeVar("T")


class Core:
    """All calls of one connection, over the transport that runs them."""

    def __init__(self, transport: Transport, retry: Retry, chunk_bytes: int) -> None:
        self.transport = transport
        self.retry = retry
        self.chunk_bytes = chunk_bytes

    def _tries(self, timeout: float | None, report: Callable[[Event], None] | None = None) -> Tries:
        return Tries(self.retry, self.transport.sleep, timeout, report)

    async def call(
        self, method: Method[Request, Response], request: Request, timeout: float | None = None
    ) -> Response:
        """A call of one message each way, tried again: the method has to be idempotent."""
        found: list[Response] = []

        async def attempt(seconds: float | None) -> Outcome:
            found.append(await self.transport.unary(method, request, seconds))
            return Outcome()

        await self._tries(timeout).run(attempt)
        return found[0]

    async def pages(
        self,
        method: Method[Request, Response],
        request: Any,
        items: Callable[[Response], Any],
        timeout: float | None,
    ) -> AsyncIterator[Any]:
        """Yields the items of all pages; asks for a page when the one before has been read."""
        while True:
            page: Any = await self.call(method, request, timeout)
            for item in items(page):
                yield item
            if not page.next_page_token:
                return
            if page.next_page_token == request.page_token:
                raise broken("next_page_token: expected another page")
            request.page_token = page.next_page_token

    async def quantize(
        self, request: LayerRequest, progress: ProgressLike, timeout: float | None
    ) -> Layer:
        report = Reporter(progress, request.header.layer_name)
        total = request.bytes
        first = q.QuantizeRequest(header=request.header).SerializeToString()
        collector = ResultCollector(*request.weight.shape)

        async def attempt(seconds: float | None) -> Outcome:
            frames = Frames(
                first,
                request.chunks(self.chunk_bytes),
                lambda sent: report(Upload(sent, total)),
            )
            answers = self.transport.duplex(_methods.QUANTIZE, frames, seconds)

            def add(frame: q.QuantizeResponse) -> None:
                if frame.WhichOneof("payload") == "progress":
                    phase = phase_name(frame.progress.phase)
                    report(Stage(phase, frame.progress.fraction))
                else:
                    collector.add(frame)

            outcome = await _read(answers, add)
            outcome.result_started = collector.started
            if outcome.error is None and not frames.exhausted and not collector.started:
                outcome.error = broken("the call ended well before everything was sent")
                outcome.local = True
            return outcome

        try:
            await self._tries(timeout, report).run(attempt)
        finally:
            report.close()
        return collector.finish(request.header.layer_name)

    async def create_calibration(
        self, request: c.CreateCalibrationRequest, timeout: float | None
    ) -> c.Calibration:
        return await self.call(_methods.CREATE_CALIBRATION, request, timeout)

    async def find_calibration(self, id_or_label: str, timeout: float | None) -> c.Calibration:
        """The calibration with this id or, where there is none, this label."""
        if not id_or_label:
            raise invalid("calibration_id", "expected an id or a label, got none")
        try:
            return await self.get_calibration(id_or_label, timeout)
        except (NotFound, InvalidArgument):
            # A label need not look like an id, which the server may say in either way.
            labelled = [found.id async for found in self.list_calibrations(id_or_label, 0, timeout)]
        if not labelled:
            raise NotFound(f'no calibration has the id or the label "{id_or_label}"')
        if len(labelled) > 1:
            raise FailedPrecondition(
                f'{len(labelled)} calibrations have the label "{id_or_label}": '
                + ", ".join(labelled)
            )
        # Lists leave the streams out.
        return await self.get_calibration(labelled[0], timeout)

    async def get_calibration(self, calibration_id: str, timeout: float | None) -> c.Calibration:
        request = c.GetCalibrationRequest(calibration_id=calibration_id)
        return await self.call(_methods.GET_CALIBRATION, request, timeout)

    def list_calibrations(
        self, label: str, page_size: int, timeout: float | None
    ) -> AsyncIterator[c.Calibration]:
        request = c.ListCalibrationsRequest(label=label, page_size=page_size)
        return self.pages(
            _methods.LIST_CALIBRATIONS, request, lambda page: page.calibrations, timeout
        )

    async def finalize(
        self,
        calibration_id: str,
        expected_tokens: int | None,
        expected_streams: Iterable[str],
        timeout: float | None,
    ) -> c.Calibration:
        request = c.FinalizeCalibrationRequest(
            calibration_id=calibration_id,
            expected_tokens=expected_tokens,
            expected_stream_ids=expected_streams,
        )
        return await self.call(_methods.FINALIZE_CALIBRATION, request, timeout)

    async def delete_calibration(self, calibration_id: str, timeout: float | None) -> None:
        request = c.DeleteCalibrationRequest(calibration_id=calibration_id)
        await self.call(_methods.DELETE_CALIBRATION, request, timeout)

    def sender(
        self,
        calibration: c.Calibration,
        stream_id: str,
        x: DataType,
        x_quantized: DataType,
        chunk_rows: int,
        window_bytes: int,
        timeout: float | None,
    ) -> StreamSender:
        """A sender for a stream, which is not open yet."""
        size = row_bytes(calibration.features, x, x_quantized)
        if size > MAX_ROW_BYTES:
            raise invalid(
                "x",
                f"expected rows of 1 to {MAX_ROW_BYTES} bytes (a message carries whole rows), got "
                f"{calibration.features} features",
            )
        if not 0 <= chunk_rows <= MAX_ROW_BYTES // size:
            raise invalid(
                "chunk_rows",
                f"expected 0 to {MAX_ROW_BYTES // size}, what a message holds, got {chunk_rows}",
            )
        if window_bytes < 0:
            raise invalid("window_bytes", f"expected at least 0, got {window_bytes}")
        header = c.AccumulateHeader(
            calibration_id=calibration.id, stream_id=stream_id, x=x, x_quantized=x_quantized
        )
        return StreamSender(
            self.transport,
            self._tries(timeout),
            header,
            calibration.features,
            chunk_rows or rows_in_chunk(CHUNK_BYTES, size),
            window_bytes,
        )

    async def import_statistics(
        self, sums: Sums, progress: ProgressLike, timeout: float | None
    ) -> c.ImportStatisticsResponse:
        first = c.ImportStatisticsRequest(header=sums.header).SerializeToString()
        return await self._upload(
            _methods.IMPORT_STATISTICS,
            lambda: statistics_frames(sums.tensors, self.chunk_bytes),
            first,
            sum(tensor.bytes for tensor in sums.tensors),
            Reporter(progress, sums.header.stream_id),
            timeout,
        )

    async def export_statistics(
        self, calibration_id: str, portion: c.Portion, timeout: float | None
    ) -> Statistics:
        request = c.ExportStatisticsRequest(
            calibration_id=calibration_id, portion=portion, layout=c.MATRIX_LAYOUT_UPPER
        )
        found: list[StatisticsCollector] = []

        async def attempt(seconds: float | None) -> Outcome:
            # An export that breaks starts from the beginning.
            found[:] = [StatisticsCollector(portion)]
            answers = self.transport.download(_methods.EXPORT_STATISTICS, request, seconds)
            return await _read(answers, found[0].add)

        await self._tries(timeout).run(attempt)
        return found[0].finish()

    async def submit(
        self,
        header: j.CreateJobHeader,
        weight: Tensor,
        progress: ProgressLike,
        timeout: float | None,
    ) -> j.Job:
        job = await self._upload(
            _methods.CREATE_JOB,
            lambda: weight_frames(j.CreateJobRequest, weight, self.chunk_bytes),
            j.CreateJobRequest(header=header).SerializeToString(),
            weight.bytes,
            Reporter(progress, header.layer_name),
            timeout,
        )
        if not job.id:
            raise broken("job.id: expected one")
        return job

    async def get_job(self, job_id: str, timeout: float | None) -> j.Job:
        return await self.call(_methods.GET_JOB, j.GetJobRequest(job_id=job_id), timeout)

    def list_jobs(
        self, states: list[j.JobState], calibration_id: str, page_size: int, timeout: float | None
    ) -> AsyncIterator[j.Job]:
        request = j.ListJobsRequest(
            states=states, calibration_id=calibration_id, page_size=page_size
        )
        return self.pages(_methods.LIST_JOBS, request, lambda page: page.jobs, timeout)

    async def cancel_job(self, job_id: str, timeout: float | None) -> j.Job:
        return await self.call(_methods.CANCEL_JOB, j.CancelJobRequest(job_id=job_id), timeout)

    async def delete_job(self, job_id: str, timeout: float | None) -> None:
        await self.call(_methods.DELETE_JOB, j.DeleteJobRequest(job_id=job_id), timeout)

    async def watch(self, job_id: str, timeout: float | None) -> AsyncIterator[j.Job]:
        """Yields the job as it is, and whenever it changes, until a final state. A watch that
        breaks goes on within Retry.resume_budget."""
        tries = self._tries(timeout)
        request = j.WatchJobRequest(job_id=job_id)
        came_once = False
        while True:
            began = time.monotonic()
            answers = None
            outcome = Outcome()
            try:
                answers = self.transport.download(_methods.WATCH_JOB, request, tries.remaining())
                async for response in answers:
                    outcome.progressed = came_once = True
                    yield response.job
                    if is_final(response.job):
                        # Nothing follows a final state: the end of the call is not waited for.
                        return
            except Failed as failed:
                outcome.error = failed.error
                outcome.reached_server = failed.reached_server or outcome.progressed
            finally:
                if answers is not None:
                    answers.cancel()
            if outcome.error is None:
                outcome.error = broken("the watch ended before the job did")
                outcome.local = True
            outcome.resumable = came_once
            outcome.elapsed = time.monotonic() - began
            await tries.next(outcome)

    async def wait(self, job_id: str, timeout: float | None) -> j.Job:
        last = j.Job()
        async for job in self.watch(job_id, timeout):
            last = job
        return last

    async def read_result(self, job_id: str, timeout: float | None) -> Layer:
        """Reads a result; a stream that breaks goes on from the byte it came to."""
        # The shape bounds the memory that the result may claim.
        job = await self.get_job(job_id, timeout)
        if min(job.rows, job.features) < 1:
            raise broken(
                f"job: expected rows and features of at least 1, got {job.rows} and {job.features}"
            )
        collector = ResultCollector(job.rows, job.features)

        async def attempt(seconds: float | None) -> Outcome:
            before = collector.received_bytes
            collector.resume()
            request = j.ReadResultRequest(job_id=job_id, byte_offset=before)
            answers = self.transport.download(_methods.READ_RESULT, request, seconds)
            outcome = await _read(answers, collector.add)
            outcome.progressed = collector.received_bytes > before
            outcome.resumable = collector.started
            return outcome

        await self._tries(timeout).run(attempt)
        return collector.finish(job.layer_name)

    async def _upload(
        self,
        method: Method[Request, Response],
        chunks: Callable[[], Iterator[tuple[bytes, int]]],
        first: bytes,
        total: int,
        report: Reporter,
        timeout: float | None,
    ) -> Response:
        found: list[Response] = []

        async def attempt(seconds: float | None) -> Outcome:
            frames = Frames(first, chunks(), lambda sent: report(Upload(sent, total)))
            found.append(await self.transport.upload(method, frames, seconds))
            return Outcome()

        try:
            await self._tries(timeout, report).run(attempt)
        finally:
            report.close()
        return found[0]


async def _read(answers: Answers[T], add: Callable[[T], None]) -> Outcome:
    """Passes all answers of a try to `add`; the outcome says how it ended."""
    came = False
    try:
        async for frame in answers:
            came = True
            add(frame)
    except Failed as failed:
        return failed.outcome(came=came)
    except Internal as error:
        # The client found this error in what the server sent.
        answers.cancel()
        return Outcome(error=error, reached_server=True, local=True)
    except BaseException:
        answers.cancel()
        raise
    return Outcome(reached_server=True)
