"""Experts that a model keeps as one tensor, taken apart into linears.

transformers 5 holds all experts of a layer in two parameters, whether their checkpoint has a matrix
for each or not. Quantization needs the matrices: what each one reads differs, for an expert sees
only the tokens that are routed to it. What stands in for the fused module computes the same.

The layouts are those that transformers' `use_experts_implementation` describes (transposed or not,
gate and up behind each other or interleaved, with biases or not, without a gate), Llama 4's, whose
tokens come sorted by expert, DBRX's, which lie one below another, LongCat Flash's, some of which
return what they read, and lists of matrices that are applied to parts of a tensor
(`...ParallelExperts`, as JetMoE has them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Part = Literal["whole", "first_half", "second_half", "even", "odd"]
# It is told which linears are about to read what, before the first of them does.
Announce = Callable[[Sequence[tuple[nn.Module, torch.Tensor]]], None]


@dataclass(frozen=True)
class ExpertMatrix:
    """Where the matrix W [R, N] of one expert lies in a parameter of all of them."""

    parameter: str
    """Its name within the fused module, "gate_up_proj" for example."""
    expert: int
    part: Part
    """Which rows of the expert's matrix are W, where two linears share it."""
    transposed: bool
    """True: the parameter has [experts, N, R]."""
    stacked_rows: int = 0
    """Where the parameter has two dimensions, the experts' matrices one below another: the rows of
    each there."""

    def of(self, fused: torch.Tensor) -> torch.Tensor:
        """W as a view of the parameter."""
        rows = self.stacked_rows
        matrix = fused[self.expert * rows :][:rows] if rows else fused[self.expert]
        if self.transposed:
            matrix = matrix.t()
        return _rows(matrix, self.part)

    def put(self, fused: torch.Tensor, weight: torch.Tensor) -> None:
        """Writes W [R, N] where it belongs."""
        self.of(fused).copy_(weight)


def _rows(matrix: torch.Tensor, part: Part) -> torch.Tensor:
    half = matrix.shape[0] // 2
    if part == "first_half":
        return matrix[:half]
    if part == "second_half":
        return matrix[half:]
    if part == "even":
        return matrix[::2]
    if part == "odd":
        return matrix[1::2]
    return matrix


class TakenApart(nn.ModuleList):
    """Stands in for a module of fused experts: the same arguments, the same result."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__(experts)
        self.matrices: dict[str, ExpertMatrix] = {}
        """By the names of the linears below this module."""
        self.announce: Announce | None = None

    def _tell(self, readers: Sequence[tuple[nn.Module, torch.Tensor]]) -> None:
        if self.announce is not None:
            self.announce(readers)


class Expert(nn.Module):
    """The linears of one expert."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)

    def first(self) -> list[nn.Module]:
        """Those that read the expert's input."""
        return [linear for name, linear in self.named_children() if name != "down_proj"]


