"""The order in which the linears of a block are quantized.

Linears that do not depend on each other form a level: q, k and v; o; gate and up; down. Of
experts, the first projections of all of them are one level and the last ones the next.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from certiq.torch.taps import InputGroup

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Level:
    """Linears by their names within the block."""

    linears: tuple[str, ...]
    # One stands for many (experts), which may be called in any order.
    repeated: bool


def pattern_of(name: str) -> str:
    """`experts.7.up_proj` and `experts.0.up_proj` are alike."""
    return _INDEX.sub("*", name)


def is_expert(name: str) -> bool:
    return re.search(r"(^|\.)experts\.\d+\.", name) is not None


def levels_of(
    linears: Sequence[str], groups: Mapping[str, InputGroup], *, sequential: bool
) -> list[Level]:
    """`groups` are in the order in which one pass called them. Linears that the pass did not reach
    join those they are like, or come last."""
    if not sequential:
        return [Level(tuple(linears), repeated=True)]
    patterns: list[tuple[set[str], bool]] = []
    for group in groups.values():
        own = {pattern_of(name) for name in group.members}
        if any(own & known for known, _ in patterns):
            continue
        patterns.append((own, any("*" in pattern for pattern in own)))
    levels = [Level(_matching(linears, known), repeated) for known, repeated in patterns]
    placed = {name for level in levels for name in level.linears}
    rest = tuple(name for name in linears if name not in placed)
    return levels + ([Level(rest, repeated=True)] if rest else [])


def _matching(linears: Iterable[str], patterns: set[str]) -> tuple[str, ...]:
    return tuple(name for name in linears if pattern_of(name) in patterns)
