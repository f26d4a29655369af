"""Arrays of numpy and torch as the contract's tensors, and back.

bfloat16 is ml_dtypes.bfloat16 in numpy, the type that JAX and safetensors' users know.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from certiq._proto import tensor_pb2
from certiq._proto.tensor_pb2 import DataType, TensorHeader
from certiq.errors import invalid

Array = np.ndarray[Any, np.dtype[Any]]
TensorLike = Any
"""A numpy array, a torch tensor of any device, or what numpy makes an array of."""

# A message of the contract carries at most 16 MiB; whole rows, and a little beside them.
MAX_ROW_BYTES = (16 << 20) - 4096

NUMPY: dict[int, np.dtype[Any]] = {
    tensor_pb2.DATA_TYPE_F64: np.dtype("<f8"),
    tensor_pb2.DATA_TYPE_F32: np.dtype("<f4"),
    tensor_pb2.DATA_TYPE_F16: np.dtype("<f2"),
    tensor_pb2.DATA_TYPE_BF16: np.dtype(ml_dtypes.bfloat16),
    tensor_pb2.DATA_TYPE_I64: np.dtype("<i8"),
    tensor_pb2.DATA_TYPE_I32: np.dtype("<i4"),
    tensor_pb2.DATA_TYPE_U8: np.dtype("u1"),
}
FLOATING = frozenset(
    (
        *(tensor_pb2.DATA_TYPE_F64, tensor_pb2.DATA_TYPE_F32),
        *(tensor_pb2.DATA_TYPE_F16, tensor_pb2.DATA_TYPE_BF16),
    )
)
_BY_NAME: dict[str, DataType] = {
    "float64": tensor_pb2.DATA_TYPE_F64,
    "float32": tensor_pb2.DATA_TYPE_F32,
    "float16": tensor_pb2.DATA_TYPE_F16,
    "bfloat16": tensor_pb2.DATA_TYPE_BF16,
    "int64": tensor_pb2.DATA_TYPE_I64,
    "int32": tensor_pb2.DATA_TYPE_I32,
    "uint8": tensor_pb2.DATA_TYPE_U8,
}


def dtype_name(dtype: int) -> str:
    """ "F32", "BF16", ...: the names safetensors uses too."""
    if dtype in NUMPY:
        return DataType.Name(dtype).removeprefix("DATA_TYPE_")
    return "UNSPECIFIED"


def dtype_of(name: str, field: str) -> DataType:
    """The type of a name such as "bf16", "F32" or "float16"."""
    lower = name.lower()
    for long, dtype in _BY_NAME.items():
        if lower in (long, dtype_name(dtype).lower()):
            return dtype
    raise invalid(field, f"expected a dtype such as float32 or bf16, got {name!r}")


def shape_text(shape: Sequence[int]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"


@dataclass(frozen=True)
class Tensor:
    """A tensor that is somebody else's: rows become bytes only when they are sent."""

    name: str
    dtype: DataType
    shape: tuple[int, ...]
    # It gives rows [start, stop) as bytes, row-major and little-endian: a view where they lie so.
    rows: Callable[[int, int], memoryview]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * NUMPY[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def header(self) -> TensorHeader:
        return TensorHeader(name=self.name, dtype=self.dtype, shape=self.shape)

    def __str__(self) -> str:
        return f'"{self.name}" {dtype_name(self.dtype)} {shape_text(self.shape)}'


def _memory(array: Array) -> memoryview:
    """Its bytes; copies only what does not lie in order."""
    contiguous = np.ascontiguousarray(array)
    little = contiguous.astype(contiguous.dtype.newbyteorder("<"), copy=False)
    return little.reshape(-1).view(np.uint8).data.toreadonly()


def view_of(field: str, value: TensorLike, name: str = "") -> Tensor:
    """A tensor of any number of dimensions, at least one. InvalidArgument for other types."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _view_of_torch(torch, field, value, name)
    array = np.asarray(value)
    dtype = _BY_NAME.get(array.dtype.name)
    if dtype is None or array.ndim < 1:
        raise invalid(
            field,
            "expected an array of float64, float32, float16, bfloat16, int64, int32 or uint8, "
            f"got {array.dtype.name} {shape_text(array.shape)}",
        )
    return Tensor(name or field, dtype, array.shape, lambda a, b: _memory(array[a:b]))


def _view_of_torch(torch: Any, field: str, value: Any, name: str) -> Tensor:
    kind = str(value.dtype).removeprefix("torch.")
    dtype = _BY_NAME.get(kind)
    if dtype is None or value.ndim < 1 or value.layout != torch.strided:
        raise invalid(
            field,
            "expected a dense tensor of float64, float32, float16, bfloat16, int64, int32 or "
            f"uint8, got {kind} {shape_text(value.shape)} {value.layout}",
        )
    tensor = value.detach()

    def rows(start: int, stop: int) -> memoryview:
        # Rows come from the device piece by piece. Bits, as numpy has no bfloat16 that torch knows.
        piece = tensor[start:stop].cpu().contiguous()
        return _memory((piece.view(torch.int16) if kind == "bfloat16" else piece).numpy())

    return Tensor(name or field, dtype, tuple(value.shape), rows)


def to_numpy(tensor: Tensor) -> Array:
    """Its values on this machine; a view where that is possible."""
    return from_bytes(tensor.rows(0, tensor.shape[0]), tensor.dtype, tensor.shape)


def from_bytes(data: memoryview, dtype: int, shape: Sequence[int]) -> Array:
    return np.frombuffer(data, NUMPY[dtype]).reshape(shape)


def matrix(field: str, value: TensorLike, name: str = "", *, least_rows: int = 1) -> Tensor:
    """[rows, N]; leading dimensions, of batches for example, become one."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        value = np.asarray(value)
    if value.ndim > 2:
        value = value.reshape(-1, value.shape[-1])
    if value.ndim != 2 or value.shape[0] < least_rows or value.shape[1] < 1:
        raise invalid(
            f"{field}.shape",
            f"expected two dimensions or more of at least 1, got {shape_text(value.shape)}",
        )
    return view_of(field, value, name)


def check_weight(weight: Tensor) -> None:
    if weight.dtype not in FLOATING:
        raise invalid("weight.dtype", f"expected F64, F32, F16 or BF16, got {weight}")
    _check_row("weight.shape", weight.row_bytes)


def check_activations(x: Tensor, x_quantized: Tensor | None) -> None:
    row_bytes = x.row_bytes
    if x_quantized is not None:
        if x_quantized.shape != x.shape:
            raise invalid(
                "x_quantized.shape",
                f"expected {shape_text(x.shape)} to match x {x}, got x_quantized {x_quantized}",
            )
        row_bytes += x_quantized.row_bytes
    _check_row("x.shape", row_bytes)


def _check_row(field: str, row_bytes: int) -> None:
    if row_bytes > MAX_ROW_BYTES:
        raise invalid(
            field,
            f"expected rows of at most {MAX_ROW_BYTES} bytes (a message carries whole rows), "
            f"got {row_bytes}",
        )


def rows_in_chunk(chunk_bytes: int, row_bytes: int) -> int:
    """At least one."""
    return max(1, chunk_bytes // row_bytes)
