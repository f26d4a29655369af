"""Experts that transformers keeps as one tensor, taken apart into linears.

transformers 5 holds all experts of a layer in two parameters, gate_up_proj [E, 2 I, H] and
down_proj [E, H, I], though checkpoints have a matrix for each. Quantization needs the matrices:
what each one reads differs, for an expert sees only the tokens that are routed to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Expert(nn.Module):
    """One gated expert: down(act(gate x) * up x)."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, activation: Any) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2, dim=0)
        self.gate_proj = _linear(gate)
        self.up_proj = _linear(up)
        self.down_proj = _linear(down)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Experts(nn.ModuleList):
    """Stands in for a module of fused experts; the same arguments, the same result."""

    def __init__(self, fused: nn.Module) -> None:
        gate_up, down = fused.gate_up_proj.detach(), fused.down_proj.detach()  # type: ignore[operator, union-attr]
        super().__init__(
            Expert(gate_up[index], down[index], fused.act_fn) for index in range(gate_up.shape[0])
        )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        result = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            token, position = torch.where(top_k_index == index)
            if len(token) == 0:
                continue
            weight = top_k_weights[token, position, None]
            value = expert(hidden_states[token]) * weight
            result.index_add_(0, token, value.to(result.dtype))
        return result


def is_fused_experts(module: nn.Module) -> bool:
    """Gated experts without biases in transformers' usual layout; others are left alone."""
    gate_up = getattr(module, "gate_up_proj", None)
    down = getattr(module, "down_proj", None)
    if not isinstance(gate_up, nn.Parameter) or not isinstance(down, nn.Parameter):
        return False
    names = {name for name, _ in module.named_parameters(recurse=False)}
    return (
        names == {"gate_up_proj", "down_proj"}
        and gate_up.dim() == down.dim() == 3
        and gate_up.shape[0] == down.shape[0]
        and gate_up.shape[1] == 2 * down.shape[2]
        and gate_up.shape[2] == down.shape[1]
        and callable(getattr(module, "act_fn", None))
        and not getattr(module, "is_transposed", False)
    )


def take_experts_apart(block: nn.Module) -> list[str]:
    """Replaces the fused experts below a module; their names."""
    found = [name for name, module in block.named_modules() if is_fused_experts(module)]
    for name in found:
        parent, _, last = name.rpartition(".")
        setattr(block.get_submodule(parent), last, Experts(block.get_submodule(name)))
    return found


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return linear
