"""Ready-made sums of activations: X^T X and, where inputs are mismatched, X~^T X~ and X~^T X."""

import math
from dataclasses import dataclass

import numpy as np

from certiq import tensors
from certiq._proto import calibration_service_pb2 as pb
from certiq._proto import tensor_pb2
from certiq._proto.calibration_service_pb2 import ExportStatisticsResponse, StatisticsHeader
from certiq.errors import DataLoss, broken, invalid
from certiq.tensors import Array, Tensor, TensorLike, dtype_name, shape_text, view_of

# The contract knows no larger calibration.
_MAX_FEATURES = 65_536
_SUMMED = (tensor_pb2.DATA_TYPE_F64, tensor_pb2.DATA_TYPE_F32)


@dataclass(frozen=True)
class Statistics:
    """Sums of one portion of a calibration, float64."""

    tokens: int
    gram: Array
    """X^T X [N, N]."""
    gram_quantized: Array | None = None
    """X~^T X~ [N, N]."""
    cross: Array | None = None
    """X~^T X [N, N]; element (i, j) sums feature i of X~ with feature j of X."""


@dataclass(frozen=True)
class Sums:
    """Sums to import: checked, in the order in which they travel."""

    tensors: list[Tensor]
    header: StatisticsHeader


def sums_of(
    calibration_id: str,
    stream_id: str,
    *,
    gram: TensorLike,
    tokens: int,
    gram_quantized: TensorLike | None,
    cross: TensorLike | None,
    held_out: bool,
) -> Sums:
    """InvalidArgument, naming the tensor, where shapes and types do not fit together. Values are
    the server's to judge."""
    first = view_of("gram", gram)
    if first.dtype not in _SUMMED:
        raise invalid("gram", f"expected F64 or F32, got {dtype_name(first.dtype)}")
    features = _side(first.shape)
    if features < 1:
        raise invalid(
            "gram",
            "expected [N, N] or the [N (N + 1) / 2] of an upper triangle, got "
            + shape_text(first.shape),
        )
    if (gram_quantized is None) != (cross is None):
        raise invalid("gram_quantized, cross", "expected both or none")
    if tokens < 1:
        raise invalid("tokens", f"expected at least 1, got {tokens}")
    found = [first]
    if gram_quantized is not None and cross is not None:
        found.append(view_of("gram_quantized", gram_quantized))
        found.append(view_of("cross", cross))
        for tensor, shape in zip(found[1:], (first.shape, (features, features)), strict=True):
            if (tensor.dtype, tensor.shape) != (first.dtype, shape):
                raise invalid(
                    tensor.name,
                    f"expected {dtype_name(first.dtype)} {shape_text(shape)}, got "
                    f"{dtype_name(tensor.dtype)} {shape_text(tensor.shape)}",
                )
    upper = len(first.shape) == 1
    return Sums(
        found,
        StatisticsHeader(
            calibration_id=calibration_id,
            stream_id=stream_id,
            tokens=tokens,
            portion=pb.PORTION_HELD_OUT if held_out else pb.PORTION_FIT,
            dtype=first.dtype,
            layout=pb.MATRIX_LAYOUT_UPPER if upper else pb.MATRIX_LAYOUT_FULL,
            features=features,
            kind=(pb.CALIBRATION_KIND_MATCHED if cross is None else pb.CALIBRATION_KIND_MISMATCHED),
        ),
    )


def _side(shape: tuple[int, ...]) -> int:
    """N of [N, N] or [N (N + 1) / 2]; 0 for neither."""
    if len(shape) == 2 and shape[0] == shape[1]:
        return shape[0]
    if len(shape) == 1:
        side = (math.isqrt(8 * shape[0] + 1) - 1) // 2
        if side * (side + 1) // 2 == shape[0]:
            return side
    return 0


class StatisticsCollector:
    """Puts an export together, float64 and by upper triangles, and trusts none of it."""

    def __init__(self, portion: pb.Portion) -> None:
        self._portion = portion
        self._header: StatisticsHeader | None = None
        self._data = bytearray()
        self._bytes = 0

    def add(self, frame: ExportStatisticsResponse) -> None:
        kind = frame.WhichOneof("payload")
        if kind == "header":
            self._add_header(frame.header)
        elif kind != "data":
            raise broken("frame: expected a payload, got none")
        elif self._header is None:
            raise broken("data: expected the header first")
        elif len(self._data) + len(frame.data) > self._bytes:
            raise broken(
                f"data: expected {len(self._data) + len(frame.data) - self._bytes} bytes less"
            )
        else:
            self._data += frame.data

    def _add_header(self, header: StatisticsHeader) -> None:
        if self._header is not None:
            raise broken("header: expected one, got a second one")
        n = header.features
        if (
            not 1 <= n <= _MAX_FEATURES
            or header.tokens < 0
            or header.dtype != tensor_pb2.DATA_TYPE_F64
            or header.layout != pb.MATRIX_LAYOUT_UPPER
            or header.portion != self._portion
        ):
            raise broken(
                "header: expected F64 upper triangles of the portion asked for, got "
                + " ".join(str(header).split())
            )
        self._header = header
        elements = n * (n + 1) // 2
        if header.kind == pb.CALIBRATION_KIND_MISMATCHED:
            elements = 2 * elements + n * n
        self._bytes = 8 * elements

    def finish(self) -> Statistics:
        if self._header is None:
            raise DataLoss("the server ended the call without statistics")
        if len(self._data) != self._bytes:
            raise DataLoss(
                f"the server ended the call within the sums: expected {self._bytes} bytes, got "
                f"{len(self._data)}"
            )
        n = self._header.features
        values = tensors.from_bytes(
            memoryview(self._data), tensor_pb2.DATA_TYPE_F64, (self._bytes // 8,)
        )
        triangle = n * (n + 1) // 2
        gram = _full(values[:triangle], n)
        if self._header.kind != pb.CALIBRATION_KIND_MISMATCHED:
            return Statistics(self._header.tokens, gram)
        quantized = _full(values[triangle : 2 * triangle], n)
        cross = values[2 * triangle :].reshape(n, n).copy()
        return Statistics(self._header.tokens, gram, quantized, cross)


def _full(triangle: Array, n: int) -> Array:
    full: Array = np.empty((n, n))
    at = 0
    for row in range(n):
        full[row, row:] = full[row:, row] = triangle[at : at + n - row]
        at += n - row
    return full
