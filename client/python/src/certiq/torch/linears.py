"""The linear layers of a model, their weights seen as the service sees them: [outputs, inputs]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Selection = Callable[[str, nn.Module], bool]


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, or transformers' Conv1D (GPT-2), which keeps its weight as [inputs, outputs]."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    # The name is enough: a model that has one has imported transformers, others need not.
    return any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
        for kind in type(module).__mro__
    )


def features_of(module: nn.Module) -> int:
    """N, the inputs of a linear."""
    weight = _parameter(module)
    return int(weight.shape[0] if is_conv1d(module) else weight.shape[1])


def rows_of(module: nn.Module) -> int:
    """R, the outputs of a linear."""
    weight = _parameter(module)
    return int(weight.shape[1] if is_conv1d(module) else weight.shape[0])


def weight_of(module: nn.Module) -> torch.Tensor:
    """W [R, N], detached; a view where the module keeps it that way."""
    weight = _parameter(module).detach()
    return weight.t() if is_conv1d(module) else weight


def set_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Writes W [R, N] into the module, in its own dtype and on its own device."""
    own = _parameter(module)
    value = weight.t() if is_conv1d(module) else weight
    if value.shape != own.shape:
        raise ValueError(f"weight: expected {tuple(own.shape)}, got {tuple(value.shape)}")
    with torch.no_grad():
        own.copy_(value)


def find_linears(model: nn.Module, select: Selection | None = None) -> dict[str, nn.Module]:
    """The linears below a module by their names, in the model's order, each module once."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and (select is None or select(name, module))
    }


def _parameter(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        raise TypeError(f"{type(module).__name__} has no two-dimensional weight")
    return weight
