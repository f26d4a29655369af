"""The output folder: the model's own files, quantized weights in the place of float ones."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from certiq.model.checkpoint_files import (
    DTYPE_NAMES,
    INDEX,
    SINGLE,
    TORCH_DTYPES,
    TensorInfo,
    shard_names,
)
from certiq.model.errors import UsageError
from certiq.model.journal import Journal, write_text
from certiq.model.naming import StoredLinear
from certiq.model.plan import DENSE_DTYPES, Plan
from certiq.model.quantization_config import quantization_config
from certiq.model.settings import PACKED, RunSettings
from certiq.model.shards import Entry, write_safetensors
from certiq.model.source import ModelSource

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SCALE_DTYPES: dict[str, Literal["f16", "bf16", "f32"]] = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
}
# What holds weights is written anew or is another edition of them; what is hidden is nobody's.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
_OURS = ("config.json", "quantize_config.json", INDEX, "report.json", "report.html", "recipe.yaml")


def main_dtype(settings: RunSettings, source: ModelSource) -> str:
    """The type that most of the checkpoint's tensors have, and compressed-tensors' scales."""
    if settings.dtype is not None:
        return settings.dtype
    if source.is_gguf:
        return "float16"
    return source.stored_dtype if source.stored_dtype in DTYPES else "float32"


def scale_dtype(settings: RunSettings, source: ModelSource) -> Literal["f16", "bf16", "f32"] | None:
    """compressed-tensors computes in the scales' type, which is to be the model's."""
    if settings.spec.format != "compressed_tensors":
        return settings.spec.scale_dtype
    return SCALE_DTYPES[main_dtype(settings, source)]


@dataclass(frozen=True)
class Written:
    """What was written beside the weights."""

    tensor_bytes: int
    copied: list[str]
    not_copied: list[str]


class CheckpointWriter:
    """Writes the model's files again: each tensor keeps name, type and bytes, or is replaced.

    Two things change a type: --dtype, and what a quantized source kept in FP8 or MXFP4, which comes
    out in the checkpoint's main type where it is not quantized. With a GGUF source there are no
    files of transformers to copy; they are made.
    """

    def __init__(
        self, settings: RunSettings, source: ModelSource, journal: Journal, plan: Plan
    ) -> None:
        self._settings = settings
        self._source = source
        self._journal = journal
        self._plan = plan
        self._dtype = main_dtype(settings, source)
        self._packed = plan.format in PACKED
        self._orders_groups = False
        # The linears that are quantized, by the tensor that has their float weights.
        self._in_tensor: dict[str, list[StoredLinear]] = defaultdict(list)
        # Those that get a tensor of their own beside the one that they shared.
        self._further: list[StoredLinear] = []
        for planned in plan.all().values():
            linear = planned.linear
            assert linear.tensor is not None
            if linear.tied and not linear.embedding:
                self._further.append(linear)
            else:
                self._in_tensor[linear.tensor].append(linear)
        # Float experts that become one tensor, by the tensor of the first; the others go into it.
        self._joined = {
            experts[0].tensor: (parameter, experts) for parameter, experts in plan.joined.items()
        }
        self._within = {own.tensor for experts in plan.joined.values() for own in experts}
        self._within |= {name for _, names in plan.made.values() for name in names}

    def check_values(self) -> None:
        """UsageError for a value that stays and that its new type cannot hold."""
        if DTYPES[self._dtype] != torch.float16:
            return
        for name in self._source.files.names():
            stored = self._source.files.info(name).dtype
            if name in self._in_tensor or stored == "F16" or self._kept(name):
                continue
            tensor = self._source.files.read(name)
            if not tensor.is_floating_point():
                continue
            narrow = tensor.to(torch.float16)
            lost = torch.isfinite(tensor) & ~torch.isfinite(narrow)
            if bool(lost.any()):
                value = float(tensor[lost].reshape(-1)[0])
                raise UsageError(
                    f"{name} has a value of {value:g}, beyond the 65504 of float16: expected "
                    "--dtype bfloat16 or float32"
                )

    def write(self) -> Written:
        output = self._settings.output
        shards = self._source.files.shards()
        # Whatever an earlier attempt left promises nothing. Loaders would take a whole file of it
        # before shards.
        stale = {SINGLE, *shard_names(output / INDEX)} - shards.keys()
        for name in ("config.json", "quantize_config.json", *sorted(stale), INDEX):
            (output / name).unlink(missing_ok=True)
        weight_map: dict[str, str] = {}
        total = 0
        for file, names in shards.items():
            entries = [entry for name in names for entry in self._entries(name)]
            if file == list(shards)[-1]:
                entries += self._further_entries()
            write_safetensors(output / file, entries)
            weight_map |= {entry.name: file for entry in entries}
            total += sum(entry.info.bytes for entry in entries)
        if len(shards) > 1:
            self._write_index(output, weight_map, total)
        copied, left = self._copy_files(output)
        self._write_config(output)
        return Written(total, copied, left)

    def _kept(self, name: str) -> bool:
        """True: a tensor that stays as it is, byte for byte."""
        if name in self._source.decoded_names():
            return False
        if self._settings.dtype is None and not self._source.is_gguf:
            return True
        # What has another type than the checkpoint's has it for a reason.
        usual = DTYPE_NAMES[DTYPES[self._source.usual_dtype]]
        return self._source.files.info(name).dtype != usual

    def _entries(self, name: str) -> Iterator[Entry]:
        linears = self._in_tensor.get(name)
        if name in self._joined:
            yield self._joined_entry(*self._joined[name])
        elif name in self._plan.made:
            for parameter in self._plan.made[name][0]:
                yield self._made_entry(parameter, name)
        elif name in self._within:
            return
        elif linears is None:
            yield self._kept_entry(name)
        elif not self._packed:
            yield self._dense_entry(name, linears)
        else:
            for linear in linears:
                yield from self._packed_entries(linear)
            yield from self._float_experts(name, linears)

    def _further_entries(self) -> Iterator[Entry]:
        """Heads that no longer share the embedding's weight."""
        for linear in self._further:
            if self._packed:
                yield from self._packed_entries(linear)
            else:
                assert linear.tensor is not None
                yield self._dense_entry(linear.tensor, [linear], f"{linear.prefix}.weight")
        heads = {own.prefix for own in self._further}
        for planned in self._plan.outside.values():
            own = planned.linear
            if own.tied and own.embedding:
                # The head keeps the float weight that the table had.
                for name in self._source.heads_of(own.name):
                    if name not in heads:
                        assert own.tensor is not None
                        kept = self._kept_entry(own.tensor)
                        yield Entry(f"{name}.weight", kept.info, kept.read)

    def _kept_entry(self, name: str) -> Entry:
        return Entry(name, self._kept_info(name), lambda: self._read_kept(name))

    def _kept_info(self, name: str) -> TensorInfo:
        info = self._source.files.info(name)
        if self._kept(name) or not info.dtype.startswith(("F", "BF")):
            return info
        return TensorInfo(DTYPE_NAMES[DTYPES[self._dtype]], info.shape)

    def _read_kept(self, name: str) -> torch.Tensor:
        tensor = self._source.files.read(name)
        if self._kept(name) or not tensor.is_floating_point():
            return tensor
        return tensor.to(DTYPES[self._dtype])

    def _joined_entry(self, parameter: str, experts: list[StoredLinear]) -> Entry:
        """A tensor of all experts as the model has it."""
        first = experts[0]
        assert first.tensor is not None
        shape = tuple(self._source.model.get_parameter(parameter).shape)
        info = TensorInfo(self._kept_info(first.tensor).dtype, shape)

        def made() -> torch.Tensor:
            tensor = torch.empty(shape, dtype=TORCH_DTYPES[info.dtype])
            for own in experts:
                assert own.tensor is not None
                assert own.matrix is not None
                own.matrix.put(tensor, self._read_kept(own.tensor))
            return tensor

        return Entry(parameter, info, made)

    def _made_entry(self, parameter: str, first: str) -> Entry:
        """What a converter makes of float tensors."""
        shape = tuple(self._source.model.get_parameter(parameter).shape)
        info = TensorInfo(self._kept_info(first).dtype, shape)

        def made() -> torch.Tensor:
            found = self._source.places_of(parameter)
            assert found is not None
            names, places = found
            return torch.cat([self._read_kept(name).reshape(-1) for name in names])[places]

        return Entry(parameter, info, made)

    def _dense_entry(
        self, name: str, linears: list[StoredLinear], written: str | None = None
    ) -> Entry:
        """An ordinary tensor, in the layout that it had."""
        dtype = TORCH_DTYPES[DENSE_DTYPES[self._plan.format]]

        def made() -> torch.Tensor:
            tensor = self._source.files.read(name).to(dtype)
            for linear in linears:
                weight = self._journal.read_tensor(linear.name, "weight").to(dtype)
                if linear.within is not None:
                    tensor = tensor.contiguous()
                    linear.within.put(tensor, weight)
                elif linear.together:
                    assert linear.matrix is not None
                    linear.matrix.put(tensor, weight)
                else:
                    tensor = weight.t() if linear.transposed else weight
            return tensor

        info = self._source.files.info(name)
        return Entry(written or name, TensorInfo(DTYPE_NAMES[dtype], info.shape), made)

    def _packed_entries(self, linear: StoredLinear) -> Iterator[Entry]:
        for role, info in self._journal.infos(linear.name).items():
            read = partial(self._journal.read_tensor, linear.name, role)
            if role == "g_idx":
                index = read()
                self._orders_groups |= bool((index[1:] < index[:-1]).any())
            yield Entry(f"{linear.prefix}.{role}", info, read)

    def _float_experts(self, name: str, linears: list[StoredLinear]) -> Iterator[Entry]:
        """Those that stay float, of a tensor of all experts of which some are packed."""
        packed = {linear.name for linear in linears}
        others = [
            linear
            for linear in self._plan.linears.values()
            if linear.together and linear.tensor == name and linear.name not in packed
        ]
        for linear in others:
            info = self._kept_info(name)
            yield Entry(
                f"{linear.prefix}.weight",
                TensorInfo(info.dtype, (linear.rows, linear.features)),
                partial(self._one_expert, linear),
            )

    def _one_expert(self, linear: StoredLinear) -> torch.Tensor:
        assert linear.matrix is not None
        assert linear.tensor is not None
        return linear.matrix.of(self._read_kept(linear.tensor))

    def _write_index(self, output: Path, weight_map: Mapping[str, str], total: int) -> None:
        metadata: dict[str, Any] = {}
        own = self._source.folder / INDEX
        if own.exists():
            metadata = dict(json.loads(own.read_text(encoding="utf-8")).get("metadata") or {})
        metadata["total_size"] = total
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        write_text(output / INDEX, json.dumps(index, indent=2) + "\n")

    def _copy_files(self, output: Path) -> tuple[list[str], list[str]]:
        """All other files of the model."""
        if self._source.is_gguf:
            self._source.tokenizer().save_pretrained(output)
            return [], []
        copied: list[str] = []
        left: list[str] = []
        folder = self._source.folder
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if not path.is_file() or any(part.startswith(".") for part in name.parts):
                continue
            if path.suffix in _WEIGHTS or path.name.endswith(".index.json"):
                if path not in self._source.files.files() and path.name != INDEX:
                    left.append(str(name))
                continue
            if len(name.parts) == 1 and path.name in _OURS:
                if path.name != "config.json":
                    left.append(str(name))
                continue
            target = output / name
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.part")
            shutil.copyfile(path, part)
            part.replace(target)
            copied.append(str(name))
        return copied, left

    def _write_config(self, output: Path) -> None:
        config = self._config()
        quantization = quantization_config(
            self._plan.specs(),
            self._plan.float_modules,
            desc_act=self._orders_groups,
            embeddings=self._plan.embeddings(),
        )
        if quantization is not None:
            config["quantization_config"] = quantization
        if quantization is not None and quantization["quant_method"] == "gptq":
            write_text(output / "quantize_config.json", json.dumps(quantization, indent=2) + "\n")
        write_text(output / "config.json", json.dumps(config, indent=2) + "\n")

    def _config(self) -> dict[str, Any]:
        """The model's own, of which only what changed is changed."""
        if self._source.is_gguf:
            config = json.loads(self._source.config.to_json_string(use_diff=True))
            config["dtype"] = self._dtype
        else:
            config = dict(self._source.config_json)
            config.pop("quantization_config", None)
            if self._settings.dtype is not None:
                config["torch_dtype" if "torch_dtype" in config else "dtype"] = self._dtype
        if self._plan.outside:
            # A head and an embedding that shared a weight no longer do.
            config["tie_word_embeddings"] = False
            if "text_config" in config:
                config["text_config"] = config["text_config"] | {"tie_word_embeddings": False}
        if not config.get("architectures"):
            config["architectures"] = [type(self._source.model).__name__]
        return config
