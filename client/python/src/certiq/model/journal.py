"""The journal of a run, on disk: an interrupted run goes on where it stopped.

`OUTPUT/unfinished/` holds `run.json` (what was asked for), a file for each linear that is done
(its tensors, its certificate) and the hidden states in front of the next block. Files appear whole:
each is written beside its place and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from certiq.model.errors import UsageError

FOLDER = "unfinished"


@dataclass(frozen=True)
class DoneLinear:
    """One linear that is done: the tensors of its checkpoint, W as it is now, and its report."""

    tensors: dict[str, torch.Tensor]
    dequantized: torch.Tensor
    report: dict[str, Any]


class Journal:
    """The state of one run in its output folder. One process at a time."""

    def __init__(self, output: Path) -> None:
        self.folder = output / FOLDER
        self._linears = self.folder / "linears"

    def open(self, settings: Mapping[str, Any], *, restart: bool) -> bool:
        """Begins a run or goes on with it; true if there is something to go on with.

        Refuses to mix runs: what is there must have been asked for in the same words.
        """
        if restart and self.folder.exists():
            shutil.rmtree(self.folder)
        wanted = json.loads(json.dumps(settings))
        file = self.folder / "run.json"
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            different = sorted(
                key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)
            )
            if different:
                changes = "; ".join(
                    f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now" for key in different
                )
                raise UsageError(
                    f"{self.folder} holds a run with other settings ({changes}): "
                    "give those, another --output, or --restart"
                )
            self._linears.mkdir(exist_ok=True)
            return True
        self._linears.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(wanted, indent=2, sort_keys=True) + "\n")
        return False

    def has(self, name: str) -> bool:
        return self._linear_file(name).exists()

    def write(self, name: str, done: DoneLinear) -> None:
        tensors = {f"t.{key}": value.contiguous() for key, value in done.tensors.items()}
        tensors["dequantized"] = done.dequantized.contiguous()
        _save(self._linear_file(name), tensors, {"report": json.dumps(done.report)})

    def read(self, name: str) -> DoneLinear:
        with safe_open(self._linear_file(name), framework="pt") as file:
            report = json.loads(file.metadata()["report"])
            keys = list(file.keys())
            tensors = {key[2:]: file.get_tensor(key) for key in keys if key.startswith("t.")}
            return DoneLinear(tensors, file.get_tensor("dequantized"), report)

    def read_report(self, name: str) -> dict[str, Any]:
        with safe_open(self._linear_file(name), framework="pt") as file:
            return json.loads(file.metadata()["report"])  # type: ignore[no-any-return]

    def write_states(self, block: int, states: Mapping[str, torch.Tensor]) -> None:
        """The hidden states that block `block` reads; those before it go."""
        _save(
            self._state_file(block),
            {name: value.contiguous() for name, value in states.items()},
            {"block": str(block)},
        )
        for file in self.folder.glob("states-*.safetensors"):
            if file != self._state_file(block):
                file.unlink()

    def read_states(self) -> tuple[int, dict[str, torch.Tensor]] | None:
        """The newest hidden states and the block that reads them."""
        files = sorted(self.folder.glob("states-*.safetensors"))
        if not files:
            return None
        with safe_open(files[-1], framework="pt") as file:
            states = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return int(file.metadata()["block"]), states

    def write_note(self, name: str, content: Mapping[str, Any]) -> None:
        write_text(self.folder / f"{name}.json", json.dumps(content) + "\n")

    def read_note(self, name: str) -> dict[str, Any] | None:
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _linear_file(self, name: str) -> Path:
        return self._linears / f"{name}.safetensors"

    def _state_file(self, block: int) -> Path:
        return self.folder / f"states-{block:05d}.safetensors"


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    part = path.with_name(f".{path.name}.part")
    save_file(tensors, part, metadata)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
