"""A float model on disk, brought into memory piece by piece."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from certiq.model.checkpoint_files import GgufFiles, open_folder
from certiq.model.decode import decoded
from certiq.model.errors import UsageError
from certiq.torch.finite import not_finite

# What a tokenizer, a chat template or a configuration may be in; the weights are counted apart.
_SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")


class ModelSource:
    """A checkpoint folder of transformers, or a GGUF file.

    `model` has its parameters on the meta device; `load_shell` fills those outside the stack of
    blocks and `load_block` those of a copy of one block. Old names and fused tensors are converted
    by transformers' own rules; `names_of` tells what the checkpoint calls a parameter of the model.
    Tensors that a quantized checkpoint keeps in FP8 or MXFP4 are read as what they stand for.
    """

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder")
        self.path = path
        self.is_gguf = path.is_file()
        if self.is_gguf and path.suffix.lower() != ".gguf":
            raise UsageError(f"{path}: expected a folder or a .gguf file")
        self.folder = path.parent if self.is_gguf else path
        self.arguments = {"gguf_file": path.name} if self.is_gguf else {}
        self.config_json = {} if self.is_gguf else _read_config(path)
        self.config = self._read("config.json", AutoConfig)
        quantization = self.config_json.get("quantization_config")
        if getattr(self.config, "quantization_config", None) is not None:
            # The model is built as the float one that its tensors are decoded to.
            del self.config.quantization_config
        # This is the checkpoint's type; building the model sets it to `dtype`.
        said = str(getattr(self.config, "dtype", None) or "").removeprefix("torch.")
        self.dtype = dtype
        self.device = device
        kind = model_class(self.config)
        _check_kind(self.config, kind)
        with init_empty_weights(include_buffers=False):
            self.model = kind._from_config(copy.deepcopy(self.config), dtype=dtype)
        self.model.eval().requires_grad_(False)
        if self.is_gguf:
            self.files: Any = GgufFiles(path, self.model)
        else:
            self.files = decoded(open_folder(path), quantization)
        # The type of most values, whatever the configuration says.
        self.usual_dtype = self._usual_dtype()
        self.stored_dtype = said or self.usual_dtype
        self._mapping = get_model_conversion_mapping(self.model)
        # Each parameter of the model has the tensors it is made of, and their converter's pattern.
        self._sources: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
        # The first of the parameters that the same converter makes, as transformers calls them.
        self._converted: dict[str, str] = {}
        # Tensors that the model has no parameter for (of further heads, say) stay as they are.
        self.unused: list[str] = []
        # Tensors of the checkpoint that are parameters; a buffer may be infinite, as a mask is.
        self._weights: set[str] = set()
        self._map_names()
        self.shared = self._find_shared()
        self._check_complete()
        if not self.is_gguf:
            # Those of a GGUF file take their shapes when they are read.
            self._check_fit()

    def tokenizer(self) -> Any:
        return self._read("its tokenizer", AutoTokenizer)

    def load_shell(self, stack: str) -> None:
        """Everything but the blocks of the stack, tied and moved to the device."""
        inside = f"{stack}."
        names = [
            name
            for name, _ in self._parameters_and_buffers(self.model)
            if not name.startswith(inside)
        ]
        outside = f" (beside {stack}.*, which would read it or be read by it)"
        self._fill(self.model, "", names, outside)
        self.model.tie_weights()
        self._untie(inside)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.device.type != "meta":
                    module._buffers[name] = buffer.to(self.device)

    def _untie(self, inside: str) -> None:
        """As transformers does, leaves apart what the checkpoint has twice, with other values."""
        for name, other in self.model.all_tied_weights_keys.items():
            sources = [self._sources.get(each, []) for each in (name, other)]
            apart = [len(each) == 1 for each in sources]
            if not all(apart) or name.startswith(inside) or other.startswith(inside):
                continue
            own, shared = (self.files.read(tensor) for ((tensor, _),) in sources)
            if not torch.equal(own, shared):
                self._assign(self.model, name, own)

    def load_block(self, blocks: nn.ModuleList, stack: str, index: int) -> nn.Module:
        """A copy of a block with its weights; the model's own keeps none."""
        own = blocks[index]
        loaded = copy.deepcopy(own)
        # What runs the stack gives the model's own blocks another one.
        vars(loaded).pop("forward", None)
        prefix = f"{stack}.{index}."
        names = [name for name, _ in self._parameters_and_buffers(loaded)]
        # Converters write into the model.
        blocks[index] = loaded
        try:
            self._fill(loaded, prefix, names)
        finally:
            blocks[index] = own
        for module in loaded.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        return loaded.eval().requires_grad_(False)

    def names_of(self, parameter: str) -> list[tuple[str, str | None]]:
        """A parameter's names in the checkpoint: one, or several that a converter (whose
        source pattern stands beside each) fuses."""
        return self._sources.get(self.shared.get(parameter, parameter), [])

    def places_of(self, parameter: str) -> tuple[list[str], torch.Tensor] | None:
        """Where the values of a parameter that a converter makes are from: the tensors it is made
        with, and for each value its number if these are counted through one after another.

        The converter itself says so: it is run on those numbers. None where none makes it, or where
        it does more than put values in other places.
        """
        target = self._converted.get(parameter)
        if target is None:
            return None
        sources = self._sources[target]
        converter = copy.deepcopy(
            next(
                item
                for item in self._mapping
                if isinstance(item, WeightConverter) and sources[0][1] in item.source_patterns
            )
        )
        count = 0
        for name, pattern in sources:
            info = self.files.info(name)
            numbers = torch.arange(count, count + info.values).reshape(info.shape)
            converter.add_tensor(target, name, pattern, numbers)
            count += info.values
        try:
            made = converter.convert(target, model=self.model, config=self.model.config)
        except Exception:  # Converters are transformers', and made for float values.
            return None
        value = made.get(parameter)
        places = value[0] if isinstance(value, list) else value
        shape = self.model.get_parameter(parameter).shape
        whole = isinstance(places, torch.Tensor) and not places.is_floating_point()
        if not whole or places.shape != shape or len(torch.unique(places)) != places.numel():
            return None
        if not 0 <= int(places.min()) <= int(places.max()) < count:
            return None
        return [name for name, _ in sources], places

    def is_converted(self, name: str) -> bool:
        """Whether a converter takes a tensor of this name."""
        renamings = [item for item in self._mapping if isinstance(item, WeightRenaming)]
        converters = [item for item in self._mapping if isinstance(item, WeightConverter)]
        state = self.model.state_dict()
        prefix = self.model.base_model_prefix
        return rename_source_key(name, renamings, converters, prefix, state)[1] is not None

    def made_of_weights(self) -> dict[str, tuple[list[str], list[str]]]:
        """Parameters that one converter makes of tensors that its patterns call `.weight`, and
        these tensors, by the first of the parameters."""
        found: dict[str, tuple[list[str], list[str]]] = {}
        patterns = {
            source: all(own.endswith(".weight") for own in item.source_patterns)
            for item in self._mapping
            if isinstance(item, WeightConverter)
            for source in item.source_patterns
        }
        for parameter, target in self._converted.items():
            sources = self._sources[target]
            if all(pattern is not None and patterns[pattern] for _, pattern in sources):
                found.setdefault(target, ([], [name for name, _ in sources]))[0].append(parameter)
        return found

    def heads_of(self, embedding: str) -> list[str]:
        """Modules that share the weight of an embedding."""
        weight = f"{embedding}.weight"
        return [
            name.removesuffix(".weight") for name, first in self.shared.items() if first == weight
        ]

    def decoded_names(self) -> frozenset[str]:
        """Tensors that the checkpoint keeps in another form than their float values."""
        return frozenset() if self.is_gguf else self.files.decoded_names()

    def identity(self) -> dict[str, str]:
        """Digests of all that the model is: its weights and the small files beside them."""
        small = [] if self.is_gguf else self._small_files()
        with ThreadPoolExecutor() as pool:
            weights = list(pool.map(_sha256, self.files.files()))
            rest = list(pool.map(_sha256, small))
        named = {path.name: digest for path, digest in zip(small, rest, strict=True)}
        config = named.pop("config.json", "")
        return {
            "weights": _joined(weights),
            "config": config,
            "tokenizer_and_other_files": _joined(f"{name} {named[name]}" for name in sorted(named)),
        }

    def _small_files(self) -> list[Path]:
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.is_file() and path.suffix in _SMALL_FILES and not path.name.startswith(".")
        )

    def _read(self, what: str, kind: Any) -> Any:
        try:
            return kind.from_pretrained(str(self.folder), **self.arguments)
        except Exception as error:  # transformers raises a dozen types for files that do not serve.
            raise UsageError(
                f"{self.path}: transformers cannot read {what}: {_first_line(error)}"
            ) from error

    def _fill(self, module: nn.Module, prefix: str, names: Iterable[str], where: str = "") -> None:
        """Reads the named parameters and buffers of a module.

        UsageError where one is not finite: its name, the place in it, and `where`.
        """
        converted: list[str] = []
        for name in names:
            sources = self.names_of(prefix + name)
            if len(sources) == 1 and sources[0][1] is None:
                self._assign(module, name, self._read_tensor(sources[0][0], where))
            elif sources:
                converted.append(prefix + name)
        if converted:
            self._convert(converted, where)

    def _read_tensor(self, name: str, where: str) -> torch.Tensor:
        tensor = self.files.read(name)
        bad = not_finite(tensor) if name in self._weights else None
        if bad is not None:
            raise UsageError(
                f"{self.path}: {name}{where} is {bad}: expected finite values in float32"
            )
        return tensor

    def _assign(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        parent, _, leaf = name.rpartition(".")
        holder = module.get_submodule(parent)
        is_parameter = leaf in holder._parameters
        expected = (holder._parameters if is_parameter else holder._buffers)[leaf]
        assert expected is not None
        if tensor.shape != expected.shape:
            raise UsageError(
                f"{self.path}: {name}: expected {list(expected.shape)} as its configuration says, "
                f"got {list(tensor.shape)}"
            )
        if tensor.is_floating_point():
            # Some modules ask for float32 in a model of another type.
            tensor = tensor.to(expected.dtype)
        # A tensor that was mapped from a file would hold the file.
        value = tensor.to(self.device).contiguous()
        if is_parameter:
            holder._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            holder._buffers[leaf] = value

    def _convert(self, parameters: list[str], where: str) -> None:
        """Lets transformers put parameters together from several tensors."""
        names = [name for own in parameters for name, _ in self.names_of(own)]
        tensors = {name: self._read_tensor(name, where) for name in names}
        config = LoadStateDictConfig(
            dtype=self.dtype,
            device_map={"": self.device},
            weight_mapping=copy.deepcopy(self._mapping),
        )
        with quiet_bars():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, config, None)
        if info.mismatched_keys or info.conversion_errors or info.error_msgs:
            raise UsageError(
                f"{self.path}: does not fit {type(self.model).__name__}: "
                f"{[*info.mismatched_keys, *info.conversion_errors, *info.error_msgs]}"
            )

    @staticmethod
    def _parameters_and_buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
        return [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]

    def _map_names(self) -> None:
        renamings = [item for item in self._mapping if isinstance(item, WeightRenaming)]
        converters = [item for item in self._mapping if isinstance(item, WeightConverter)]
        state = self.model.state_dict()
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        targets = {
            pattern: converter.target_patterns
            for converter in converters
            for pattern in converter.source_patterns
        }
        prefix = self.model.base_model_prefix
        for name in sorted(self.files.names(), key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state:
                target, pattern = rename_source_key(name, [], [], prefix, state)
            if target not in state:
                self.unused.append(name)
                continue
            made = [target]
            if pattern is not None:
                # A converter that splits a tensor is found under the first of its targets.
                first, *others = targets[pattern]
                made += [target.replace(first, other) for other in others]
            for own in made:
                self._sources[own].append((name, pattern))
                if pattern is not None:
                    self._converted[own] = target
            if target in parameters:
                self._weights.add(name)

    def _find_shared(self) -> dict[str, str]:
        """Parameters that are the same as another one, which has tensors in the checkpoint."""
        names: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names[id(parameter)].append(name)
        # Without weights, what transformers ties later is apart yet.
        tied = [[name, other] for name, other in self.model.all_tied_weights_keys.items()]
        shared: dict[str, str] = {}
        for same in [*names.values(), *tied]:
            stored = [name for name in same if name in self._sources]
            if stored:
                shared |= {name: stored[0] for name in same if name not in self._sources}
        return shared

    def _check_complete(self) -> None:
        optional = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or []
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            if self.names_of(name) or any(re.search(pattern, name) for pattern in optional):
                continue
            raise UsageError(f"{self.path}: has no tensor for {name}")

    def _usual_dtype(self) -> str:
        types = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        values: Counter[str] = Counter()
        for name in self.files.names():
            info = self.files.info(name)
            if info.dtype in types and name not in self.decoded_names():
                values[types[info.dtype]] += info.values
        return max(values, key=values.__getitem__, default="float32")

    def _check_fit(self) -> None:
        """Shapes, and types of parameters, as far as a tensor is a parameter as it stands."""
        for name, own in self._parameters_and_buffers(self.model):
            sources = self._sources.get(name, [])
            if len(sources) != 1 or sources[0][1] is not None:
                continue
            tensor, info = sources[0][0], self.files.info(sources[0][0])
            if info.shape != tuple(own.shape):
                raise UsageError(
                    f"{self.path}: {tensor}: expected {list(own.shape)} as its configuration says, "
                    f"got {list(info.shape)}"
                )
            if tensor in self._weights and not info.dtype.startswith(("F", "BF")):
                raise UsageError(
                    f"{self.path}: {tensor}: expected floating-point values, got {info.dtype}: "
                    "whole numbers are codes of a quantized model, whose configuration is lost"
                )


def moved(module: nn.Module, device: torch.device) -> nn.Module:
    """Moves what has values to a device; parameters without stay."""
    for own in module.modules():
        for values in (own._parameters, own._buffers):
            for name, value in values.items():
                if value is None or value.device.type == "meta":
                    continue
                there = value.detach().to(device)
                is_parameter = isinstance(value, nn.Parameter)
                values[name] = nn.Parameter(there, False) if is_parameter else there
    return module


def model_class(config: Any) -> Any:
    """The class of transformers that a configuration names, or that generates text with it."""
    import transformers

    for name in config.architectures or []:
        kind = getattr(transformers, name, None)
        if kind is not None:
            return kind
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM._model_mapping[type(config)]
    raise UsageError(
        f"{config.model_type}: transformers has no model class for it "
        f"(architectures: {config.architectures})"
    )


def _check_kind(config: Any, kind: Any) -> None:
    """Refuses what token ids alone do not run."""
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"{kind.__name__} is an encoder-decoder: expected a model that is one stack of blocks "
            "reading token ids (a decoder or an encoder)"
        )
    if getattr(kind, "main_input_name", "input_ids") != "input_ids":
        raise UsageError(
            f"{kind.__name__} reads {kind.main_input_name}: expected a model that reads token ids"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: expected a configuration in JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


@contextmanager
def quiet_bars() -> Iterator[None]:
    """transformers shows a bar for every piece it loads."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
