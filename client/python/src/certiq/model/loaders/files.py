"""A checkpoint folder's tensors by their headers: names, types and shapes, and values on demand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# numpy has no bfloat16 of its own; safetensors finds the one of ml_dtypes, which certiq imports.
import numpy as np
from safetensors import SafetensorError, safe_open

from certiq.model.errors import UsageError
from certiq.model.loaders.findings import Finding, error, warning

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Values are read in pieces of about so many elements.
CHUNK = 1 << 24

BITS_OF = {
    "BOOL": 8,
    **dict.fromkeys(("U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class TensorHead:
    """A tensor as its file's header has it."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def described(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class TensorHeads:
    """All tensors of a folder's safetensors files; what does not agree is in `findings`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.findings: list[Finding] = []
        self._heads: dict[str, TensorHead] = {}
        self._unreadable: set[str] = set()
        self._read_folder()

    def __getitem__(self, name: str) -> TensorHead:
        return self._heads[name]

    def __contains__(self, name: str) -> bool:
        return name in self._heads

    def __iter__(self) -> Iterator[TensorHead]:
        return iter(self._heads.values())

    def read(self, name: str) -> np.ndarray[Any, Any]:
        with safe_open(self.folder / self._heads[name].file, framework="np") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def pieces(self, name: str) -> Iterator[np.ndarray[Any, Any]]:
        """The values, whole rows at a time, so that no large tensor is in memory whole."""
        head = self._heads[name]
        with safe_open(self.folder / head.file, framework="np") as file:
            if not head.shape:
                yield file.get_tensor(name)
                return
            part = file.get_slice(name)
            rows = max(1, CHUNK // max(1, int(np.prod(head.shape[1:]))))
            for begin in range(0, head.shape[0], rows):
                yield part[begin : min(begin + rows, head.shape[0])]

    def _read_folder(self) -> None:
        index = self.folder / INDEX
        present = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not index.exists():
            if SINGLE not in present:
                raise UsageError(f"{self.folder}: expected {SINGLE} or {INDEX}, found neither")
            self._read_file(SINGLE)
            for name in present:
                if name != SINGLE:
                    self.findings.append(
                        warning(name, f"no loader reads it: there is {SINGLE} and no {INDEX}")
                    )
            return
        listed, total = self._read_index(index)
        if SINGLE in present and SINGLE not in listed.values():
            # Loaders look for the single file first.
            self.findings.append(
                error(SINGLE, f"stands beside {INDEX}, which does not name it: loaders take either")
            )
        for name in sorted(set(listed.values())):
            if name in present:
                self._read_file(name)
            else:
                self.findings.append(error(name, f"is named in {INDEX} and is not there"))
        for name in present:
            if name not in listed.values() and name != SINGLE:
                self.findings.append(
                    warning(name, f"is not named in {INDEX}: no loader reads its tensors")
                )
        self._compare(listed, total)

    def _read_index(self, path: Path) -> tuple[dict[str, str], object]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            listed = {str(name): str(file) for name, file in content["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as cause:
            self.findings.append(
                error(INDEX, f"expected JSON with a weight_map of names and files, got {cause!r}")
            )
            return {}, None
        return listed, (content.get("metadata") or {}).get("total_size")

    def _read_file(self, name: str) -> None:
        try:
            with safe_open(self.folder / name, framework="np") as file:
                for key in file.keys():  # noqa: SIM118
                    part = file.get_slice(key)
                    head = TensorHead(key, name, part.get_dtype(), tuple(part.get_shape()))
                    if key in self._heads:
                        self.findings.append(
                            error(key, f"is in {self._heads[key].file} and in {name}: once alone")
                        )
                    self._heads[key] = head
        except (SafetensorError, OSError) as cause:
            self._unreadable.add(name)
            self.findings.append(
                error(
                    name, f"expected a whole safetensors file, it is cut short or broken: {cause}"
                )
            )

    def _compare(self, listed: dict[str, str], total: object) -> None:
        for name, file in listed.items():
            if file in self._unreadable or not (self.folder / file).exists():
                continue
            if name not in self._heads:
                self.findings.append(error(name, f"{INDEX} puts it into {file}, which has it not"))
            elif self._heads[name].file != file:
                self.findings.append(
                    error(name, f"{INDEX} puts it into {file}, it is in {self._heads[name].file}")
                )
        for head in self:
            if listed and head.name not in listed:
                self.findings.append(
                    error(head.name, f"is in {head.file} and not in {INDEX}: loaders lose it")
                )
        found = self.total_bytes()
        if total is not None and not self._unreadable and total != found:
            self.findings.append(
                warning(
                    INDEX, f"total_size: expected {found}, the bytes of all tensors, got {total}"
                )
            )

    def total_bytes(self) -> int:
        return sum(_bytes(head) for head in self)


def _bytes(head: TensorHead) -> int:
    count = 1
    for side in head.shape:
        count *= side
    return count * BITS_OF.get(head.dtype, 0) // 8
