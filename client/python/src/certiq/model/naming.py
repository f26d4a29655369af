"""The linears of a model, and where the checkpoint keeps their weights."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from certiq.model.source import ModelSource
from certiq.torch.experts import ExpertMatrix, take_experts_apart
from certiq.torch.linears import features_of, find_linears, is_conv1d, is_linear, rows_of


@dataclass(frozen=True)
class StoredLinear:
    """A linear of the model, its fused experts taken apart, and its weight in the checkpoint."""

    name: str
    """In the model: "model.layers.0.mlp.experts.3.gate_proj"."""
    prefix: str
    """In the checkpoint, before ".weight": "model.layers.0.block_sparse_moe.experts.3.w1"."""
    rows: int
    features: int
    tensor: str | None = None
    """The checkpoint's tensor that holds the weight, alone or with others."""
    matrix: ExpertMatrix | None = None
    """Of an expert: its place in the model's parameter of all of them."""
    parameter: str = ""
    """That parameter's name in the model."""
    fused: str = ""
    """The class of the module that has it."""
    together: bool = False
    """True: the checkpoint has all experts in one tensor, too."""
    transposed: bool = False
    """True: the tensor has [features, rows] (Conv1D)."""
    embedding: bool = False
    """True: a table that is looked up."""
    tied: bool = False
    """True: another module reads the same weight."""
    float_because: str | None = None
    """Why it cannot be quantized; None where it can."""

    @property
    def weights(self) -> int:
        return self.rows * self.features


def stored_linears(
    source: ModelSource, stack: str, blocks: Sequence[nn.Module]
) -> dict[str, StoredLinear]:
    """The linears of these blocks by their names in the model, in its order."""
    found: dict[str, StoredLinear] = {}
    for index, block in enumerate(blocks):
        prefix = f"{stack}.{index}"
        skeleton = copy.deepcopy(block)
        apart = take_experts_apart(skeleton)
        of_experts = {
            f"{fused}.{name}": (fused, matrix)
            for fused, module in apart.items()
            for name, matrix in module.matrices.items()
        }
        kinds = {fused: type(block.get_submodule(fused)).__name__ for fused in apart}
        for name, module in find_linears(skeleton).items():
            own = f"{prefix}.{name}"
            shape = (rows_of(module), features_of(module))
            if name in of_experts:
                fused, matrix = of_experts[name]
                parameter = f"{prefix}.{fused}.{matrix.parameter}"
                found[own] = _expert(source, own, parameter, matrix, shape, kinds[fused])
            else:
                found[own] = _plain(source, own, shape, is_conv1d(module))
    return found


def outside_modules(source: ModelSource, stack: str) -> dict[str, StoredLinear]:
    """Linears and embeddings outside the stack of blocks: a head, for example."""
    found: dict[str, StoredLinear] = {}
    for name, module in source.model.named_modules():
        if name.startswith(f"{stack}.") or name == stack:
            continue
        if is_linear(module):
            own = _plain(source, name, (rows_of(module), features_of(module)), is_conv1d(module))
        elif isinstance(module, nn.Embedding):
            own = _plain(source, name, tuple(module.weight.shape), False)
            own = dataclasses.replace(own, embedding=True)
        else:
            continue
        if own.float_because is not None and own.tensor is not None:
            # A head that shares its weight with the embedding gets one of its own.
            own = dataclasses.replace(own, float_because=None, tied=True)
        found[name] = own
    return found


def _plain(
    source: ModelSource, name: str, shape: tuple[int, int], transposed: bool
) -> StoredLinear:
    parameter = f"{name}.weight"
    sources = source.names_of(parameter)
    if len(sources) == 1 and sources[0][1] is None and sources[0][0].endswith(".weight"):
        tensor = sources[0][0]
        other = source.shared.get(parameter)
        return StoredLinear(
            name,
            tensor.removesuffix(".weight") if other is None else name,
            *shape,
            tensor=tensor,
            transposed=transposed,
            float_because=_sharing(source, parameter),
        )
    made_of = ", ".join(own for own, _ in sources) or "none"
    return StoredLinear(
        name,
        name,
        *shape,
        transposed=transposed,
        float_because=f"its weight is not one tensor of the checkpoint (but {made_of})",
    )


def _sharing(source: ModelSource, parameter: str) -> str | None:
    other = source.shared.get(parameter)
    if other is not None:
        return f"it shares its weight with {other.removesuffix('.weight')}"
    sharing = [name for name, first in source.shared.items() if first == parameter]
    if sharing:
        return f"{sharing[0].removesuffix('.weight')} shares its weight"
    return None


def _expert(
    source: ModelSource,
    name: str,
    parameter: str,
    matrix: ExpertMatrix,
    shape: tuple[int, int],
    fused: str,
) -> StoredLinear:
    """Checkpoints have a matrix for each expert and projection, or all of them in one tensor."""
    sources = source.names_of(parameter)
    place: dict[str, Any] = {"matrix": matrix, "parameter": parameter, "fused": fused}
    if len(sources) == 1 and sources[0][1] is None:
        # Loaders that take packed experts know them by these names.
        return StoredLinear(name, name, *shape, tensor=sources[0][0], together=True, **place)
    # Names are sorted by expert; a converter's first source pattern is gate, its second up.
    patterns = list(dict.fromkeys(pattern for _, pattern in sources))
    part = 1 if matrix.part in ("second_half", "odd") else 0
    if part < len(patterns):
        of_pattern = [tensor for tensor, own in sources if own == patterns[part]]
        if matrix.expert < len(of_pattern) and of_pattern[matrix.expert].endswith(".weight"):
            tensor = of_pattern[matrix.expert]
            return StoredLinear(
                name, tensor.removesuffix(".weight"), *shape, tensor=tensor, **place
            )
    return StoredLinear(
        name,
        name,
        *shape,
        float_because=f"the checkpoint's tensors for {parameter} are in a layout that is not known",
    )
