"""A written folder loaded by transformers, on a CPU, and compared with what was meant.

loaded = Loaded(Path("OUT"))
compare_with(loaded, {"model.layers.0.mlp.down_proj": dequantized})
logits_equal(loaded, model, ids)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from certiq.model.loaders import worker
from certiq.model.loaders.check import check_model
from certiq.model.loaders.checkpoint import Checkpoint
from certiq.model.loaders.table import needs_dequantizing

# Sums in another order, some hundred of them one after another, relative to the largest logit.
FLOAT32_STEPS = 512
# A weight that is rounded to the model's type moves it by a fraction of that type's step.
HALF_STEPS = 16


@dataclass(frozen=True)
class LoadProof:
    """A comparison of a loaded checkpoint with what it stands for."""

    route: str
    """How it was loaded."""
    compared: tuple[str, ...] = ()
    largest_difference: float = 0.0
    failures: tuple[str, ...] = ()
    not_loaded: str | None = None
    """Why nothing was compared, where this machine cannot load it."""

    @property
    def ok(self) -> bool:
        """Something was compared, and it was equal."""
        return bool(self.compared) and not self.failures


class Loaded:
    """A folder to load once for several comparisons; GPTQ is loaded in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        checkpoint = self._checkpoint = Checkpoint(folder)
        self.gptq = checkpoint.gptq is not None
        self.dequantize = needs_dequantizing(checkpoint)
        kind = "float16" if self.gptq else checkpoint.dtype
        # GPTQ's kernels multiply in float16.
        self.rounding: torch.dtype = getattr(torch, kind or "float32")
        self.route = (
            "transformers with GPTQModel (gptq_torch)"
            if self.gptq
            else "transformers, CompressedTensorsConfig(dequantize=True)"
            if self.dequantize
            else "transformers"
        )
        self.not_loaded = self._reason()

    @cached_property
    def result(self) -> worker.Result:
        """The model in this process. What transformers misses is in `failures`."""
        try:
            return worker.load(self.folder, dequantize=self.dequantize)
        except Exception as error:
            if self.dequantize or self._checkpoint.compressed is None:
                raise
            # Some models touch a weight of their own before it is unpacked (Mamba 2's do).
            self.route = (
                "transformers, CompressedTensorsConfig(dequantize=True); without it: "
                f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            )
            return worker.load(self.folder, dequantize=True)

    def fetch(
        self, names: Iterable[str], ids: torch.Tensor | None
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Weights by names of the loaded model, [R, N] each, and the logits of ids [1, T] as
        worker.LOGITS; and what went wrong."""
        if self.gptq:
            return self._in_another_process(list(names), ids)
        tensors = self.result.weights(names)
        if ids is not None:
            tensors[worker.LOGITS] = self.result.logits(ids)
        return tensors, list(self.result.failures)

    def _reason(self) -> str | None:
        # A damaged folder is loaded all the same: what comes of it is the proof.
        for finding in check_model(self.folder, ["transformers"]).errors:
            if finding.reader == "transformers":
                return str(finding)
        own = self._checkpoint.config.get("auto_map")
        if own and not worker.is_known(self._checkpoint.model_type):
            return f"{self._checkpoint.model_type}: the checkpoint's own code is not run"
        if self.gptq:
            lacking = [name for name in ("gptqmodel", "optimum") if find_spec(name) is None]
            if lacking:
                return f"loading gptq in transformers needs {' and '.join(lacking)}"
        return None

    def _in_another_process(
        self, names: list[str], ids: torch.Tensor | None
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        # GPTQModel changes transformers when it is imported, which would change this process.
        with tempfile.TemporaryDirectory() as scratch:
            request, answer = Path(scratch) / "request.json", Path(scratch) / "answer.safetensors"
            asked: dict[str, Any] = {"names": names, "ids": None if ids is None else ids.tolist()}
            request.write_text(json.dumps(asked), encoding="utf-8")
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "certiq.model.loaders.worker"),
                    *(str(self.folder), str(request), str(answer)),
                ],
                # Compiling kernels takes a minute, and what they compute is the same.
                env=os.environ | {"TORCH_COMPILE_DISABLE": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                last = done.stderr.strip().splitlines()[-1:] or ["no message"]
                return {}, [f"{self.route} does not load {self.folder}: {last[0]}"]
            failures = json.loads(request.with_suffix(".failures").read_text(encoding="utf-8"))
            return load_file(answer), failures


def compare_with(folder: Path | Loaded, expected: Mapping[str, torch.Tensor]) -> LoadProof:
    """Compares weights of the loaded model with `expected`: by the loaded model's names, [R, N]
    each, fused experts as EXPERTS.INDEX.gate_proj, up_proj, down_proj. Equal is what one rounding
    to the model's type explains (GPTQ: to float16, in which its kernels multiply)."""
    loaded = folder if isinstance(folder, Loaded) else Loaded(folder)
    if loaded.not_loaded is not None:
        return LoadProof(loaded.route, not_loaded=loaded.not_loaded)
    return _weights(loaded, expected, *_fetched(loaded, expected, None))


def logits_equal(
    folder: Path | Loaded,
    model: torch.nn.Module,
    ids: torch.Tensor,
    *,
    tolerance: float | None = None,
) -> LoadProof:
    """Compares one sequence's logits with those of `model`, which has the dequantized weights.

    `tolerance`: the largest difference relative to the largest logit; unset: what sums in another
    order and one rounding of each weight explain. The largest difference is relative too.
    """
    loaded = folder if isinstance(folder, Loaded) else Loaded(folder)
    if loaded.not_loaded is not None:
        return LoadProof(loaded.route, not_loaded=loaded.not_loaded)
    ids = ids.reshape(1, -1).cpu()
    return _logits(loaded, model, ids, tolerance, *_fetched(loaded, (), ids))


def prove(
    folder: Path | Loaded,
    expected: Mapping[str, torch.Tensor],
    model: torch.nn.Module,
    ids: torch.Tensor,
) -> tuple[LoadProof, LoadProof]:
    """compare_with and logits_equal of one loading, which takes GPTQModel most of the time."""
    loaded = folder if isinstance(folder, Loaded) else Loaded(folder)
    if loaded.not_loaded is not None:
        nothing = LoadProof(loaded.route, not_loaded=loaded.not_loaded)
        return nothing, nothing
    ids = ids.reshape(1, -1).cpu()
    fetched = _fetched(loaded, expected, ids)
    return _weights(loaded, expected, *fetched), _logits(loaded, model, ids, None, *fetched)


def _fetched(
    loaded: Loaded, names: Iterable[str], ids: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], list[str]]:
    try:
        return loaded.fetch(names, ids)
    except Exception as cause:
        # Whatever a loader raises, it did not load.
        lines = str(cause).strip().splitlines() or [""]
        return {}, [
            f"{loaded.route} does not load {loaded.folder}: {type(cause).__name__}: {lines[0]}"
        ]


