"""The output folder: a checkpoint that loaders of its format read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from certiq.model.blocks import find_stack
from certiq.model.errors import UsageError
from certiq.model.journal import Journal, write_text
from certiq.model.naming import LinearName
from certiq.model.settings import RunSettings
from certiq.model.source import ModelSource
from certiq.torch.linears import is_conv1d, is_linear

SHARD_BYTES = 4 << 30
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SCALE_DTYPES: dict[str, Literal["f16", "bf16", "f32"]] = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
}
DENSE_DTYPES = {
    "dense_f32": "float32",
    "dense_f16": "float16",
    "dense_bf16": "bfloat16",
}


def output_dtype(settings: RunSettings, source: ModelSource) -> str:
    """The type of the tensors that are not quantized, and of compressed-tensors' scales."""
    if settings.dtype is not None:
        return settings.dtype
    if settings.spec.format in DENSE_DTYPES:
        return DENSE_DTYPES[settings.spec.format]
    if source.is_gguf:
        return "float16"
    return source.stored_dtype if source.stored_dtype in DTYPES else "float32"


def scale_dtype(settings: RunSettings, source: ModelSource) -> Literal["f16", "bf16", "f32"] | None:
    """compressed-tensors computes in the scales' type, which is to be the model's."""
    if settings.spec.format != "compressed_tensors":
        return settings.spec.scale_dtype
    return SCALE_DTYPES[output_dtype(settings, source)]


def check_loadable(settings: RunSettings, source: ModelSource, linears: Sequence[str]) -> None:
    """Refuses before any work what no loader of the format could read."""
    if settings.spec.format != "compressed_tensors":
        return
    for name in linears:
        try:
            module = source.model.get_submodule(name)
        except AttributeError:
            continue  # This expert was taken apart.
        if is_conv1d(module):
            raise UsageError(
                f"{name} is a Conv1D, which compressed-tensors does not know: use gptq or gptq_v2"
            )


class CheckpointWriter:
    """Gathers the journal's tensors and those of the source that stay."""

    def __init__(
        self,
        settings: RunSettings,
        source: ModelSource,
        journal: Journal,
        names: dict[str, LinearName],
    ) -> None:
        self._settings = settings
        self._source = source
        self._journal = journal
        self._names = names
        self._dtype = output_dtype(settings, source)
        self._orders_groups = False

    def write(self) -> None:
        output = self._settings.output
        weight_map, total = self._write_shards(output)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        if len(set(weight_map.values())) > 1:
            write_text(output / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        self._source.tokenizer().save_pretrained(output)
        generation = getattr(self._source.model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(output)
        self._write_config(output)

    def left_float(self) -> list[str]:
        """Names of modules with two-dimensional weights that a loader must not look for packed."""
        quantized = set(self._names)
        return [
            name
            for name, module in self._source.model.named_modules()
            if is_linear(module) and name not in quantized
        ]

    def _write_shards(self, output: Path) -> tuple[dict[str, str], int]:
        shards: list[tuple[Path, list[str]]] = []
        pending: dict[str, torch.Tensor] = {}
        size = total = 0

        def flush() -> None:
            nonlocal size
            path = output / f".shard-{len(shards)}.part"
            save_file(pending, path, {"format": "pt"})
            shards.append((path, list(pending)))
            pending.clear()
            size = 0

        for name, tensor in self._tensors():
            own = tensor.numel() * tensor.element_size()
            if pending and size + own > SHARD_BYTES:
                flush()
            pending[name] = tensor.contiguous()
            size += own
            total += own
        flush()
        weight_map: dict[str, str] = {}
        for number, (path, tensors) in enumerate(shards, 1):
            final = "model.safetensors"
            if len(shards) > 1:
                final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            path.replace(output / final)
            weight_map |= dict.fromkeys(tensors, final)
        return weight_map, total

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        replaced = {tensor for name in self._names.values() for tensor in name.replaces}
        dtype = DTYPES[self._dtype]
        # A tied head is in some checkpoints, and not in those that transformers writes.
        for name in self._source.files.names():
            if name in replaced or name in self._source.unused:
                continue
            tensor = self._source.files.read(name)
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
        for linear, own in self._names.items():
            done = self._journal.read(linear)
            if "weight" in done.tensors:
                # Dense: an ordinary checkpoint, without scales beside the weights.
                weight = done.tensors["weight"]
                module = _submodule(self._source.model, linear)
                turned = module is not None and is_conv1d(module)
                yield f"{own.prefix}.weight", weight.t() if turned else weight
                continue
            self._note_order(done.tensors)
            for role, tensor in done.tensors.items():
                yield f"{own.prefix}.{role}", tensor

    def _note_order(self, tensors: dict[str, torch.Tensor]) -> None:
        index = tensors.get("g_idx")
        if index is not None and bool((index[1:] < index[:-1]).any()):
            self._orders_groups = True

    def _write_config(self, output: Path) -> None:
        self._source.config.save_pretrained(output)
        path = output / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype"] = self._dtype
        config.setdefault("architectures", [type(self._source.model).__name__])
        if config["architectures"] is None:
            config["architectures"] = [type(self._source.model).__name__]
        quantization = self._quantization_config()
        if quantization is not None:
            config["quantization_config"] = quantization
        write_text(path, json.dumps(config, indent=2) + "\n")
        if quantization is not None and quantization["quant_method"] == "gptq":
            write_text(output / "quantize_config.json", json.dumps(quantization, indent=2) + "\n")

    def _quantization_config(self) -> dict[str, Any] | None:
        spec = self._settings.spec
        bits, group_size = spec.bits or 4, spec.group_size or 0
        symmetric = spec.symmetric is not False
        if spec.format in ("gptq", "gptq_v2"):
            return {
                "bits": bits,
                "group_size": group_size or -1,
                "desc_act": self._orders_groups,
                "sym": symmetric,
                "lm_head": False,
                "quant_method": "gptq",
                "checkpoint_format": spec.format,
                "pack_dtype": "int32",
                "meta": {"quantizer": ["certiq"]},
                **self._left_in_blocks(),
            }
        if spec.format == "compressed_tensors":
            weights = {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "group" if group_size else "channel",
                "group_size": group_size or None,
                "dynamic": False,
                "actorder": None,
            }
            group = {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
            return {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "config_groups": {"group_0": group},
                "ignore": self.left_float(),
                "kv_cache_scheme": None,
            }
        return None

    def _left_in_blocks(self) -> dict[str, Any]:
        """Loaders of GPTQ take every linear of a block for packed unless they are told otherwise:
        GPTQModel what is not, transformers what is."""
        stack, _ = find_stack(self._source.model)
        left = [name for name in self.left_float() if name.startswith(f"{stack}.")]
        if not left:
            return {}
        return {
            "dynamic": {f"-:^{re.escape(name)}$": {} for name in left},
            "modules_in_block_to_quantize": [list(self._names)],
        }


def _submodule(model: torch.nn.Module, name: str) -> torch.nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