class Experts(TakenApart):
    """Experts of transformers' usual interface: (hidden states, chosen experts, their weights)."""

    def __init__(self, fused: nn.Module) -> None:
        layout = _layout(fused)
        super().__init__([])
        for index in range(fused.down_proj.shape[0]):  # type: ignore[union-attr,operator]
            linears: dict[str, nn.Linear] = {}
            for name, matrix in layout(index).items():
                self.matrices[f"{index}.{name}"] = matrix
                parameter = getattr(fused, matrix.parameter).detach()
                bias = getattr(fused, f"{matrix.parameter}_bias", None)
                linears[name] = _linear(
                    matrix.of(parameter),
                    None if bias is None else _rows(bias.detach()[index], matrix.part),
                )
            self.append(Expert(linears))
        self._interleaved = not getattr(fused, "is_concatenated", True)
        # The module stays for how it gates; a plain attribute would make it a child of this one.
        fused._parameters.clear()
        self.__dict__["_fused"] = fused

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        routed: list[tuple[Expert, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for index, expert in enumerate(self):
            token, position = torch.where(top_k_index == index)
            if len(token):
                routed.append((expert, token, position, hidden_states[token]))  # type: ignore[arg-type]
        # All experts read before one computes, so that they can be quantized together.
        self._tell([(linear, x) for expert, _, _, x in routed for linear in expert.first()])
        inner = [self._gated(expert, x) for expert, _, _, x in routed]
        self._tell(
            [(expert.down_proj, x) for (expert, *_), x in zip(routed, inner, strict=True)]  # type: ignore[misc]
        )
        result = torch.zeros_like(hidden_states)
        for (expert, token, position, _), x in zip(routed, inner, strict=True):
            value = expert.down_proj(x) * top_k_weights[token, position, None]  # type: ignore[operator]
            result.index_add_(0, token, value.to(result.dtype))
        return result

    def _gated(self, expert: Expert, x: torch.Tensor) -> torch.Tensor:
        outputs = [linear(x) for linear in expert.first()]
        fused = self.__dict__["_fused"]
        if len(outputs) == 1:
            return fused.act_fn(outputs[0])
        if not hasattr(fused, "_apply_gate"):
            gate, up = outputs
            return fused.act_fn(gate) * up
        if self._interleaved:
            return fused._apply_gate(torch.stack(outputs, dim=-1).flatten(-2))
        return fused._apply_gate(torch.cat(outputs, dim=-1))


class ExpertsAndIdentities(Experts):
    """LongCat Flash's: experts beyond those that have a down projection return what they read."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        result = super().forward(hidden_states, top_k_index, top_k_weights)
        token, position = torch.where(top_k_index >= len(self))
        value = hidden_states[token] * top_k_weights[token, position, None]
        return result.index_add_(0, token, value.to(result.dtype))


class StackedExperts(Experts):
    """DBRX's: w1, v1 and w2 [experts * F, N] of a module `mlp`; w2 is multiplied with from the
    right."""

    def __init__(self, fused: nn.Module) -> None:
        TakenApart.__init__(self, [])
        mlp: Any = fused.mlp
        size: int = mlp.ffn_hidden_size
        names = {"gate_proj": "w1", "up_proj": "v1", "down_proj": "w2"}
        for index in range(mlp.moe_num_experts):
            linears: dict[str, nn.Linear] = {}
            for name, parameter in names.items():
                matrix = ExpertMatrix(f"mlp.{parameter}", index, "whole", name == "down_proj", size)
                self.matrices[f"{index}.{name}"] = matrix
                linears[name] = _linear(matrix.of(getattr(mlp, parameter).detach()), None)
            self.append(Expert(linears))
        self.__dict__["_activation"] = mlp.activation_fn

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return super().forward(rows, top_k_index, top_k_weights).view(hidden_states.shape)

    def _gated(self, expert: Expert, x: torch.Tensor) -> torch.Tensor:
        gate, up = (linear(x) for linear in expert.first())
        return self.__dict__["_activation"](gate) * up  # type: ignore[no-any-return]


class SortedExperts(Experts):
    """Llama 4's: every expert gets all tokens, those of others as zeros."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        states = hidden_states.view(len(self), -1, hidden_states.shape[-1])
        result = torch.zeros_like(states)
        live = [states[index].any(dim=-1) for index in range(len(self))]
        routed = [
            (index, expert, states[index][live[index]])
            for index, expert in enumerate(self)
            if bool(live[index].any())
        ]
        self._tell([(linear, x) for _, expert, x in routed for linear in expert.first()])  # type: ignore[operator,union-attr]
        inner = [self._gated(expert, x) for _, expert, x in routed]  # type: ignore[arg-type]
        self._tell([(own[1].down_proj, x) for own, x in zip(routed, inner, strict=True)])  # type: ignore[misc]
        for (index, expert, _), x in zip(routed, inner, strict=True):
            result[index, live[index]] = expert.down_proj(x)  # type: ignore[operator]
        return result.view(-1, hidden_states.shape[-1])


class ParallelExperts(TakenApart):
    """A matrix for each part of a tensor: (inputs, sizes of the parts)."""

    def __init__(self, fused: nn.Module) -> None:
        weight = fused.weight.detach()  # type: ignore[operator,union-attr]
        matrices = [ExpertMatrix("weight", index, "whole", False) for index in range(len(weight))]
        super().__init__([_linear(matrix.of(weight), None) for matrix in matrices])
        self.matrices = {str(matrix.expert): matrix for matrix in matrices}

    def forward(self, inputs: torch.Tensor, expert_size: list[int]) -> torch.Tensor:
        parts = inputs.split(expert_size, dim=0)
        routed = [(linear, x) for linear, x in zip(self, parts, strict=True) if len(x)]
        self._tell(routed)
        outputs = [linear(x) for linear, x in routed]
        if not outputs:
            return inputs.new_zeros(0, self[0].out_features)  # type: ignore[arg-type]
        return torch.cat(outputs, dim=0)


def _kind(module: nn.Module) -> type[TakenApart] | None:
    """What stands in for a module, if it is one of fused experts that are known."""
    parameters = dict(module.named_parameters(recurse=False))
    name = type(module).__name__
    if name.endswith("ParallelExperts") and set(parameters) == {"weight"}:
        return ParallelExperts if parameters["weight"].dim() == 3 else None
    if name == "DbrxExperts":
        return StackedExperts
    first = "gate_up_proj" if "gate_up_proj" in parameters else "up_proj"
    if not {first, "down_proj"} <= set(parameters):
        return None
    if set(parameters) - {first, "down_proj", f"{first}_bias", "down_proj_bias"}:
        return None
    if parameters[first].dim() != 3 or parameters["down_proj"].dim() != 3:
        return None
    if name == "Llama4TextExperts":
        return SortedExperts
    if name == "LongcatFlashExperts":
        return ExpertsAndIdentities
    # transformers' decorator sets these.
    if not hasattr(module, "is_transposed") or getattr(module, "has_post_expert_norm", False):
        return None
    return Experts


def _layout(fused: nn.Module) -> Callable[[int], dict[str, ExpertMatrix]]:
    # Llama 4 has no decorator to say so.
    transposed = getattr(fused, "is_transposed", type(fused).__name__ == "Llama4TextExperts")
    has_gate = hasattr(fused, "gate_up_proj")
    interleaved = not getattr(fused, "is_concatenated", True)
    gate: Part = "even" if interleaved else "first_half"
    up: Part = "odd" if interleaved else "second_half"

    def matrices(expert: int) -> dict[str, ExpertMatrix]:
        if has_gate:
            first = {
                "gate_proj": ExpertMatrix("gate_up_proj", expert, gate, transposed),
                "up_proj": ExpertMatrix("gate_up_proj", expert, up, transposed),
            }
        else:
            first = {"up_proj": ExpertMatrix("up_proj", expert, "whole", transposed)}
        return first | {"down_proj": ExpertMatrix("down_proj", expert, "whole", transposed)}

    return matrices


def take_experts_apart(module: nn.Module) -> dict[str, TakenApart]:
    """Replaces the fused experts below a module by lists of linears; they by their names."""
    kinds = {name: _kind(child) for name, child in module.named_modules()}
    made: dict[str, TakenApart] = {}
    for name, kind in kinds.items():
        if kind is None or not name:
            continue
        parent, _, last = name.rpartition(".")
        fused: Any = module.get_submodule(name)
        made[name] = kind(fused)
        setattr(module.get_submodule(parent), last, made[name])
    return made


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return linear
