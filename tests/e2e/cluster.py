"""CalibrationService and JobService as the contract tells a client to use them."""

import queue
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import grpc
import numpy as np
from google.protobuf import duration_pb2
from programs import PATIENCE_SECONDS, Server
from raw import OPTIONS, Failure, announce, unpack
from stubs import (
    calibration_pb2,
    calibration_pb2_grpc,
    certificate_pb2,
    job_pb2,
    job_pb2_grpc,
    service_pb2,
    spec_pb2,
    tensor_pb2,
)
from sums import DTYPES, FIT, UPPER, Source, Sums

FINAL = {
    job_pb2.JOB_STATE_SUCCEEDED,
    job_pb2.JOB_STATE_FAILED,
    job_pb2.JOB_STATE_CANCELLED,
    job_pb2.JOB_STATE_EXPIRED,
}


class Pipe:
    """Requests of a streaming call, handed over one by one."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[object] = queue.SimpleQueue()

    def send(self, message: object) -> None:
        self._queue.put(message)

    def close(self) -> None:
        self._queue.put(None)

    def __iter__(self) -> Iterator[object]:
        return iter(self._queue.get, None)


class AccumulateCall:
    """One open call of a stream."""

    def __init__(self, client: "Client", header: calibration_pb2.AccumulateRequest) -> None:
        self._pipe = Pipe()
        self._pipe.send(header)
        self._call = client.calibrations.Accumulate(
            iter(self._pipe), timeout=PATIENCE_SECONDS, metadata=client.metadata
        )

    def send(self, message: calibration_pb2.AccumulateRequest) -> None:
        self._pipe.send(message)

    def next(self) -> calibration_pb2.StreamProgress:
        """The next answer; grpc.RpcError where the call failed."""
        try:
            return next(self._call).progress
        except (grpc.RpcError, StopIteration):
            self._pipe.close()
            raise

    def wait_received(self, position: int) -> calibration_pb2.StreamProgress:
        while True:
            progress = self.next()
            if progress.received >= position:
                return progress

    def finish(self) -> calibration_pb2.StreamProgress | None:
        """Half-closes and reads to the end; the last answer, if one came."""
        self._pipe.close()
        last = None
        for answer in self._call:
            last = answer.progress
        return last

    def cancel(self) -> None:
        self._call.cancel()
        self._pipe.close()

    def failure(self) -> Failure:
        """Reads to the end, which must be an error."""
        try:
            while True:
                self.next()
        except StopIteration:
            raise AssertionError("the call succeeded") from None
        except grpc.RpcError as error:
            return unpack(error)


@dataclass
class Result:
    """The answer to one ReadResult, from its offset on."""

    offset: int
    header: service_pb2.ResultHeader | None = None
    data: bytearray = field(default_factory=bytearray)
    certificate: certificate_pb2.Certificate | None = None

    def take(self, answer: Iterable[job_pb2.ReadResultResponse]) -> None:
        """Adds what comes; keeps what came if the call breaks."""
        for frame in answer:
            kind = frame.WhichOneof("payload")
            if kind == "result":
                assert self.header is None
                assert not self.data
                self.header = frame.result
            elif kind == "data":
                assert self.certificate is None
                assert frame.data.byte_offset == self.offset + len(self.data)
                assert frame.data.data
                self.data += frame.data.data
            elif self.certificate is None:
                self.certificate = frame.certificate
            else:
                self.certificate.MergeFrom(frame.certificate)

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        assert self.header is not None
        assert self.offset == 0
        names = {code: name for name, code in DTYPES.items()} | {tensor_pb2.DATA_TYPE_I32: "<i4"}
        found = {}
        at = 0
        for tensor in self.header.tensors:
            dtype = np.dtype(names[tensor.dtype])
            size = int(np.prod(tensor.shape)) * dtype.itemsize
            found[tensor.name] = np.frombuffer(self.data[at : at + size], dtype).reshape(
                tensor.shape
            )
            at += size
        assert at == len(self.data)
        return found

    def timeless(self) -> bytes:
        """The certificate without what differs between runs."""
        assert self.certificate is not None
        certificate = certificate_pb2.Certificate()
        certificate.CopyFrom(self.certificate)
        certificate.ClearField("phase_seconds")
        return certificate.SerializeToString(deterministic=True)


def refusal(call: Callable[[], object]) -> Failure:
    """How a call failed, which must not succeed."""
    try:
        call()
    except grpc.RpcError as error:
        return unpack(error)
    raise AssertionError("the call succeeded")


def seconds(value: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(int(value * 1e9))
    return duration


@dataclass
class JobRequest:
    """A job's header and its weights."""

    calibration_id: str
    W: np.ndarray
    spec: spec_pb2.QuantizationSpec = field(
        default_factory=lambda: spec_pb2.QuantizationSpec(bits=4)
    )
    request_id: str = ""
    priority: int = 0
    deadline: float | None = None
    ttl: float | None = None
    chunk_rows: int = 256

    def frames(self) -> Iterator[job_pb2.CreateJobRequest]:
        header = job_pb2.CreateJobHeader(
            request_id=self.request_id,
            layer_name="layer",
            spec=self.spec,
            weight=announce("weight", self.W.shape, DTYPES[self.W.dtype.str]),
            calibration_id=self.calibration_id,
            priority=self.priority,
        )
        if self.deadline is not None:
            header.deadline.CopyFrom(seconds(self.deadline))
        if self.ttl is not None:
            header.ttl.CopyFrom(seconds(self.ttl))
        yield job_pb2.CreateJobRequest(header=header)
        for row in range(0, len(self.W), self.chunk_rows):
            data = self.W[row : row + self.chunk_rows].tobytes()
            yield job_pb2.CreateJobRequest(weight=tensor_pb2.TensorChunk(row_offset=row, data=data))


