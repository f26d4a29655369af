"""A float model on disk, brought into memory piece by piece."""

from __future__ import annotations

import copy
import hashlib
from collections import defaultdict
from collections.abc import Callable
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

from certiq.model.checkpoint_files import GgufFiles, TensorFiles, open_folder
from certiq.model.errors import UsageError
from certiq.torch.finite import not_finite


class ModelSource:
    """A checkpoint folder of transformers, or a GGUF file.

    `model` has its parameters on the meta device; `load` fills those that are asked for. Old names
    and fused tensors are converted by transformers' own rules; `names_of` tells what the checkpoint
    calls a parameter of the model.
    """

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder")
        self.path = path
        self.is_gguf = path.is_file()
        if self.is_gguf and path.suffix.lower() != ".gguf":
            raise UsageError(f"{path}: expected a folder or a .gguf file")
        folder = path.parent if self.is_gguf else path
        arguments = {"gguf_file": path.name} if self.is_gguf else {}
        self._arguments = (str(folder), arguments)
        self.config = AutoConfig.from_pretrained(str(folder), **arguments)
        if getattr(self.config, "quantization_config", None) is not None:
            raise UsageError(f"{path}: is quantized already")
        # This is the checkpoint's type; building the model sets it to `dtype`.
        own = str(getattr(self.config, "dtype", None) or "float32").removeprefix("torch.")
        self.stored_dtype = own
        self.dtype = dtype
        self.device = device
        with init_empty_weights(include_buffers=False):
            self.model = _model_class(self.config)._from_config(self.config, dtype=dtype)
        self.model.eval().requires_grad_(False)
        self.files: TensorFiles = GgufFiles(path, self.model) if self.is_gguf else open_folder(path)
        self._mapping = get_model_conversion_mapping(self.model)
        # Each parameter of the model has the tensors it is made of, and their converter's pattern.
        self._sources: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
        self.unused: list[str] = []
        # Tensors of the checkpoint that are parameters; a buffer may be infinite, as a mask is.
        self._weights: set[str] = set()
        self._map_names()

    def tokenizer(self) -> Any:
        folder, arguments = self._arguments
        return AutoTokenizer.from_pretrained(folder, **arguments)

    def load(self, wanted: Callable[[str], bool], where: str = "") -> None:
        """Reads the parameters (and persistent buffers) whose names are wanted.

        UsageError where a parameter is not finite: its name, the place in it, and `where`.
        """
        names = [
            name
            for target, sources in self._sources.items()
            if wanted(target)
            for name, _ in sources
        ]
        config = LoadStateDictConfig(
            dtype=self.dtype,
            device_map={"": self.device},
            weight_mapping=copy.deepcopy(self._mapping),
        )
        tensors = {name: self.files.read(name) for name in names}
        for name, tensor in tensors.items():
            bad = not_finite(tensor) if name in self._weights else None
            if bad is not None:
                raise UsageError(
                    f"{self.path}: {name}{where} is {bad}: expected finite values in float32"
                )
        with _quiet_bars():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, config, None)
        if info.mismatched_keys or info.conversion_errors or info.error_msgs:
            raise UsageError(
                f"{self.path}: does not fit {type(self.model).__name__}: "
                f"{[*info.mismatched_keys, *info.conversion_errors, *info.error_msgs]}"
            )

    def load_shell(self, stack: str) -> None:
        """Everything but the blocks of the stack, tied and moved to the device."""
        outside = f" (beside {stack}.*, which would read it or be read by it)"
        self.load(lambda name: not name.startswith(f"{stack}."), outside)
        self.model.tie_weights()
        for name, parameter in self.model.named_parameters():
            if parameter.device.type == "meta" and not name.startswith(f"{stack}."):
                raise UsageError(f"{self.path}: has no tensor for {name}")
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)

    def load_block(self, prefix: str, block: nn.Module) -> None:
        self.load(lambda name: name.startswith(f"{prefix}."))
        missing = [name for name, value in block.named_parameters() if value.device.type == "meta"]
        if missing:
            raise UsageError(f"{self.path}: has no tensor for {prefix}.{missing[0]}")
        block.requires_grad_(False)

    def names_of(self, parameter: str) -> list[tuple[str, str | None]]:
        """A parameter's names in the checkpoint: one, or several that a converter (whose
        source pattern stands beside each) fuses."""
        return self._sources.get(parameter, [])

    def identity(self) -> str:
        """A digest of the files' names, sizes and times: whether it is the same model as before."""
        digest = hashlib.sha256()
        for file in self.files.files():
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _map_names(self) -> None:
        renamings = [item for item in self._mapping if isinstance(item, WeightRenaming)]
        converters = [item for item in self._mapping if isinstance(item, WeightConverter)]
        state = self.model.state_dict()
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        prefix = self.model.base_model_prefix
        for name in sorted(self.files.names(), key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state:
                target, pattern = rename_source_key(name, [], [], prefix, state)
            if target in state:
                self._sources[target].append((name, pattern))
                if target in parameters:
                    self._weights.add(name)
            else:
                self.unused.append(name)


def _model_class(config: Any) -> Any:
    import transformers

    for name in config.architectures or []:
        kind = getattr(transformers, name, None)
        if kind is not None:
            return kind
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM._model_mapping[type(config)]
    raise UsageError(f"{config.model_type}: transformers has no model class for it")


class _quiet_bars:  # noqa: N801 - reads as a word of the language
    """transformers shows a bar for every piece it loads."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._on = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        from transformers.utils import logging

        if self._on:
            logging.enable_progress_bar()
