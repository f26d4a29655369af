"""Reads and writes safetensors files as raw arrays, independently of the client."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "U8": "u1",
}


@dataclass(frozen=True)
class Tensor:
    """Values as stored; those of BF16 are bit patterns, see `float64`."""

    dtype: str
    array: np.ndarray

    @property
    def data(self) -> bytes:
        return self.array.tobytes()

    def float64(self) -> np.ndarray:
        if self.dtype == "BF16":
            return (self.array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return self.array.astype(np.float64)


def tensor(values: np.ndarray, dtype: str) -> Tensor:
    """Rounds values to a dtype; BF16 by cutting off, which is as good as any rounding here."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype="<f4").view("<u4") >> 16
        return Tensor(dtype, bits.astype("<u2"))
    return Tensor(dtype, np.ascontiguousarray(values).astype(NUMPY[dtype]))


def read(path: Path) -> dict[str, Tensor]:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(content[start + begin : start + end], NUMPY[entry["dtype"]])
        tensors[name] = Tensor(entry["dtype"], array.reshape(entry["shape"]))
    return tensors


def header_of(tensors: Mapping[str, Tensor]) -> dict[str, dict]:
    header: dict[str, dict] = {}
    position = 0
    for name, value in tensors.items():
        end = position + len(value.data)
        header[name] = {
            "dtype": value.dtype,
            "shape": list(value.array.shape),
            "data_offsets": [position, end],
        }
        position = end
    return header


def assemble(header: Mapping | str, data: bytes, header_bytes: int | None = None) -> bytes:
    """A file of these parts, however little they fit together."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    length = len(text) if header_bytes is None else header_bytes
    return length.to_bytes(8, "little") + text + data


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.write_bytes(assemble(header_of(tensors), b"".join(t.data for t in tensors.values())))
