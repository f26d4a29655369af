"""The journal of a run, on disk: an interrupted run goes on where it stopped.

`OUTPUT/unfinished/` holds `run.json` (what was asked for) and a file for each linear that is done
(its tensors, its certificate). A run that goes on computes the hidden states anew, which takes one
forward of what is done. Files appear whole: each is written beside its place and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from google.protobuf.json_format import ParseDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from certiq._proto.certificate_pb2 import Certificate
from certiq.layer import Layer
from certiq.model.checkpoint_files import TensorInfo
from certiq.model.errors import UsageError

FOLDER = "unfinished"


@dataclass(frozen=True)
class DoneLinear:
    """One linear that is done: the tensors of its checkpoint, and its report."""

    tensors: dict[str, torch.Tensor]
    report: dict[str, Any]

    def dequantized(self) -> torch.Tensor:
        """W [R, N] as it is now, float32."""
        certificate = ParseDict(self.report["certificate"], Certificate())
        arrays = {role: _array(tensor) for role, tensor in self.tensors.items()}
        return torch.from_numpy(Layer(arrays, certificate).dequantized())


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


class Journal:
    """The state of one run in its output folder. One process at a time."""

    def __init__(self, output: Path) -> None:
        self.folder = output / FOLDER
        self._linears = self.folder / "linears"

    def open(self, settings: Mapping[str, Any], *, restart: bool) -> bool:
        """Begins a run or goes on with it; true if there is something to go on with.

        Refuses to mix runs: what is done must have been asked for in the same words.
        """
        if restart and self.folder.exists():
            shutil.rmtree(self.folder)
        wanted = json.loads(json.dumps(settings))
        file = self.folder / "run.json"
        if file.exists():
            found = _read_json(file)
            different = sorted(
                key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)
            )
            if different and any(self._linears.glob("*.safetensors")):
                changes = "; ".join(
                    f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now" for key in different
                )
                raise UsageError(
                    f"{self.folder} holds a run with other settings ({changes}): "
                    "give those, another --output, or --restart"
                )
            if not different:
                self._linears.mkdir(exist_ok=True)
                return True
            # Its notes (samples that its model wrote, for one) are not this run's.
            shutil.rmtree(self.folder)
        self._linears.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(wanted, indent=2, sort_keys=True) + "\n")
        return False

    def has(self, name: str) -> bool:
        return self._linear_file(name).exists()

    def write(self, name: str, done: DoneLinear) -> None:
        tensors = {role: value.contiguous() for role, value in done.tensors.items()}
        _save(self._linear_file(name), tensors, {"report": json.dumps(done.report)})

    def read(self, name: str) -> DoneLinear:
        with self._open(name) as file:
            report = json.loads(file.metadata()["report"])
            return DoneLinear({key: file.get_tensor(key) for key in file.keys()}, report)  # noqa: SIM118

    def read_report(self, name: str) -> dict[str, Any]:
        with self._open(name) as file:
            return json.loads(file.metadata()["report"])  # type: ignore[no-any-return]

    def infos(self, name: str) -> dict[str, TensorInfo]:
        """The tensors of a linear by their roles, not read."""
        with self._open(name) as file:
            slices = {role: file.get_slice(role) for role in file.keys()}  # noqa: SIM118
            return {
                role: TensorInfo(part.get_dtype(), tuple(part.get_shape()))
                for role, part in slices.items()
            }

    def read_tensor(self, name: str, role: str) -> torch.Tensor:
        with self._open(name) as file:
            return file.get_tensor(role)  # type: ignore[no-any-return]

    def _open(self, name: str) -> Any:
        path = self._linear_file(name)
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path}: is damaged ({error}): --restart the run") from error

    def write_note(self, name: str, content: Mapping[str, Any]) -> None:
        write_text(self.folder / f"{name}.json", json.dumps(content) + "\n")

    def read_note(self, name: str) -> dict[str, Any] | None:
        file = self.folder / f"{name}.json"
        return _read_json(file) if file.exists() else None

    def state_file(self, number: int) -> Path:
        """For hidden states while a run lasts; no run goes on with them."""
        folder = self.folder / "states"
        folder.mkdir(exist_ok=True)
        return folder / str(number)

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _linear_file(self, name: str) -> Path:
        return self._linears / f"{name}.safetensors"


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: is damaged ({error}): --restart the run") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path}: is damaged (no JSON object): --restart the run")
    return found


def _save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        save_file(tensors, part, metadata)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise UsageError(f"{path}: cannot be written: {error}") from error
