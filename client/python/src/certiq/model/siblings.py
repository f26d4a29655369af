"""Linears that loaders fuse into one, and so must be quantized alike.

The names are vLLM's `packed_modules_mapping`s (vllm/model_executor/models: llama.py, mixtral.py,
bert.py, lfm2.py, deepseek_v2.py with q_lora_rank, deepseek_v4.py, qwen3_5.py). A layer's experts
are one FusedMoE, of whose projections compressed_tensors_moe.py there asks one scheme. Qwen3-Next
stores in_proj_qkvz and in_proj_ba as they are, so it has nothing to fuse there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from certiq.spec import Spec

# Last components of names that have the rest in common, by that of the fused linear.
_FUSED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("qkv_proj", ("query", "key", "value")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("w13", ("w1", "w3")),
    ("fused_wqa_wkv", ("wq_a", "wkv")),
    ("fused_wkv_wgate", ("wkv", "wgate")),
    ("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    ("in_proj_ba", ("in_proj_b", "in_proj_a")),
)
# DeepSeek's shared_experts are an ordinary MLP.
_EXPERTS = re.compile(r"(?P<set>(?:.+\.)?experts)\.(?P<own>.+)")
# So many names of a set with one scheme are written out.
_NAMED = 3


@dataclass(frozen=True)
class Scheme:
    """What of a spec the loaders' layers are made by."""

    bits: int
    symmetric: bool
    # 0: one scale a row.
    group_size: int

    @classmethod
    def of(cls, spec: Spec) -> Scheme:
        """With the server's defaults for what the spec leaves to them."""
        return cls(spec.bits or 4, spec.symmetric is not False, spec.group_size or 0)

    def __str__(self) -> str:
        groups = f"groups of {self.group_size}" if self.group_size else "a scale a row"
        return f"{self.bits} bits, {'symmetric' if self.symmetric else 'asymmetric'}, {groups}"


@dataclass(frozen=True)
class FusedSet:
    # The name that the one linear has in a loader, which need not be in the checkpoint.
    fused: str
    members: tuple[str, ...]


def experts_of(name: str) -> str | None:
    """The set of experts that a module belongs to: ...mlp.experts of ...mlp.experts.3.up_proj."""
    match = _EXPERTS.fullmatch(name)
    return match["set"] if match else None


def fused_sets(names: Iterable[str]) -> list[FusedSet]:
    """Sets of two members and more among `names`, members and sets in the order of names."""
    sets: dict[str, list[str]] = {}
    for name in names:
        experts = experts_of(name)
        for fused in _fused_names(name) if experts is None else [experts]:
            sets.setdefault(fused, []).append(name)
    return [FusedSet(fused, tuple(own)) for fused, own in sets.items() if len(own) > 1]


def _fused_names(name: str) -> list[str]:
    """DeepSeek-V4's wkv is fused with wq_a in one module, with wgate in another."""
    parent, dot, own = name.rpartition(".")
    return [f"{parent}{dot}{fused}" for fused, members in _FUSED if own in members]


def disagreements(names: Iterable[str], spec_of: Callable[[str], Spec | None]) -> list[str]:
    """A sentence for each set whose members differ in what a loader needs to be one."""
    return [
        f"loaders such as vLLM make {fused.fused} one layer, but its members differ: {differ}"
        for fused in fused_sets(names)
        if (differ := _differences(fused, spec_of))
    ]


def _differences(fused: FusedSet, spec_of: Callable[[str], Spec | None]) -> str:
    specs = {name: spec_of(name) for name in fused.members}
    formats = {spec.format for spec in specs.values() if spec is not None}
    kinds: dict[str, list[str]] = {}
    for name, spec in specs.items():
        kind = _described(spec)
        if spec is not None and len(formats) > 1:
            kind += f", {spec.format}"
        kinds.setdefault(kind, []).append(name)
    if len(kinds) == 1:
        return ""
    experts = experts_of(fused.members[0])
    parent = f"{fused.fused.rpartition('.')[0] if experts is None else experts}."
    return "; ".join(f"{_listed(own, parent)} ({kind})" for kind, own in kinds.items())


def _described(spec: Spec | None) -> str:
    if spec is None:
        return "float"
    # A fused linear has one order of its columns (GPTQ's g_idx).
    order = ", groups in the order of work" if _reorders_groups(spec) else ""
    return f"{Scheme.of(spec)}{order}"


def _reorders_groups(spec: Spec) -> bool:
    order = spec.order or ("decreasing_norm" if spec.quality else None)
    dynamic = spec.group_scales == "dynamic"
    return bool(spec.group_size) and dynamic and order == "decreasing_norm"


def _listed(names: list[str], parent: str) -> str:
    own = [name.removeprefix(parent) for name in names]
    if len(own) <= _NAMED + 1:
        return ", ".join(own)
    return f"{', '.join(own[:_NAMED])} and {len(own) - _NAMED} more"
