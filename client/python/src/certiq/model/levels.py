"""The order in which the linears of a block are quantized.

Linears that read the same tensor form a group: q, k and v; gate and up. Groups are quantized in the
order in which a forward reads them. Fused experts that were taken apart announce what all of them
read before one computes, so the first projections of all of them are one level, and their last ones
the next. Where experts are modules of their own, each of their groups is a level.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from certiq.torch.experts import TakenApart

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Group:
    """Linears of a block that read the same tensor, named after the first."""

    name: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Level:
    """Groups that are quantized at a time."""

    groups: tuple[Group, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(member for group in self.groups for member in group.members)


def joined(block: str, name: str) -> str:
    """The name in the model of a linear of a block; those outside have no block."""
    return f"{block}.{name}" if block else name


def pattern_of(name: str) -> str:
    """`experts.7.up_proj` and `experts.0.up_proj` are alike."""
    return _INDEX.sub("*", name)


def is_expert(name: str) -> bool:
    """True for a linear that sees only the tokens that are routed to it."""
    return re.search(r"(^|\.)experts\.\d+(\.|$)", name) is not None


def levels_of(
    linears: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    apart: Mapping[str, TakenApart],
    *,
    sequential: bool,
) -> list[Level]:
    """`groups` are what a short forward found, in its order; linears that it did not reach are
    grouped and placed as those they are like, or come last. Not `sequential`: one level of all."""
    found = _completed(linears, [Group(name, tuple(own)) for name, own in groups.items()])
    if not sequential:
        return [Level(tuple(found))]
    levels: list[list[Group]] = []
    of_phase: dict[str, list[Group]] = {}
    for group in found:
        phase = _phase(group.name, apart)
        if phase in of_phase:
            of_phase[phase].append(group)
            continue
        levels.append([group])
        if phase is not None:
            of_phase[phase] = levels[-1]
    return [Level(tuple(level)) for level in levels]


def _phase(name: str, apart: Mapping[str, TakenApart]) -> str | None:
    """What the linear has in common with those of the other experts that were fused with it."""
    for fused, module in apart.items():
        own = name.removeprefix(f"{fused}.")
        if own != name and own in module.matrices:
            last = own.rpartition(".")[2] == "down_proj"
            return f"{fused} {'down' if last else 'first'}"
    return None


def _completed(linears: Sequence[str], found: list[Group]) -> list[Group]:
    placed = {member for group in found for member in group.members}
    rest = [name for name in linears if name not in placed]
    while rest:
        name = rest[0]
        alike = [group for group in found if pattern_of(group.name) == pattern_of(name)]
        patterns = {pattern_of(member) for member in alike[0].members} if alike else set()
        stem = _stem(name)
        members = tuple(
            other for other in rest if pattern_of(other) in patterns and _stem(other) == stem
        ) or (name,)
        group = Group(members[0], members)
        # Experts are called by their numbers.
        before = [other for other in alike if _numbers(other.name) < _numbers(name)]
        if before:
            found.insert(found.index(before[-1]) + 1, group)
        elif alike:
            found.insert(found.index(alike[0]), group)
        else:
            found.append(group)
        rest = [other for other in rest if other not in members]
    return found


def _stem(name: str) -> str:
    """Up to its last number: `experts.7`."""
    numbers = list(_INDEX.finditer(name))
    return name[: numbers[-1].end()] if numbers else ""


def _numbers(name: str) -> list[int]:
    return [int(match[0]) for match in _INDEX.finditer(name)]
