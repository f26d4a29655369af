"""Quantized checkpoints as the float ones that they stand for: FP8, MXFP8, FP4 and MXFP4 sources.

Codes times scales are the weights that such a model has; no float copy of it need exist. Decoding
is value = code * scale in float32, rounded once. What is a rotation, a packing or a method of its
own (GPTQ, AWQ, NVFP4) is refused with a way on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from certiq.model.checkpoint_files import TensorFiles, TensorInfo
from certiq.model.errors import UsageError

# The values of e2m1 by code, of OCP Microscaling Formats (MX) 1.0.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_MX_GROUP = 32
_CODES = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Exponents: 2 ** (byte - 127).
_EXPONENTS = (torch.uint8, getattr(torch, "float8_e8m0fnu", torch.uint8))
# Blocks of DeepSeek-V3, which all that store "weight_scale_inv" took over.
_USUAL_BLOCK = (128, 128)

# Scales that are not of weights: they serve FP8 activations or an FP8 key/value cache.
_NOT_OF_WEIGHTS = (
    "input_scale",
    "input_scale_ub",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
    "activation_scale",
    "qscale_act",
    "q_scale",
    "k_scale",
    "v_scale",
    "kv_scale",
    "k_zero_point",
    "v_zero_point",
    "prob_scale",
)

_FLOAT = "quantize the float model that it was made of"
_SAVED = f"{_FLOAT}, or a float copy that save_pretrained writes"
# Roles of tensors that mark a kind which is not decoded.
_FOREIGN = {
    "qweight": ("GPTQ or AWQ (qweight)", _FLOAT),
    "weight_packed": (
        "compressed-tensors pack-quantized (weight_packed)",
        f"{_SAVED} after from_pretrained(..., quantization_config=CompressedTensorsConfig("
        "dequantize=True))",
    ),
    "weight_global_scale": ("NVFP4 (weight_global_scale)", _FLOAT),
    "weight_scale_2": ("NVFP4 (weight_scale_2)", _FLOAT),
    "pre_quant_scale": ("of ModelOpt with scaled inputs (pre_quant_scale)", _FLOAT),
    "weight.absmax": ("bitsandbytes (absmax)", f"{_SAVED} after model.dequantize()"),
    "SCB": ("bitsandbytes (SCB)", f"{_SAVED} after model.dequantize()"),
}
_WAYS = {
    "bitsandbytes": f"{_SAVED} after model.dequantize()",
    "higgs": f"{_SAVED} after model.dequantize()",
}
_FORMATS = ("float-quantized", "naive-quantized", "mxfp8-quantized", "dense", "mixed-precision")
_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8")


@dataclass(frozen=True)
class _Stored:
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True)
class _Scaled:
    """A tensor of codes, its scales, and a zero point that must be zero."""

    weight: str
    scale: str
    zero_point: str | None

    def stored(self) -> list[str]:
        return [name for name in (self.weight, self.scale, self.zero_point) if name is not None]


@dataclass(frozen=True)
class _Packed:
    """gpt-oss' experts: two e2m1 codes a byte, groups of 32 with an exponent each."""

    blocks: str
    scales: str

    def stored(self) -> list[str]:
        return [self.blocks, self.scales]


@dataclass(frozen=True)
class _Grid:
    """Where a weight's scale is: [.., row_of[r], column_of[c]] of the scales in this shape."""

    shape: tuple[int, ...]
    row_of: torch.Tensor
    column_of: torch.Tensor

    def equals(self, other: _Grid) -> bool:
        return torch.equal(self.row_of, other.row_of) and torch.equal(
            self.column_of, other.column_of
        )


