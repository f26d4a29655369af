"""Safetensors files written tensor by tensor: the library's own writer wants all of a file at once.

The format is a length (64 bits, little endian), that many bytes of JSON, and the tensors
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from certiq.model.checkpoint_files import TensorInfo
from certiq.model.errors import UsageError


@dataclass(frozen=True)
class Entry:
    """A tensor of a file, which is read when its turn comes."""

    name: str
    info: TensorInfo
    read: Callable[[], torch.Tensor]


def write_safetensors(path: Path, entries: Sequence[Entry]) -> None:
    """Writes a whole file or nothing; one tensor is in memory at a time."""
    # Wide types come first, so that each tensor is aligned.
    ordered = sorted(entries, key=lambda entry: (-_width(entry.info), entry.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        header[entry.name] = {
            "dtype": entry.info.dtype,
            "shape": list(entry.info.shape),
            "data_offsets": [offset, offset + entry.info.bytes],
        }
        offset += entry.info.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(struct.pack("<Q", len(text)))
            file.write(text)
            for entry in ordered:
                data = _bytes(entry.read())
                if len(data) != entry.info.bytes:
                    raise AssertionError(
                        f"{entry.name}: expected {entry.info.bytes} bytes, got {len(data)}"
                    )
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
        raise


def _width(info: TensorInfo) -> int:
    return info.bytes // info.values if info.values else 0


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