def _weights(
    loaded: Loaded,
    expected: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    failures: Sequence[str],
) -> LoadProof:
    failed = list(failures)
    compared: list[str] = []
    largest = 0.0
    for name, wanted in expected.items():
        own = found.get(name)
        if own is None:
            if found:
                failed.append(f"{name}: the loaded model has no such linear")
            continue
        compared.append(name)
        if own.shape != wanted.shape:
            failed.append(f"{name}: expected {list(wanted.shape)}, got {list(own.shape)}")
            continue
        difference, sentence = _difference(own.float(), wanted.float().cpu(), loaded.rounding)
        largest = max(largest, difference)
        if sentence is not None:
            failed.append(f"{name}: {sentence}")
    if not compared and not failed:
        failed.append(f"{loaded.folder}: the loaded model has none of the linears asked for")
    return LoadProof(loaded.route, tuple(compared), largest, tuple(failed))


@torch.no_grad()
def _logits(
    loaded: Loaded,
    model: torch.nn.Module,
    ids: torch.Tensor,
    tolerance: float | None,
    tensors: Mapping[str, torch.Tensor],
    failures: Sequence[str],
) -> LoadProof:
    found = tensors.get(worker.LOGITS)
    failed = list(failures)
    if found is None:
        return LoadProof(loaded.route, failures=tuple(failed))
    device = next(model.parameters()).device
    expected = worker.logits_of(model, ids.to(device)).cpu()
    if found.shape != expected.shape:
        failed.append(f"logits: expected {list(expected.shape)}, got {list(found.shape)}")
        return LoadProof(loaded.route, ("logits",), float("inf"), tuple(failed))
    scale = float(expected.abs().max())
    difference = float((found - expected).abs().max()) / (scale or 1.0)
    if tolerance is None:
        tolerance = FLOAT32_STEPS * torch.finfo(torch.float32).eps
        if loaded.rounding != torch.float32:
            tolerance = HALF_STEPS * torch.finfo(loaded.rounding).eps
    # Not a number is no difference that is small enough.
    if not difference <= tolerance:
        failed.append(
            f"logits: expected those of the dequantized model, they differ by {difference:.3g} of "
            f"the largest ({tolerance:.3g} would be rounding)"
        )
    return LoadProof(loaded.route, ("logits",), difference, tuple(failed))


def _difference(
    found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype
) -> tuple[float, str | None]:
    limits = torch.finfo(dtype)
    # Half a step, and a little more for a value that was rounded to float32 before.
    allowed = expected.abs() * (0.5001 * limits.eps) + 0.5001 * limits.smallest_normal * limits.eps
    distance = (found - expected).abs()
    bad = ~(distance <= allowed)
    largest = float(distance.nan_to_num(float("inf")).max()) if distance.numel() else 0.0
    if not bool(bad.any()):
        return largest, None
    row, column = (int(side) for side in bad.nonzero()[0])
    return largest, (
        f"expected {float(expected[row, column]):.9g} at [{row}, {column}], got "
        f"{float(found[row, column]):.9g}; {int(bad.sum())} of {bad.numel()} weights differ"
    )
