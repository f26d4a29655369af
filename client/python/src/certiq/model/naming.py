"""The linears of a model, and where the checkpoint keeps their weights."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from certiq.model.levels import pattern_of
from certiq.model.source import ModelSource
from certiq.torch.experts import ExpertMatrix, take_experts_apart
from certiq.torch.linears import (
    features_of,
    find_linears,
    is_conv1d,
    is_linear,
    returns_outputs,
    rows_of,
)


@dataclass(frozen=True, eq=False)
class Within:
    """Where a weight [R, N] lies in a stored tensor, whose values are counted through in its order:
    [r, n] is at starts[r] + steps[n]. Rows of a fused tensor are so, every second one of them, what
    is transposed, and experts."""

    starts: torch.Tensor
    steps: torch.Tensor

    @classmethod
    def of(cls, places: torch.Tensor) -> Within | None:
        """From each value's place; None where rows and columns are not apart."""
        found = cls(places[:, 0].clone(), places[0] - places[0, 0])
        return found if torch.equal(found._places(), places) else None

    def put(self, tensor: torch.Tensor, weight: torch.Tensor) -> None:
        """Writes W [R, N] where it belongs; the tensor must be contiguous."""
        tensor.view(-1)[self._places()] = weight

    def _places(self) -> torch.Tensor:
        return self.starts[:, None] + self.steps


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
    within: Within | None = None
    """Where in the tensor, which a converter of transformers makes several parameters of, or one
    in another order."""
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
    locator = _Locator(source)
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
                found[own] = _expert(locator, own, parameter, matrix, shape, kinds[fused])
            else:
                found[own] = _plain(source, own, shape, is_conv1d(module), locator)
                if not returns_outputs(module):
                    found[own] = dataclasses.replace(
                        found[own],
                        float_because=f"{type(module).__name__} returns more than a linear does",
                    )
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


class _Locator:
    """Finds weights in tensors that converters take apart or put together.

    Blocks that are alike are so in this, too: the first of them tells.
    """

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self._latest: tuple[str, tuple[list[str], torch.Tensor] | None] = ("", None)
        self._known: dict[Any, tuple[int, Within] | None] = {}

    def find(self, parameter: str, matrix: ExpertMatrix | None) -> tuple[str, Within] | None:
        """The tensor that has the weight, and where; None where no single one has it."""
        names = [name for name, _ in self.source.names_of(parameter)]
        shapes = tuple(self.source.files.info(name).shape for name in names)
        kind = (pattern_of(parameter), shapes, matrix)
        if kind not in self._known:
            self._known[kind] = self._find(parameter, matrix)
        found = self._known[kind]
        return None if found is None else (names[found[0]], found[1])

    def _find(self, parameter: str, matrix: ExpertMatrix | None) -> tuple[int, Within] | None:
        if self._latest[0] != parameter:
            self._latest = (parameter, self.source.places_of(parameter))
        latest = self._latest[1]
        if latest is None:
            return None
        names, places = latest
        if names != [name for name, _ in self.source.names_of(parameter)]:
            return None
        own = places if matrix is None else matrix.of(places)
        first = 0
        for number, name in enumerate(names):
            end = first + math.prod(self.source.files.info(name).shape)
            if first <= int(own.min()) and int(own.max()) < end:
                within = Within.of(own - first)
                return None if within is None else (number, within)
            first = end
        return None


def _plain(
    source: ModelSource,
    name: str,
    shape: tuple[int, int],
    transposed: bool,
    locator: _Locator | None = None,
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
    found = None if locator is None or transposed else locator.find(parameter, None)
    if found is not None:
        prefix = found[0].removesuffix(".weight")
        return StoredLinear(name, prefix, *shape, tensor=found[0], within=found[1])
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
    locator: _Locator,
    name: str,
    parameter: str,
    matrix: ExpertMatrix,
    shape: tuple[int, int],
    fused: str,
) -> StoredLinear:
    """Checkpoints have a matrix for each expert and projection, or all of them in one tensor."""
    source = locator.source
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
        tensor = of_pattern[matrix.expert] if matrix.expert < len(of_pattern) else ""
        if tensor.endswith(".weight") and source.files.info(tensor).shape == shape:
            return StoredLinear(
                name, tensor.removesuffix(".weight"), *shape, tensor=tensor, **place
            )
    found = locator.find(parameter, matrix)
    if found is not None:
        return StoredLinear(
            name, name, *shape, tensor=found[0], within=found[1], together=True, **place
        )
    return StoredLinear(
        name,
        name,
        *shape,
        float_because=f"the checkpoint's tensors for {parameter} are in a layout that is not known",
    )
