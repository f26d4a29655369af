"""Messages that carry rows, encoded straight from the memory they lie in.

protobuf's own way copies rows into a message and again into its encoding. A message's encoding is
that of its fields, one after the other, so that of everything but the rows is made by protobuf
and the rows are put beside it, in one copy.
"""

from collections.abc import Iterator, Mapping

from google.protobuf.message import Message

from certiq._proto.calibration_service_pb2 import (
    AccumulateChunk,
    AccumulateRequest,
    ImportStatisticsRequest,
)
from certiq._proto.job_service_pb2 import CreateJobRequest
from certiq._proto.quantization_service_pb2 import QuantizeRequest
from certiq._proto.tensor_pb2 import ActivationChunk, TensorChunk
from certiq.tensors import Tensor, rows_in_chunk

Piece = bytes | memoryview
_LENGTH_DELIMITED = 2


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _field(kind: type[Message], name: str, length: int) -> bytes:
    """The tag and length before the value of a field of bytes or of a message."""
    number = kind.DESCRIPTOR.fields_by_name[name].number
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(length)


def encode(
    frame: type[Message], field: str, chunk: Message, blobs: Mapping[str, list[Piece]]
) -> bytes:
    """`frame` with `chunk` in `field`, and in the chunk's own fields the bytes of `blobs`."""
    pieces: list[Piece] = [chunk.SerializeToString()]
    for name, parts in blobs.items():
        pieces.append(_field(type(chunk), name, sum(len(part) for part in parts)))
        pieces += parts
    length = sum(len(piece) for piece in pieces)
    return b"".join([_field(frame, field, length), *pieces])


def weight_frames(
    frame: type[QuantizeRequest] | type[CreateJobRequest], weight: Tensor, chunk_bytes: int
) -> Iterator[tuple[bytes, int]]:
    """Encoded frames and the bytes of tensors in each."""
    rows = weight.shape[0]
    step = rows_in_chunk(chunk_bytes, weight.row_bytes)
    for row in range(0, rows, step):
        data = weight.rows(row, min(row + step, rows))
        yield encode(frame, "weight", TensorChunk(row_offset=row), {"data": [data]}), len(data)


def activation_frames(
    x: Tensor, x_quantized: Tensor | None, chunk_bytes: int
) -> Iterator[tuple[bytes, int]]:
    rows = x.shape[0]
    row_bytes = x.row_bytes + (x_quantized.row_bytes if x_quantized is not None else 0)
    step = rows_in_chunk(chunk_bytes, row_bytes)
    for row in range(0, rows, step):
        stop = min(row + step, rows)
        blobs: dict[str, list[Piece]] = {"x": [x.rows(row, stop)]}
        if x_quantized is not None:
            blobs["x_quantized"] = [x_quantized.rows(row, stop)]
        chunk = ActivationChunk(row_offset=row)
        yield encode(QuantizeRequest, "activation", chunk, blobs), (stop - row) * row_bytes


def accumulate_frame(sequence: int, x: list[Piece], x_quantized: list[Piece]) -> bytes:
    blobs = {"x": x, "x_quantized": x_quantized} if x_quantized else {"x": x}
    return encode(AccumulateRequest, "chunk", AccumulateChunk(sequence=sequence), blobs)


def statistics_frames(sums: list[Tensor], chunk_bytes: int) -> Iterator[tuple[bytes, int]]:
    for tensor in sums:
        step = rows_in_chunk(chunk_bytes, tensor.row_bytes)
        for row in range(0, tensor.shape[0], step):
            data = tensor.rows(row, min(row + step, tensor.shape[0]))
            yield _field(ImportStatisticsRequest, "data", len(data)) + data, len(data)
