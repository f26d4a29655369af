"""A checkpoint folder as rules see it: its configuration, its tensors, its modules."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from certiq.model.errors import UsageError
from certiq.model.loaders.files import FLOATS, TensorHead, TensorHeads
from certiq.model.loaders.findings import Finding, error
from certiq.model.loaders.schemes import (
    COMPRESSED,
    CompressedTensors,
    ConfigError,
    Gptq,
    Quantization,
    Scheme,
    read,
)

# The tensors of a packed module, the one that makes it packed first.
ROLES = {
    "compressed-tensors": (
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
    ),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
}
_BLOCK = re.compile(r"\.\d+\.")
_EXPERT = re.compile(r"^(?P<experts>.+\.experts)\.\d+\.")


@dataclass(frozen=True)
class Module:
    """A packed linear."""

    name: str
    parts: dict[str, TensorHead]
    """By role: weight_packed, weight_scale ..., or qweight, qzeros ..."""
    scheme: Scheme | None
    """As the configuration says; None: it says that the module is float."""
    rows: int | None
    features: int | None
    """None where the tensor that tells is missing."""


class Checkpoint:
    """`findings` has what keeps the folder from being understood."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder")
        self.folder = folder
        self.findings: list[Finding] = []
        self.config = self._read_config()
        self.tensors = TensorHeads(folder)
        self.findings += self.tensors.findings
        self.quantization: Quantization | None = None
        self.understood = True
        try:
            self.quantization = read(self.config)
        except ConfigError as cause:
            self.understood = False
            self.findings.append(error("config.json", f"quantization_config: {cause}"))

    @property
    def text_config(self) -> dict[str, Any]:
        """The part about the decoder, which models of several kinds keep apart."""
        own = self.config.get("text_config")
        return self.config | own if isinstance(own, dict) else self.config

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type") or "")

    @property
    def dtype(self) -> str | None:
        found = self.config.get("dtype") or self.config.get("torch_dtype")
        found = found or self.text_config.get("dtype") or self.text_config.get("torch_dtype")
        return str(found).removeprefix("torch.") if found else None

    @property
    def gptq(self) -> Gptq | None:
        return self.quantization if isinstance(self.quantization, Gptq) else None

    @property
    def compressed(self) -> CompressedTensors | None:
        return self.quantization if isinstance(self.quantization, CompressedTensors) else None

    @cached_property
    def format(self) -> str | None:
        """certiq's name of the format; None where it is none of certiq's."""
        if not self.understood:
            return None
        if self.quantization is not None:
            return self.quantization.format
        names = {"float32": "dense_f32", "float16": "dense_f16", "bfloat16": "dense_bf16"}
        sizes: dict[str, int] = {}
        for head in self.tensors:
            if head.dtype in FLOATS:
                kind = FLOATS[head.dtype]
                sizes[kind] = sizes.get(kind, 0) + int(np.prod(head.shape))
        return names.get(max(sizes, key=lambda kind: sizes[kind])) if sizes else None

    @cached_property
    def modules(self) -> dict[str, Module]:
        """The packed modules by their names."""
        if self.quantization is None:
            return {}
        roles = ROLES[self.quantization.method]
        parts: dict[str, dict[str, TensorHead]] = {}
        for head in self.tensors:
            prefix, _, role = head.name.rpartition(".")
            if role in roles:
                parts.setdefault(prefix, {})[role] = head
        return {name: self._module(name, own) for name, own in parts.items()}

    @cached_property
    def float_weights(self) -> dict[str, TensorHead]:
        """Modules with a float weight of two dimensions, by their names."""
        return {
            head.name.removesuffix(".weight"): head
            for head in self.tensors
            if head.name.endswith(".weight") and len(head.shape) == 2 and head.dtype in FLOATS
        }

    @cached_property
    def reordered(self) -> set[str]:
        """Packed modules whose groups are not of neighbouring columns."""
        return {
            name for name, index in self.group_indices() if bool((index[1:] < index[:-1]).any())
        }

    def group_indices(self) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        for module in self.modules.values():
            head = module.parts.get("g_idx") or module.parts.get("weight_g_idx")
            if head is not None and len(head.shape) == 1:
                yield module.name, self.tensors.read(head.name)

    def _module(self, name: str, parts: dict[str, TensorHead]) -> Module:
        assert self.quantization is not None
        rows = features = None
        if self.quantization.format == COMPRESSED:
            shape = parts.get("weight_shape")
            if shape is not None and shape.shape == (2,):
                rows, features = (int(side) for side in self.tensors.read(shape.name))
        else:
            words, index = parts.get("qweight"), parts.get("g_idx")
            rows = words.shape[1] if words is not None and len(words.shape) == 2 else None
            features = index.shape[0] if index is not None and index.shape else None
        return Module(name, parts, self.quantization.scheme_of(name), rows, features)

    def _read_config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"{self.folder}: expected config.json, found none") from None
        except ValueError as cause:
            self.findings.append(error(path.name, f"expected JSON: {cause}"))
            return {}
        if not isinstance(content, dict):
            self.findings.append(error(path.name, f"expected an object, got {content!r:.40}"))
            return {}
        return content


def in_block(name: str) -> bool:
    """Within one of a stack of blocks."""
    return _BLOCK.search(f".{name}.") is not None


def experts_of(name: str) -> str | None:
    """The set of experts that a module belongs to."""
    found = _EXPERT.match(name)
    return None if found is None else found["experts"]