class DecodedFiles:
    """TensorFiles in which scales are hidden and codes are float32 tensors.

    They have the names that the float checkpoint has. Everything else passes through as stored.
    """

    def __init__(self, files: TensorFiles, quantization_config: Mapping[str, Any] | None) -> None:
        config = dict(quantization_config or {})
        _check_method(config)
        self._files = files
        self._blocks = _block_sizes(config)
        self._columns = config.get("quant_method") == "fbgemm_fp8"
        self._all = set(files.names())
        for name in files.names():
            _refuse_foreign(name)
        self._made: dict[str, _Scaled | _Packed] = {}
        self._find_packed()
        self._find_scaled()
        hidden = {name for made in self._made.values() for name in made.stored()}
        quantized = bool(config) or bool(self._made)
        self._dropped = [
            name
            for name in files.names()
            if quantized and name not in hidden and _is_not_of_weights(name)
        ]
        self._names = self._float_names(hidden | set(self._dropped))
        self._refuse_left_scales(hidden)

    def names(self) -> list[str]:
        return list(self._names)

    def read(self, name: str) -> torch.Tensor:
        made = self._made.get(name)
        if isinstance(made, _Scaled):
            return self._decode_scaled(made)
        if isinstance(made, _Packed):
            return self._decode_packed(name, made)
        tensor = self._files.read(name)
        if _is_float8(tensor.dtype):
            raise _without_scale(name, _Stored(tensor.dtype, tuple(tensor.shape)))
        return tensor

    def info(self, name: str) -> TensorInfo:
        made = self._made.get(name)
        if made is None:
            return self._files.info(name)
        if isinstance(made, _Packed):
            experts, rows, groups, half = self._stored(made.blocks).shape
            return TensorInfo("F32", (experts, groups * 2 * half, rows))
        stored = self._stored(made.weight)
        if stored.dtype in _CODES:
            return TensorInfo("F32", stored.shape)
        return TensorInfo("F32", (*stored.shape[:-1], 2 * stored.shape[-1]))

    def files(self) -> list[Path]:
        return self._files.files()

    def shards(self) -> dict[str, list[str]]:
        at = {made.stored()[0]: name for name, made in self._made.items()}
        shown = set(self._names)
        return {
            file: [at.get(name, name) for name in names if at.get(name, name) in shown]
            for file, names in self._files.shards().items()
        }

    def decoded_names(self) -> frozenset[str]:
        return frozenset(self._made)

    def consumed(self, name: str) -> list[str]:
        """The stored tensors that a tensor is made of: its own name where it was not decoded."""
        made = self._made.get(name)
        return [name] if made is None else made.stored()

    def dropped(self) -> list[str]:
        """Scales of activations and of key/value caches, which a float model has no use for."""
        return list(self._dropped)

    def _stored(self, name: str) -> _Stored:
        info = self._files.info(name)
        # Types that are not listed are neither codes nor scales.
        return _Stored(_DTYPES.get(info.dtype) or torch.bool, info.shape)

    def _find_packed(self) -> None:
        for name in self._files.names():
            base = name.removesuffix("_blocks")
            if base == name:
                continue
            scales = f"{base}_scales"
            blocks = self._stored(name)
            if scales not in self._all:
                # A float tensor may well be called so.
                if blocks.dtype == torch.uint8:
                    raise UsageError(
                        f"{name}: expected its exponents {scales} beside it, found none: "
                        "the checkpoint lost a file or a tensor; fetch it anew"
                    )
                continue
            self._check_packed(name, scales)
            self._made[base] = _Packed(name, scales)

    def _check_packed(self, name: str, scales: str) -> None:
        blocks, exponents = self._stored(name), self._stored(scales)
        half = _MX_GROUP // 2
        if blocks.dtype != torch.uint8 or len(blocks.shape) != 4 or blocks.shape[-1] != half:
            raise UsageError(
                f"{name}: expected MXFP4 as uint8 [experts, rows, groups, {half}], got {blocks}: "
                f"{_FLOAT}"
            )
        if exponents.dtype not in _EXPONENTS or exponents.shape != blocks.shape[:-1]:
            raise UsageError(
                f"{scales}: expected exponents as uint8 {list(blocks.shape[:-1])} for {name}, "
                f"got {exponents}: {_FLOAT}"
            )

    def _find_scaled(self) -> None:
        packed = {name for made in self._made.values() for name in made.stored()}
        alone: list[str] = []
        for name in self._files.names():
            scale = self._scale_of(name)
            if name in packed or _is_not_of_weights(name):
                continue
            stored = self._stored(name)
            if scale is None:
                if _is_float8(stored.dtype):
                    alone.append(name)
                continue
            if stored.dtype not in _CODES and not self._is_fp4(name, scale):
                continue
            self._grid(name, scale)
            zero = f"{name}_zero_point"
            self._made[name] = _Scaled(name, scale, zero if zero in self._all else None)
        # Scales and zero points may be of eight bits themselves.
        used = {name for made in self._made.values() for name in made.stored()}
        for name in alone:
            if name not in used:
                raise _without_scale(name, self._stored(name))

    def _scale_of(self, name: str) -> str | None:
        module, dot, leaf = name.rpartition(".")
        # The last two are DeepSeek-V4's and Mistral's.
        names = [f"{name}_scale_inv", f"{name}_scale"]
        if leaf == "weight":
            names += [f"{module}{dot}scale", f"{module}{dot}qscale_weight"]
        return next((scale for scale in names if scale in self._all), None)

    def _is_fp4(self, name: str, scale: str) -> bool:
        """DeepSeek-V4's experts: two e2m1 codes a byte, an exponent to 32 of a row."""
        stored, exponents = self._stored(name), self._stored(scale)
        return (
            stored.dtype in (torch.int8, getattr(torch, "float4_e2m1fn_x2", torch.int8))
            and len(stored.shape) >= 2
            and exponents.dtype in _EXPONENTS
            and exponents.shape == (*stored.shape[:-1], 2 * stored.shape[-1] // _MX_GROUP)
        )

    def _grid(self, name: str, scale: str) -> _Grid:
        weight, scales = self._stored(name), self._stored(scale)
        if scales.dtype not in (*_SCALES, *_EXPONENTS):
            raise UsageError(
                f"{scale}: expected scales in float32, bfloat16, float16 or e8m0 (uint8), "
                f"got {scales}: {_FLOAT}"
            )
        shape = weight.shape
        if weight.dtype not in _CODES:
            shape = (*shape[:-1], 2 * shape[-1])
        blocks = list(self._blocks)
        if scales.dtype in _EXPONENTS:
            blocks.append((1, _MX_GROUP))
        if not self._blocks:
            blocks.append(_USUAL_BLOCK)
        grids = _grids(
            shape,
            scales.shape,
            blocks,
            halves="gate_up" in name,
            columns=self._columns and len(shape) == 3,
        )
        if len(grids) > 1:
            raise UsageError(
                f"{scale}: expected scales that fit {name} {list(shape)} in one way, got "
                f"{scales}, which may be of its whole or of its gate and up apart: {_FLOAT}"
            )
        if not grids:
            sizes = " or ".join(f"{rows}x{columns}" for rows, columns in blocks)
            raise UsageError(
                f"{scale}: expected one scale for {name} {list(shape)}, one for each of its "
                f"rows, or one for each block of {sizes}, got {scales}: put the blocks' size "
                "into quantization_config's weight_block_size if it is another, or "
                f"{_FLOAT}"
            )
        return grids[0]

    def _float_names(self, hidden: set[str]) -> list[str]:
        """In the order of the files, each decoded tensor where its codes are."""
        at = {made.stored()[0]: name for name, made in self._made.items()}
        names = [
            at.get(name, name) for name in self._files.names() if name in at or name not in hidden
        ]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise UsageError(
                f"{twice[0]}: expected it as a float tensor or as MXFP4 blocks, got both: "
                "remove the one that is not the model's"
            )
        return names

    def _refuse_left_scales(self, hidden: set[str]) -> None:
        """Whether the scale of a weight that is no FP8 is in it already cannot be known."""
        for name in self._names:
            base = name.removesuffix("_inv").removesuffix("_scale")
            if not name.endswith((".weight_scale", ".weight_scale_inv")) or name in hidden:
                continue
            if base not in self._all:
                raise UsageError(
                    f"{name}: expected {base} beside it, found none: "
                    "the checkpoint lost a file or a tensor; fetch it anew"
                )
            raise UsageError(
                f"{base}: expected float8 beside {name}, got {self._stored(base)}: whether the "
                "scale is in it already cannot be known; remove the scale if it is, or "
                f"{_FLOAT}"
            )

    def _decode_scaled(self, made: _Scaled) -> torch.Tensor:
        grid = self._grid(made.weight, made.scale)
        if made.zero_point is not None and bool(self._files.read(made.zero_point).float().any()):
            raise UsageError(
                f"{made.zero_point}: expected zeros, since FP8 codes are signed, got others: "
                f"{_FLOAT}"
            )
        scales = _scale_values(made.scale, self._files.read(made.scale)).reshape(grid.shape)
        codes = self._files.read(made.weight)
        shape = codes.shape
        is_fp4 = codes.dtype not in _CODES
        if is_fp4:
            shape = torch.Size((*shape[:-1], 2 * shape[-1]))
            codes = codes.view(torch.uint8)
        matrices = codes.reshape(-1, *((1, *codes.shape)[-2:]))
        scales = scales.reshape(-1, *scales.shape[-2:]).expand(len(matrices), -1, -1)
        result = torch.empty((len(matrices), len(grid.row_of), len(grid.column_of)))
        # One matrix at a time: a second copy of all experts is much.
        for values, matrix, scale in zip(result, matrices, scales, strict=True):
            values.copy_(_nibbles(matrix) if is_fp4 else matrix)
            values *= scale.index_select(1, grid.column_of).index_select(0, grid.row_of)
        return result.reshape(shape)

    def _decode_packed(self, name: str, made: _Packed) -> torch.Tensor:
        self._check_packed(made.blocks, made.scales)
        blocks = self._files.read(made.blocks)
        scales = _scale_values(made.scales, self._files.read(made.scales))
        experts, rows, groups, half = blocks.shape
        # Stored are rows of outputs; GptOssExperts multiplies from the left.
        result = torch.empty((experts, groups * 2 * half, rows))
        for values, codes, scale in zip(result, blocks, scales, strict=True):
            values.copy_((_nibbles(codes) * scale.unsqueeze(-1)).reshape(rows, -1).T)
        return result


def decoded(files: TensorFiles, quantization_config: Mapping[str, Any] | None) -> DecodedFiles:
    """The files of a checkpoint with its quantized tensors as float ones.

    `quantization_config` is config.json's; without it, tensors in float8 are decoded with the
    scales beside them. UsageError for what is not decoded, before a tensor is read where the files
    are safetensors.
    """
    return DecodedFiles(files, quantization_config)


def _check_method(config: Mapping[str, Any]) -> None:
    if not config:
        return
    method = config.get("quant_method")
    if method in ("fp8", "fbgemm_fp8", "mxfp4"):
        return
    kind = f"quantized with {method}" if method else "quantized with an unnamed method"
    way = _WAYS.get(str(method), _FLOAT)
    if method == "compressed-tensors":
        format_ = config.get("format")
        for key in ("transform_config", "sparsity_config"):
            used = config.get(key) or {}
            if used and used.get("format") != "dense":
                raise UsageError(f"the source is {kind} and has a {key}, not decoded here: {way}")
        if format_ in _FORMATS:
            return
        kind, way = f"{kind} in {format_}", _FOREIGN["weight_packed"][1]
    if method == "modelopt":
        algorithm = config.get("quant_algo")
        if algorithm in _ALGORITHMS:
            return
        kind = f"{kind} in {algorithm}"
    raise UsageError(
        f"the source is {kind}: expected a float model, FP8 (fp8, fbgemm_fp8, "
        f"compressed-tensors' float-quantized, modelopt's FP8) or mxfp4: {way}"
    )


def _block_sizes(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The blocks that the configuration names, of all its groups."""
    sizes = [config.get("weight_block_size")]
    groups = config.get("config_groups") or {}
    for group in groups.values():
        weights = group.get("weights") or {}
        structure, size = weights.get("block_structure"), weights.get("group_size")
        if weights.get("strategy") == "block":
            # Older ones have "128x128".
            sizes.append(structure.split("x") if isinstance(structure, str) else structure)
        elif weights.get("strategy") == "group":
            sizes.append([1, size])
    found: list[tuple[int, int]] = []
    for block in sizes:
        if block is None:
            continue
        try:
            rows, columns = (int(part) for part in block)
        except (TypeError, ValueError):
            rows = columns = 0
        if rows < 1 or columns < 1:
            raise UsageError(
                f"quantization_config: expected a block size of two positive numbers, got {block}"
            )
        if (rows, columns) not in found:
            found.append((rows, columns))
    return found


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", None),
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _refuse_foreign(name: str) -> None:
    for role, (kind, way) in _FOREIGN.items():
        if name.endswith(f".{role}"):
            raise UsageError(f"{name}: the source is {kind}, not decoded here: {way}")


def _is_not_of_weights(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf in _NOT_OF_WEIGHTS or leaf.endswith("_activation_scale")


def _is_float8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


def _without_scale(name: str, stored: _Stored) -> UsageError:
    return UsageError(
        f"{name}: expected its scales beside it (weight_scale_inv or weight_scale), since it is "
        f"{stored}, found none: fetch the checkpoint's missing tensors, or {_FLOAT}"
    )


def _grids(
    shape: tuple[int, ...],
    scales: tuple[int, ...],
    blocks: Iterable[tuple[int, int]],
    *,
    halves: bool,
    columns: bool,
) -> list[_Grid]:
    """The ways in which scales of this shape lie over a weight: none where they do not fit.

    `halves` are two matrices above one another, each with blocks of its own; `columns` have the
    scales of their columns as [.., columns, 1].
    """
    height, width = (1, *shape)[-2:]
    lead = shape[:-2]
    if len(shape) == 2 and len(scales) == 4 and scales[1] == scales[3] == 1:
        # ModelOpt's blocks.
        scales = (scales[0], scales[2])
    if all(size == 1 for size in scales):
        scales = (1,) * (len(lead) + 2)
        lead = scales[:-2]
    elif scales in ((*lead, height), lead):
        scales = (*scales, *([1] * (len(shape) - len(scales))))
    elif columns and scales == (*lead, width, 1):
        scales = (*lead, 1, width)
    if scales[:-2] != lead or len(scales) != len(lead) + 2:
        return []
    candidates = [*blocks, (height, width)]
    candidates += [] if columns else [(1, width)]
    candidates += [(height, 1)] if len(lead) == 1 else []
    found = [
        _Grid(scales, torch.arange(height) // rows, torch.arange(width) // wide)
        for rows, wide in candidates
    ]
    if halves and len(lead) == 1 and height % 2 == 0:
        for rows, wide in (*blocks, (height // 2, width)):
            half = torch.arange(height // 2) // rows
            rows_of_both = torch.cat([half, half + half[-1] + 1])
            found.append(_Grid(scales, rows_of_both, torch.arange(width) // wide))
    distinct: list[_Grid] = []
    for grid in found:
        sizes = (int(grid.row_of[-1]) + 1, int(grid.column_of[-1]) + 1)
        if sizes == scales[-2:] and not any(grid.equals(other) for other in distinct):
            distinct.append(grid)
    return distinct


def _scale_values(name: str, scales: torch.Tensor) -> torch.Tensor:
    if scales.dtype in _EXPONENTS:
        # 2 ** -127 is subnormal, which an exp2 may flush; 255 is NaN.
        bits = scales.view(torch.uint8).to(torch.int32)
        values = torch.where(bits == 0, 0x00400000, bits << 23).view(torch.float32)
        values = torch.where(bits == 255, torch.nan, values)
    else:
        values = scales.float()
    bad = ~(torch.isfinite(values) & (values > 0))
    if bool(bad.any()):
        at = [int(index) for index in bad.nonzero()[0]] if bad.dim() else []
        raise UsageError(
            f"{name}: expected positive finite scales, got {float(values[tuple(at)])} at "
            f"index {at}: the checkpoint is damaged; fetch it anew, or {_FLOAT}"
        )
    return values


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Two values a byte, the low four bits first."""
    pairs = torch.tensor([(_E2M1[byte & 15], _E2M1[byte >> 4]) for byte in range(256)])
    # A pair is looked up as one number of 64 bits.
    found = pairs.view(torch.int64).flatten().index_select(0, codes.flatten().int())
    return found.view(torch.float32).reshape(*codes.shape[:-1], 2 * codes.shape[-1])
