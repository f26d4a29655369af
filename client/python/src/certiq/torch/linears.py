"""The linear layers of a model, their weights seen as the service sees them: [outputs, inputs]."""

from __future__ import annotations

import copy
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


def returns_outputs(module: nn.Module) -> bool:
    """False for a linear that returns something else than its outputs: a router that is a linear,
    and that also chooses (Phi-3.5-MoE's, Llama 4's). Readers of packed weights do not know it."""
    if is_conv1d(module) or type(module).forward is nn.Linear.forward:
        return True
    weight = _parameter(module)
    bare = copy.deepcopy(module).to("meta")
    x = torch.empty(1, 1, features_of(module), dtype=weight.dtype, device="meta")
    try:
        with torch.no_grad():
            outputs = bare(x)
    except Exception:  # Whatever it expects, it is not what a linear reads.
        return False
    return isinstance(outputs, torch.Tensor) and outputs.shape == (1, 1, rows_of(module))


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
