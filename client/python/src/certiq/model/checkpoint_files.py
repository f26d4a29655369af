"""Tensors of a checkpoint by name, read one at a time: safetensors, PyTorch files, GGUF."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from certiq.model.errors import UsageError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The names that safetensors gives to types, for tensors that come from elsewhere.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    dtype: str
    """As safetensors names types: "BF16"."""
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        # The first number in a type's name is its bits.
        bits = re.search(r"\d+", self.dtype)
        return self.values * (int(bits[0]) if bits else 8) // 8


class TensorFiles(Protocol):
    """Names and tensors; nothing is kept in memory between reads."""

    def names(self) -> list[str]: ...
    def info(self, name: str) -> TensorInfo: ...
    def read(self, name: str) -> torch.Tensor: ...
    def files(self) -> list[Path]: ...
    def shards(self) -> dict[str, list[str]]:
        """File names of a checkpoint like this one in safetensors, and what each holds."""
        ...


def info_of(tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


class SafetensorsFiles:
    """model.safetensors, or the shards that model.safetensors.index.json lists."""

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX
        single = folder / SINGLE
        self._infos: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Path] = {}
        promised: dict[str, str] = {}
        # A whole file beside an index is what loaders take.
        if single.exists():
            paths = [single]
        elif index.exists():
            promised = _weight_map(index)
            paths = [folder / name for name in sorted(set(promised.values()))]
        else:
            raise UsageError(f"{folder}: expected {SINGLE} or {INDEX}")
        for path in paths:
            self._read_header(path)
        for name, file in promised.items():
            if self._file_of.get(name) != folder / file:
                raise UsageError(f"{index}: says that {file} holds {name}, which it does not")

    def _read_header(self, path: Path) -> None:
        if not path.is_file():
            raise UsageError(f"{path}: is missing, though the index of {path.parent} names it")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    part = file.get_slice(name)
                    self._infos[name] = TensorInfo(part.get_dtype(), tuple(part.get_shape()))
                    self._file_of[name] = path
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size
            raise UsageError(
                f"{path}: expected a whole safetensors file, got {size} bytes that are not "
                f"({error}); was its download interrupted, or is it a git-lfs pointer?"
            ) from error

    def names(self) -> list[str]:
        return list(self._file_of)

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def files(self) -> list[Path]:
        return sorted(set(self._file_of.values()))

    def shards(self) -> dict[str, list[str]]:
        shards: dict[str, list[str]] = {}
        for name, path in self._file_of.items():
            shards.setdefault(path.name, []).append(name)
        return shards


class TorchFiles:
    """pytorch_model.bin, or its shards: mapped into memory, never unpickled beyond tensors."""

    def __init__(self, folder: Path) -> None:
        index = folder / "pytorch_model.bin.index.json"
        if index.exists():
            self._paths = [folder / name for name in sorted(set(_weight_map(index).values()))]
        else:
            self._paths = [folder / "pytorch_model.bin"]
        self._tensors: dict[str, torch.Tensor] = {}
        self._shards: dict[str, list[str]] = {}
        count = len(self._paths)
        for number, path in enumerate(self._paths, 1):
            found = _load(path)
            own = {name: value for name, value in found.items() if name not in self._tensors}
            self._tensors |= own
            single = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._shards[single] = list(own)
        self._drop_shared()

    def _drop_shared(self) -> None:
        """Safetensors has no tensors that share memory: the first name of several stays."""
        seen: dict[tuple[Any, ...], str] = {}
        for name, value in list(self._tensors.items()):
            place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape)
            if value.numel() and seen.setdefault(place, name) != name:
                del self._tensors[name]
        self._shards = {
            file: [name for name in names if name in self._tensors]
            for file, names in self._shards.items()
        }

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        return info_of(self._tensors[name])

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].clone()

    def files(self) -> list[Path]:
        return self._paths

    def shards(self) -> dict[str, list[str]]:
        return self._shards


class GgufFiles:
    """A GGUF file, each tensor dequantized to float32 when it is read, under transformers' names.

    Names and layouts (the rotary permutation of Llama's q and k, for one) are transformers'
    business: its map and its processors are used, tensor by tensor.
    """

    def __init__(self, path: Path, model: Any) -> None:
        from gguf import GGUFReader
        from transformers import modeling_gguf_pytorch_utils as loading

        self._path = path
        reader = GGUFReader(path)
        architecture = loading.read_field(reader, "general.architecture")[0]
        kind = loading.TENSOR_PROCESSORS.get(architecture, loading.TensorProcessor)
        self._processor = kind(config=model.config.to_dict())
        self._map = loading.get_gguf_hf_weights_map(model, self._processor)
        self._tensors = {
            self._map[tensor.name]: tensor for tensor in reader.tensors if tensor.name in self._map
        }
        if any(len(tensor.shape) > 2 for tensor in self._tensors.values()):
            raise UsageError(f"{path}: experts in GGUF files are not supported")

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        # GGUF counts the fastest dimension first.
        shape = tuple(int(size) for size in reversed(self._tensors[name].shape))
        return TensorInfo("F32", shape)

    def read(self, name: str) -> torch.Tensor:
        from gguf import dequantize

        tensor = self._tensors[name]
        values = dequantize(tensor.data, tensor.tensor_type)
        result = self._processor.process(
            weights=values,
            name=tensor.name,
            tensor_key_mapping=self._map,
            parsed_parameters={"tensors": {}},
        )
        return torch.from_numpy(result.weights.copy())

    def files(self) -> list[Path]:
        return [self._path]

    def shards(self) -> dict[str, list[str]]:
        return {SINGLE: self.names()}


def open_folder(folder: Path) -> TensorFiles:
    if any((folder / name).exists() for name in (SINGLE, INDEX)):
        return SafetensorsFiles(folder)
    if any(folder.glob("pytorch_model.bin*")):
        return TorchFiles(folder)
    raise UsageError(
        f"{folder}: expected {SINGLE} or pytorch_model.bin (or an index of shards), "
        f"got {', '.join(_some_names(folder)) or 'an empty folder'}"
    )


def shard_names(index: Path) -> set[str]:
    """The files that an index names; none where there is no index."""
    return set(_weight_map(index).values()) if index.exists() else set()


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        # Files that torch wrote before 1.6 are no archives, which cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        found = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # Whatever is wrong with a pickle has many types.
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{path}: expected a file of tensors: {reason}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path}: expected tensors by name, got {type(found).__name__}")
    for name, value in found.items():
        if not isinstance(value, torch.Tensor) or value.dtype not in DTYPE_NAMES:
            got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise UsageError(f"{path}: expected tensors by name, got {got} for {name}")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        found = content["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{index}: expected JSON with a weight_map: {error}") from error
    if "metadata" not in content:
        raise UsageError(
            f'{index}: expected "metadata" beside the weight_map, without which transformers '
            '(5.24) does not load it, got none: add "metadata": {}'
        )
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise UsageError(f"{index}: expected a weight_map of names to files")
    return found


def _some_names(folder: Path) -> Iterator[str]:
    for number, path in enumerate(sorted(folder.iterdir())):
        if number == 8:
            yield "..."
            return
        yield path.name
