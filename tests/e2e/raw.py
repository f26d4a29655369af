"""Calls frame by frame, as the package never makes them: broken, repeated, cut short, timed.

Nothing here tries again, checks what it sends, or hides how a call ended.
"""

import queue
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import certiq
import grpc
import numpy as np
from certiq.errors import from_rpc_error
from programs import PATIENCE_SECONDS
from stubs import (
    CALIBRATIONS,
    JOBS,
    QUANTIZATION,
    calibration_pb2,
    certificate_pb2,
    job_pb2,
    service_pb2,
    spec_pb2,
    stub,
    tensor_pb2,
)
from sums import DTYPES, Source

OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_send_message_length", -1),
    # The server promises frames below 4 MiB.
    ("grpc.max_receive_message_length", 4 << 20),
    # Each channel has a connection of its own.
    ("grpc.use_local_subchannel_pool", 1),
]
# A client with this policy shows every failure as it came.
ONCE = certiq.Retry(max_attempts=1, resume_budget=0.0)


class Listener(Protocol):
    """A server, or what stands before one."""

    @property
    def address(self) -> str: ...


def connect(server: Listener) -> grpc.Channel:
    return grpc.insecure_channel(server.address, OPTIONS)


class Calls:
    """The stubs of all services, on a channel of their own unless one is given."""

    def __init__(self, server: Listener, channel: grpc.Channel | None = None) -> None:
        self.channel = connect(server) if channel is None else channel
        self.quantization = stub(self.channel, QUANTIZATION)
        self.calibrations = stub(self.channel, CALIBRATIONS)
        self.jobs = stub(self.channel, JOBS)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Metadata of a call; none without a token."""
    return (("authorization", f"Bearer {token}"),) if token else ()


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


# How calls fail: the package's error, whoever made the call.


def refusal(call: Callable[[], object]) -> certiq.Error:
    """The error of a call that must not succeed."""
    try:
        call()
    except grpc.RpcError as error:
        return from_rpc_error(error)
    except certiq.Error as error:
        return error
    raise AssertionError("the call succeeded")


def failure(answer: grpc.Call) -> certiq.Error:
    """Reads a call to its end, which must be an error."""
    return refusal(lambda: list(answer))


def fields(error: certiq.Error) -> dict[str, str]:
    """The fields at fault, and why."""
    return {violation.field: violation.description for violation in error.violations}


def kinds(error: certiq.Error) -> list[str]:
    """The types of the preconditions that failed."""
    return [violation.type for violation in error.preconditions]


# Accumulate.


def header(calibration_id: str, source: Source) -> calibration_pb2.AccumulateRequest:
    header = calibration_pb2.AccumulateHeader(
        calibration_id=calibration_id, stream_id=source.stream_id, x=DTYPES[source.x.dtype.str]
    )
    if source.x_quantized is not None:
        header.x_quantized = DTYPES[source.x_quantized.dtype.str]
    return calibration_pb2.AccumulateRequest(header=header)


def chunk(sequence: int, x: bytes, x_quantized: bytes = b"") -> calibration_pb2.AccumulateRequest:
    return calibration_pb2.AccumulateRequest(
        chunk=calibration_pb2.AccumulateChunk(sequence=sequence, x=x, x_quantized=x_quantized)
    )


def chunk_of(source: Source, sequence: int) -> calibration_pb2.AccumulateRequest:
    rows = slice(sequence * source.chunk_rows, (sequence + 1) * source.chunk_rows)
    quantized = b"" if source.x_quantized is None else source.x_quantized[rows].tobytes()
    return chunk(sequence, source.x[rows].tobytes(), quantized)


class AccumulateCall:
    """One open call of a stream."""

    def __init__(
        self,
        calls: Calls,
        calibration: certiq.Calibration,
        source: Source,
        token: str = "",
        timeout: float = PATIENCE_SECONDS,
    ) -> None:
        self._source = source
        self._pipe = Pipe()
        self._pipe.send(header(calibration.id, source))
        self._call = calls.calibrations.Accumulate(
            iter(self._pipe), timeout=timeout, metadata=bearer(token)
        )
        self._last = calibration_pb2.StreamProgress()

    def send(self, *chunks: int | calibration_pb2.AccumulateRequest) -> None:
        """Chunks of the source by their numbers, or others."""
        for one in chunks:
            self._pipe.send(chunk_of(self._source, one) if isinstance(one, int) else one)

    def next(self) -> calibration_pb2.StreamProgress:
        """The next answer; grpc.RpcError where the call failed."""
        try:
            self._last = next(self._call).progress
            return self._last
        except (grpc.RpcError, StopIteration):
            self._pipe.close()
            raise

    def wait_received(self, position: int) -> calibration_pb2.StreamProgress:
        while True:
            progress = self.next()
            if progress.received >= position:
                return progress

    def finish(self) -> calibration_pb2.StreamProgress:
        """Half-closes and reads to the end; the last answer of all."""
        self._pipe.close()
        for answer in self._call:
            self._last = answer.progress
        return self._last

    def cancel(self) -> None:
        self._call.cancel()
        self._pipe.close()

    def failure(self) -> certiq.Error:
        """Reads to the end, which must be an error."""
        found = failure(self._call)
        self._pipe.close()
        return found


# Results of jobs.


@dataclass
class StoredResult:
    """The answer to one ReadResult, from its offset on."""

    offset: int = 0
    header: service_pb2.ResultHeader | None = None
    data: bytearray = field(default_factory=bytearray)
    certificate: certificate_pb2.Certificate | None = None

    def take(self, answer: Iterable[job_pb2.ReadResultResponse]) -> "StoredResult":
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
        assert self.header is not None
        assert self.certificate is not None
        assert self.offset + len(self.data) == self.header.total_bytes
        return self


def read_result(calls: Calls, job: certiq.Job, offset: int = 0) -> StoredResult:
    request = job_pb2.ReadResultRequest(job_id=job.id, byte_offset=offset)
    return StoredResult(offset).take(calls.jobs.ReadResult(request, timeout=PATIENCE_SECONDS))


def timeless(certificate: certificate_pb2.Certificate) -> bytes:
    """The certificate without what differs between runs."""
    copy = certificate_pb2.Certificate()
    copy.CopyFrom(certificate)
    copy.ClearField("phase_seconds")
    return copy.SerializeToString(deterministic=True)


# CreateJob.


def job_frames(
    header: job_pb2.CreateJobHeader, W: np.ndarray, chunk_rows: int = 256
) -> Iterator[job_pb2.CreateJobRequest]:
    """Announces the weights unless the header does."""
    if not header.HasField("weight"):
        header.weight.CopyFrom(announce("weight", W.shape, DTYPES[W.dtype.str]))
    yield job_pb2.CreateJobRequest(header=header)
    for row in range(0, len(W), chunk_rows):
        data = W[row : row + chunk_rows].tobytes()
        yield job_pb2.CreateJobRequest(weight=tensor_pb2.TensorChunk(row_offset=row, data=data))


# Quantize.


def quantize(
    channel: grpc.Channel,
    frames: Iterable[service_pb2.QuantizeRequest],
    timeout: float = PATIENCE_SECONDS,
) -> grpc.Call:
    return stub(channel, QUANTIZATION).Quantize(iter(frames), timeout=timeout)


@dataclass
class Layer:
    """Float32 weights and activations, and the header that announces them."""

    W: np.ndarray
    X: np.ndarray
    header: service_pb2.QuantizeHeader = field(init=False)

    def __post_init__(self) -> None:
        self.W = self.W.astype("<f4")
        self.X = self.X.astype("<f4")
        self.header = service_pb2.QuantizeHeader(
            request_id="e2e",
            layer_name="layer",
            spec=spec_pb2.QuantizationSpec(bits=4),
            weight=announce("weight", self.W.shape),
            x=announce("x", self.X.shape),
        )

    @staticmethod
    def made_up(rows: int, features: int, tokens: int, seed: int = 1) -> "Layer":
        random = np.random.default_rng(seed)
        return Layer(
            random.standard_normal((rows, features), dtype=np.float32),
            random.standard_normal((tokens, features), dtype=np.float32),
        )

    def header_frame(self) -> service_pb2.QuantizeRequest:
        return service_pb2.QuantizeRequest(header=self.header)

    def weight_frames(self, rows: int = 256) -> Iterator[service_pb2.QuantizeRequest]:
        for row in range(0, len(self.W), rows):
            yield weight_frame(row, self.W[row : row + rows].tobytes())

    def activation_frames(self, rows: int = 256) -> Iterator[service_pb2.QuantizeRequest]:
        for row in range(0, len(self.X), rows):
            yield activation_frame(row, self.X[row : row + rows].tobytes())

    def frames(self, rows: int = 256) -> Iterator[service_pb2.QuantizeRequest]:
        yield self.header_frame()
        yield from self.weight_frames(rows)
        yield from self.activation_frames(rows)


def announce(
    name: str, shape: Iterable[int], dtype: int = tensor_pb2.DATA_TYPE_F32
) -> tensor_pb2.TensorHeader:
    return tensor_pb2.TensorHeader(name=name, dtype=dtype, shape=shape)


def weight_frame(row: int, data: bytes) -> service_pb2.QuantizeRequest:
    return service_pb2.QuantizeRequest(weight=tensor_pb2.TensorChunk(row_offset=row, data=data))


def activation_frame(row: int, x: bytes, x_quantized: bytes = b"") -> service_pb2.QuantizeRequest:
    return service_pb2.QuantizeRequest(
        activation=tensor_pb2.ActivationChunk(row_offset=row, x=x, x_quantized=x_quantized)
    )


@dataclass
class Result:
    """An answer whose order and sizes were checked while it came."""

    tensors: dict[str, np.ndarray]
    certificate: certificate_pb2.Certificate


NUMPY = {tensor_pb2.DATA_TYPE_F32: "<f4", tensor_pb2.DATA_TYPE_I32: "<i4"}


def collect(answer: Iterable[service_pb2.QuantizeResponse]) -> Result:
    """Progress, then the result header, its chunks in order, then the certificate."""
    order = ("progress", "result", "chunk", "certificate")
    stage = 0
    header = None
    parts: list[bytearray] = []
    certificate = None
    for frame in answer:
        kind = frame.WhichOneof("payload")
        assert order.index(kind) >= stage, f"{kind} after {order[stage]}"
        stage = order.index(kind)
        if kind == "progress":
            assert 0 <= frame.progress.fraction <= 1
        elif kind == "result":
            assert header is None
            header = frame.result
            parts = [bytearray() for _ in header.tensors]
        elif kind == "chunk":
            assert header is not None
            tensor = header.tensors[frame.chunk.tensor]
            row_bytes = int(np.prod(tensor.shape[1:])) * 4
            part = parts[frame.chunk.tensor]
            assert len(part) == frame.chunk.row_offset * row_bytes
            assert frame.chunk.data
            assert len(frame.chunk.data) % row_bytes == 0
            part += frame.chunk.data
        elif certificate is None:
            certificate = frame.certificate
        else:
            certificate.MergeFrom(frame.certificate)
    assert header is not None
    assert certificate is not None
    assert sum(map(len, parts)) == header.total_bytes
    return Result(
        {
            tensor.name: np.frombuffer(part, NUMPY[tensor.dtype]).reshape(tensor.shape)
            for tensor, part in zip(header.tensors, parts, strict=True)
        },
        certificate,
    )


def relative_error(layer: Layer, result: Result) -> float:
    W, X = layer.W.astype(np.float64), layer.X.astype(np.float64)
    Q = result.tensors["weight"].astype(np.float64)
    return float(np.linalg.norm(X @ (W - Q).T) / np.linalg.norm(X @ W.T))