class Client:
    """Every method is one call; none tries again."""

    def __init__(self, address: str, token: str = "") -> None:
        self.channel = grpc.insecure_channel(address, OPTIONS)
        self.calibrations = calibration_pb2_grpc.CalibrationServiceStub(self.channel)
        self.jobs = job_pb2_grpc.JobServiceStub(self.channel)
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._options = {"timeout": PATIENCE_SECONDS, "metadata": self.metadata}

    @staticmethod
    def of(server: Server, token: str = "") -> "Client":
        return Client(server.address, token)

    def create(
        self,
        features: int,
        *,
        kind: int = calibration_pb2.CALIBRATION_KIND_UNSPECIFIED,
        request_id: str = "",
        fraction: float = 0,
        sequence_rows: int = 0,
        labels: Iterable[str] = (),
        ttl: float | None = None,
    ) -> calibration_pb2.Calibration:
        request = calibration_pb2.CreateCalibrationRequest(
            request_id=request_id,
            features=features,
            kind=kind,
            held_out_fraction=fraction,
            sequence_rows=sequence_rows,
            labels=labels,
        )
        if ttl is not None:
            request.ttl.CopyFrom(seconds(ttl))
        return self.calibrations.CreateCalibration(request, **self._options)

    def open(self, calibration_id: str, source: Source) -> AccumulateCall:
        return AccumulateCall(self, source.header(calibration_id))

    def accumulate(
        self, calibration_id: str, source: Source, give_up_after: int | None = None
    ) -> calibration_pb2.StreamProgress | None:
        """Sends what is missing. None where it gave up, by cancelling after so many chunks."""
        call = self.open(calibration_id, source)
        progress = call.next()
        sent = range(progress.received, source.chunks)
        for sequence in sent[:give_up_after]:
            call.send(source.chunk(sequence))
        if give_up_after is not None and give_up_after < len(sent):
            if give_up_after > 0:
                call.next()
            call.cancel()
            return None
        return call.finish() or progress

    def import_sums(
        self,
        calibration_id: str,
        stream_id: str,
        sums: Sums,
        *,
        portion: int = FIT,
        layout: int = UPPER,
        dtype: str = "<f8",
        data: bytes | None = None,
        chunk_bytes: int = 4096,
    ) -> calibration_pb2.ImportStatisticsResponse:
        header = calibration_pb2.StatisticsHeader(
            calibration_id=calibration_id,
            stream_id=stream_id,
            tokens=sums.tokens,
            portion=portion,
            dtype=DTYPES[dtype],
            layout=layout,
        )
        data = sums.bytes(layout, dtype) if data is None else data

        def frames() -> Iterator[calibration_pb2.ImportStatisticsRequest]:
            yield calibration_pb2.ImportStatisticsRequest(header=header)
            for at in range(0, len(data), chunk_bytes):
                yield calibration_pb2.ImportStatisticsRequest(data=data[at : at + chunk_bytes])

        return self.calibrations.ImportStatistics(frames(), **self._options)

    def export(self, calibration_id: str, portion: int = FIT, layout: int = UPPER) -> Sums:
        answer = self.calibrations.ExportStatistics(
            calibration_pb2.ExportStatisticsRequest(
                calibration_id=calibration_id, portion=portion, layout=layout
            ),
            **self._options,
        )
        header = next(answer).header
        assert header.layout == layout
        return Sums.parse(header, b"".join(frame.data for frame in answer))

    def finalize(
        self, calibration_id: str, tokens: int | None = None, streams: Iterable[str] = ()
    ) -> calibration_pb2.Calibration:
        return self.calibrations.FinalizeCalibration(
            calibration_pb2.FinalizeCalibrationRequest(
                calibration_id=calibration_id, expected_tokens=tokens, expected_stream_ids=streams
            ),
            **self._options,
        )

    def get(self, calibration_id: str) -> calibration_pb2.Calibration:
        request = calibration_pb2.GetCalibrationRequest(calibration_id=calibration_id)
        return self.calibrations.GetCalibration(request, **self._options)

    def calibration_page(
        self, size: int = 0, token: str = "", label: str = ""
    ) -> calibration_pb2.ListCalibrationsResponse:
        request = calibration_pb2.ListCalibrationsRequest(
            page_size=size, page_token=token, label=label
        )
        return self.calibrations.ListCalibrations(request, **self._options)

    def list_calibrations(
        self, size: int = 0, label: str = ""
    ) -> list[calibration_pb2.Calibration]:
        found: list[calibration_pb2.Calibration] = []
        token = ""
        while True:
            page = self.calibration_page(size, token, label)
            found += page.calibrations
            token = page.next_page_token
            if not token:
                return found

    def delete(self, calibration_id: str) -> None:
        request = calibration_pb2.DeleteCalibrationRequest(calibration_id=calibration_id)
        self.calibrations.DeleteCalibration(request, **self._options)

    def create_job(self, request: JobRequest) -> job_pb2.Job:
        return self.jobs.CreateJob(request.frames(), **self._options)

    def get_job(self, job_id: str) -> job_pb2.Job:
        return self.jobs.GetJob(job_pb2.GetJobRequest(job_id=job_id), **self._options)

    def list_jobs(
        self, size: int = 0, states: Iterable[int] = (), calibration_id: str = ""
    ) -> list[job_pb2.Job]:
        found: list[job_pb2.Job] = []
        request = job_pb2.ListJobsRequest(
            page_size=size, states=states, calibration_id=calibration_id
        )
        while True:
            page = self.jobs.ListJobs(request, **self._options)
            found += page.jobs
            request.page_token = page.next_page_token
            if not request.page_token:
                return found

    def cancel_job(self, job_id: str) -> job_pb2.Job:
        return self.jobs.CancelJob(job_pb2.CancelJobRequest(job_id=job_id), **self._options)

    def delete_job(self, job_id: str) -> None:
        self.jobs.DeleteJob(job_pb2.DeleteJobRequest(job_id=job_id), **self._options)

    def watch(self, job_id: str) -> Iterator[job_pb2.Job]:
        for answer in self.jobs.WatchJob(job_pb2.WatchJobRequest(job_id=job_id), **self._options):
            yield answer.job

    def wait_job(self, job_id: str) -> job_pb2.Job:
        """Watches until its final state."""
        last = list(self.watch(job_id))[-1]
        assert last.state in FINAL
        return last

    def read_frames(self, job_id: str, offset: int = 0) -> grpc.Call:
        request = job_pb2.ReadResultRequest(job_id=job_id, byte_offset=offset)
        return self.jobs.ReadResult(request, **self._options)

    def read(self, job_id: str, offset: int = 0) -> Result:
        result = Result(offset)
        result.take(self.read_frames(job_id, offset))
        assert result.header is not None
        assert result.certificate is not None
        assert offset + len(result.data) == result.header.total_bytes
        return result
