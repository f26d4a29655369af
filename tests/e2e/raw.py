"""Quantize calls frame by frame, as no client of ours would make them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from programs import PATIENCE_SECONDS, Server
from stubs import certificate_pb2, service_pb2, service_pb2_grpc, spec_pb2, tensor_pb2

OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_send_message_length", -1),
    # The server promises frames below 4 MiB.
    ("grpc.max_receive_message_length", 4 << 20),
    # A connection of its own.
    ("grpc.use_local_subchannel_pool", 1),
]


def connect(server: Server) -> grpc.Channel:
    return grpc.insecure_channel(server.address, OPTIONS)


def quantize(
    channel: grpc.Channel,
    frames: Iterable[service_pb2.QuantizeRequest],
    timeout: float = PATIENCE_SECONDS,
) -> grpc.Call:
    return service_pb2_grpc.QuantizationServiceStub(channel).Quantize(iter(frames), timeout=timeout)


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


@dataclass(frozen=True)
class Failure:
    """How a call ended, its details unpacked."""

    code: grpc.StatusCode
    message: str
    fields: dict[str, str]
    retry: error_details_pb2.RetryInfo | None
    preconditions: list[str]


def failure(answer: grpc.Call) -> Failure:
    """Reads a call to its end, which must be an error."""
    try:
        for _ in answer:
            pass
    except grpc.RpcError as error:
        return unpack(error)
    raise AssertionError("the call succeeded")


def unpack(error: grpc.RpcError) -> Failure:
    fields: dict[str, str] = {}
    retry = None
    preconditions: list[str] = []
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            assert detail.Unpack(bad)
            fields |= {v.field: v.description for v in bad.field_violations}
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            assert detail.Unpack(retry)
        elif detail.Is(error_details_pb2.PreconditionFailure.DESCRIPTOR):
            precondition = error_details_pb2.PreconditionFailure()
            assert detail.Unpack(precondition)
            preconditions += [v.type for v in precondition.violations]
    return Failure(error.code(), error.details() or "", fields, retry, preconditions)
