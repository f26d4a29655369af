"""The settings of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certiq.model.errors import UsageError
from certiq.readers import Reader, loads_in
from certiq.spec import Spec

if TYPE_CHECKING:
    import torch

PACKED = ("gptq", "gptq_v2", "compressed_tensors")
DENSE = ("dense_f32", "dense_f16", "dense_bf16")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    model: Path
    output: Path
    # Files of text; none: the model's own samples.
    calibration: tuple[Path, ...]
    spec: Spec
    sequences: int = 128
    sequence_length: int = 512
    # Linears that read one tensor are quantized, then the rest of the block sees that.
    sequential: bool = True
    held_out_fraction: float | None = None
    evaluation: Path | None = None
    evaluation_tokens: int = 16384
    evaluation_window: int = 512
    # The float model is measured too.
    evaluate_float: bool = True
    # Linears whose names in the checkpoint match one of these regular expressions stay float.
    ignore: tuple[str, ...] = ()
    # A file that says how each linear is quantized.
    recipe: Path | None = None
    # The type of the tensors that are not quantized; None: as the checkpoint has them.
    dtype: str | None = None
    batch_size: int = 8
    # The type that the model is run in.
    compute_dtype: str = "float32"
    # Hidden states that take more than so many GB lie on disk, below the output.
    state_memory: float = 16.0
    device: str = "cpu"
    # So many blocks are quantized, from the first on; the rest stays float.
    blocks: int | None = None
    # The float model is compared with transformers' own, and the result is loaded by it.
    load_checks: bool = True
    # Less than this share of the blocks' weights quantized is an error.
    min_share: float = 0.0

    @property
    def model_name(self) -> str:
        name = self.model.name
        return name if name not in ("", "..") else self.model.resolve().name

    @property
    def mismatched(self) -> bool:
        """True: the float model's inputs are needed beside the quantized one's."""
        return self.spec.method == "qronos"

    @property
    def effective_held_out_fraction(self) -> float:
        """1/8 where the spec judges by held-out tokens, as the certiq command does, or one of few
        sequences."""
        if self.held_out_fraction is not None:
            return self.held_out_fraction
        damping = self.spec.damping
        chooses = damping is not None and damping.startswith("held_out")
        # Without a damping in the spec, Qronos and these presets choose by held-out tokens.
        by_default = damping is None and (
            self.spec.method == "qronos" or self.spec.quality in ("balanced", "best")
        )
        return max(0.125, 1 / max(self.sequences, 2)) if chooses or by_default else 0.0

    @property
    def reordered_groups(self) -> bool:
        """True: groups follow the order of work ("act-order by group")."""
        spec = self.spec
        order = spec.order or ("decreasing_norm" if spec.quality else None)
        return bool(spec.group_size) and (spec.group_scales, order) == (
            "dynamic",
            "decreasing_norm",
        )

    def loads_in(self) -> list[Reader]:
        """Who loads the output, by the table that the service's certificates have."""
        return loads_in(
            self.spec.format or "dense_f32",
            bits=self.spec.bits or 4,
            symmetric=self.spec.symmetric is not False,
            group_size=self.spec.group_size or 0,
            reordered_groups=self.reordered_groups,
        )

    def check(self) -> None:
        """Raises UsageError for what no server and no loader could do."""
        spec = self.spec
        if spec.format not in PACKED + DENSE:
            raise UsageError(
                f"format: expected one of {', '.join(PACKED + DENSE)}, got {spec.format}"
            )
        if spec.format == "gptq" and spec.symmetric is False:
            raise UsageError(
                "format gptq stores zero points minus one, which a zero point of 0 does not "
                "survive: asymmetric grids need gptq_v2"
            )
        if spec.format == "compressed_tensors" and not self.loads_in():
            raise UsageError(
                "no reader of compressed-tensors loads groups in another order than the columns' "
                "(weight_g_idx): use group_scales static, order natural, or format gptq_v2"
            )
        least = dict.fromkeys(
            ("sequences", "sequence_length", "batch_size", "evaluation_tokens"), 1
        )
        # The first token of a window is not predicted.
        for name, smallest in (least | {"evaluation_window": 2}).items():
            if getattr(self, name) < smallest:
                got = getattr(self, name)
                raise UsageError(f"{name}: expected at least {smallest}, got {got}")
        if self.blocks is not None and self.blocks < 1:
            raise UsageError(f"layers: expected at least 1, got {self.blocks}")
        if not 0 <= self.min_share <= 1:
            raise UsageError(f"min_share: expected 0 to 1, got {self.min_share:g}")
        if not 0 <= self.effective_held_out_fraction < 1:
            raise UsageError(
                "held_out_fraction: expected 0 or more, and less than 1, got "
                f"{self.effective_held_out_fraction:g}"
            )
        self._check_folders()
        self.devices()
        fraction = self.effective_held_out_fraction
        if 0 < fraction * self.sequences < 1:
            raise UsageError(
                f"held_out_fraction: {fraction:g} of the sequences ({self.sequences}) is not one"
            )

    def _check_folders(self) -> None:
        """The float model is not written over."""
        model, output = self.model.resolve(), self.output.resolve()
        if model.is_dir() and (output == model or model in output.parents):
            raise UsageError(
                f"output: expected a folder outside the model's ({self.model}), got {self.output}"
            )
        if output.exists() and not output.is_dir():
            raise UsageError(f"output: expected a folder, got the file {self.output}")
        ours = any((output / name).exists() for name in ("report.json", "unfinished"))
        others = [] if ours else [path for path in output.glob("*") if _is_of_a_model(path)]
        if others:
            raise UsageError(
                f"output: {self.output} holds a model that this command did not write "
                f"({min(others).name}): expected a new or an empty folder"
            )

    def devices(self) -> list[torch.device]:
        """Sequences are divided among them."""
        import torch

        found = []
        for name in self.device.split(","):
            try:
                device = torch.device(name.strip())
                # A device that is not there says so here.
                torch.empty(0, device=device)
                if device.type == "meta":
                    raise RuntimeError("meta holds no values")
            except (RuntimeError, AssertionError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UsageError(
                    f"device: expected devices of torch such as cpu or cuda:0,cuda:1, got "
                    f"{self.device!r} ({reason})"
                ) from error
            found.append(device)
        return found

    def described(self) -> dict[str, Any]:
        """All settings as plain values, for reports."""
        spec = {key: value for key, value in asdict(self.spec).items() if value is not None}
        own = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("spec", "model", "output", "calibration", "evaluation", "recipe")
        }
        return {
            "model": self.model_name,
            "calibration": [path.name for path in self.calibration] or "self",
            "evaluation": self.evaluation.name if self.evaluation else None,
            "held_out_fraction": self.effective_held_out_fraction,
            "spec": spec,
        } | {key: value for key, value in own.items() if key != "held_out_fraction"}

    def fingerprint(self, identity: Mapping[str, str]) -> dict[str, Any]:
        """The settings that must not change between the sessions of one run; `identity` has
        digests of the model's files."""
        described = self.described()
        for name in ("batch_size", "device", "min_share", "load_checks", "state_memory"):
            del described[name]
        described |= {f"model_{name}": digest for name, digest in identity.items()}
        described["calibration_sha256"] = [_digest(path) for path in self.calibration]
        for name in ("evaluation", "recipe"):
            path = getattr(self, name)
            if path is not None:
                described[f"{name}_sha256"] = _digest(path)
        return described


def _is_of_a_model(path: Path) -> bool:
    return path.name == "config.json" or path.suffix in (".safetensors", ".bin")


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
