"""Tensors of a checkpoint by name, read one at a time: safetensors, PyTorch files, GGUF."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from certiq.model.errors import UsageError


class TensorFiles(Protocol):
    """Names and tensors; nothing is kept in memory between reads."""

    def names(self) -> list[str]: ...
    def read(self, name: str) -> torch.Tensor: ...
    def files(self) -> list[Path]: ...


class SafetensorsFiles:
    """model.safetensors, or the shards that model.safetensors.index.json lists."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        self._file_of: dict[str, Path] = {}
        if index.exists():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._file_of = {name: folder / file for name, file in weight_map.items()}
        elif single.exists():
            with safe_open(single, framework="pt") as file:
                self._file_of = dict.fromkeys(file.keys(), single)
        else:
            raise UsageError(f"{folder}: expected model.safetensors or its index")

    def names(self) -> list[str]:
        return list(self._file_of)

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def files(self) -> list[Path]:
        return sorted(set(self._file_of.values()))


class TorchFiles:
    """pytorch_model.bin, or its shards: mapped into memory, never unpickled beyond tensors."""

    def __init__(self, folder: Path) -> None:
        index = folder / "pytorch_model.bin.index.json"
        if index.exists():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            self._paths = [folder / name for name in sorted(names)]
        else:
            self._paths = [folder / "pytorch_model.bin"]
        self._tensors: dict[str, torch.Tensor] = {}
        for path in self._paths:
            self._tensors |= torch.load(path, map_location="cpu", mmap=True, weights_only=True)

    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].clone()

    def files(self) -> list[Path]:
        return self._paths


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


def open_folder(folder: Path) -> TensorFiles:
    if any((folder / name).exists() for name in _safetensors_names()):
        return SafetensorsFiles(folder)
    if any(folder.glob("pytorch_model.bin*")):
        return TorchFiles(folder)
    raise UsageError(
        f"{folder}: expected model.safetensors or pytorch_model.bin (or an index of shards)"
    )


def _safetensors_names() -> Iterator[str]:
    yield "model.safetensors"
    yield "model.safetensors.index.json"
