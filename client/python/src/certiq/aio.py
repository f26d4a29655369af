"""The client for asyncio: what certiq.Client has, under the same names, to be awaited.

    async with certiq.aio.Client("127.0.0.1:8470") as client:
        async with client.calibration(features=576) as calibration:
            async with calibration.stream("rank-0") as stream:
                await stream.send(x)
            await calibration.finalize()
            job = await client.submit(weight, calibration=calibration)
            layer = await job.result()

Cancelling a task cancels its call. Errors and arguments are those of certiq.Client.
"""

from collections.abc import AsyncIterator, Generator, Iterable
from types import TracebackType
from typing import Any, Self

from certiq._aio_transport import AioTransport
from certiq._client_base import ClientBase
from certiq._core import Core
from certiq._job_state import state_of
from certiq._proto import calibration_service_pb2 as c
from certiq._requests import calibration_request, job_request, layer_request
from certiq._rows import RowStream
from certiq._sender import WINDOW_BYTES
from certiq._tries import Deadline
from certiq.calibration import CalibrationInfo, StreamInfo, calibration_id
from certiq.errors import Error
from certiq.jobs import JobBar, JobInfo
from certiq.layer import Layer
from certiq.progress import ProgressLike
from certiq.spec import SpecLike
from certiq.statistics import Statistics, sums_of
from certiq.tensors import TensorLike


class ActivationStream(StreamInfo):
    """certiq.ActivationStream, for one task at a time."""

    async def send(self, x: TensorLike, x_quantized: TensorLike | None = None) -> None:
        await self._rows.send(x, x_quantized)

    async def close(self) -> c.StreamProgress:
        return await self._rows.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            await self.close()
        else:
            self.abort()


class Calibration(CalibrationInfo):
    """certiq.Calibration."""

    async def refresh(self, *, timeout: float | None = None) -> Self:
        self.info = await self._core.get_calibration(self.id, timeout)
        return self

    def stream(
        self,
        stream_id: str,
        *,
        chunk_rows: int = 0,
        window_bytes: int = WINDOW_BYTES,
        timeout: float | None = None,
    ) -> ActivationStream:
        rows = RowStream(self._core, self.info, stream_id, chunk_rows, window_bytes, timeout)
        return ActivationStream(rows)

    async def import_statistics(
        self,
        *,
        stream_id: str,
        gram: TensorLike,
        tokens: int,
        gram_quantized: TensorLike | None = None,
        cross: TensorLike | None = None,
        held_out: bool = False,
        progress: ProgressLike = None,
        timeout: float | None = None,
    ) -> bool:
        sums = sums_of(
            self.id,
            stream_id,
            gram=gram,
            tokens=tokens,
            gram_quantized=gram_quantized,
            cross=cross,
            held_out=held_out,
        )
        response = await self._core.import_statistics(sums, progress, timeout)
        self.info = response.calibration
        return not response.already_committed

    async def export_statistics(
        self, *, held_out: bool = False, timeout: float | None = None
    ) -> Statistics:
        portion = c.PORTION_HELD_OUT if held_out else c.PORTION_FIT
        return await self._core.export_statistics(self.id, portion, timeout)

    async def finalize(
        self,
        *,
        expected_tokens: int | None = None,
        expected_streams: Iterable[str] = (),
        timeout: float | None = None,
    ) -> Self:
        self.info = await self._core.finalize(self.id, expected_tokens, expected_streams, timeout)
        return self

    async def delete(self, *, timeout: float | None = None) -> None:
        await self._core.delete_calibration(self.id, timeout)


class NewCalibration:
    """One that is being made: `await` it, or use it in `async with`, which deletes it at the end
    unless `keep`."""

    def __init__(
        self, core: Core, request: c.CreateCalibrationRequest, keep: bool, timeout: float | None
    ) -> None:
        self._core = core
        self._request = request
        self._keep = keep
        self._timeout = timeout
        self._made: Calibration | None = None

    async def _make(self) -> Calibration:
        if self._made is None:
            info = await self._core.create_calibration(self._request, self._timeout)
            self._made = Calibration(self._core, info, self._keep)
        return self._made

    def __await__(self) -> Generator[Any, None, Calibration]:
        return self._make().__await__()

    async def __aenter__(self) -> Calibration:
        return await self._make()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        made = await self._make()
        if made.keep:
            return
        try:
            await made.delete()
        except Error as failed:
            made._could_not_delete(failed, error)


class Job(JobInfo):
    """certiq.Job."""

    async def refresh(self, *, timeout: float | None = None) -> Self:
        self.info = await self._core.get_job(self.id, timeout)
        return self

    async def done(self) -> bool:
        return self.ended or (await self.refresh()).ended

    async def cancel(self, *, timeout: float | None = None) -> Self:
        self.info = await self._core.cancel_job(self.id, timeout)
        return self

    async def delete(self, *, timeout: float | None = None) -> None:
        await self._core.delete_job(self.id, timeout)

    async def watch(self, *, timeout: float | None = None) -> AsyncIterator[Self]:
        async for info in self._core.watch(self.id, timeout):
            self.info = info
            yield self

    async def wait(self, *, timeout: float | None = None) -> Self:
        async for _ in self.watch(timeout=timeout):
            pass
        return self

    async def progress(self, tqdm: Any = None, *, timeout: float | None = None) -> Self:
        bar = JobBar(self, tqdm)
        try:
            async for job in self.watch(timeout=timeout):
                bar.show(job.info)
        finally:
            bar.close()
        return self

    async def result(self, timeout: float | None = None) -> Layer:
        deadline = Deadline(timeout)
        if not self.ended:
            await self.wait(timeout=deadline.remaining())
        if self.error is not None:
            raise self.error
        return await self._core.read_result(self.id, deadline.remaining())


class Client(ClientBase):
    """certiq.Client for asyncio; of any number of event loops, one after the other or at once."""

    _transport = AioTransport

    async def close(self) -> None:
        await self._core.transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def quantize(
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
        return await self._core.quantize(request, progress, timeout)

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
    ) -> NewCalibration:
        request = calibration_request(
            features,
            mismatched=mismatched,
            held_out_fraction=held_out_fraction,
            sequence_rows=sequence_rows,
            labels=labels,
            ttl=ttl,
            request_id=request_id,
        )
        return NewCalibration(self._core, request, keep, timeout)

    async def get_calibration(
        self, id_or_label: str, *, timeout: float | None = None
    ) -> Calibration:
        info = await self._core.find_calibration(id_or_label, timeout)
        return Calibration(self._core, info, keep=True)

    async def calibrations(
        self, *, label: str = "", page_size: int = 0, timeout: float | None = None
    ) -> AsyncIterator[Calibration]:
        async for info in self._core.list_calibrations(label, page_size, timeout):
            yield Calibration(self._core, info, keep=True)

    async def submit(
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
        return Job(self._core, await self._core.submit(header, w, progress, timeout))

    async def get_job(self, job_id: str, *, timeout: float | None = None) -> Job:
        return Job(self._core, await self._core.get_job(job_id, timeout))

    async def jobs(
        self,
        *,
        states: Iterable[str] = (),
        calibration: CalibrationInfo | str | None = None,
        page_size: int = 0,
        timeout: float | None = None,
    ) -> AsyncIterator[Job]:
        wanted = [state_of(state) for state in states]
        async for info in self._core.list_jobs(
            wanted, calibration_id(calibration), page_size, timeout
        ):
            yield Job(self._core, info)
