"""Names of a model's linears in its checkpoint, and the tensors there that they replace."""

from __future__ import annotations

import re
from dataclasses import dataclass

from certiq.model.errors import UsageError
from certiq.model.source import ModelSource

_EXPERT = re.compile(r"^(?P<fused>.+)\.(?P<index>\d+)\.(?P<projection>gate|up|down)_proj$")


@dataclass(frozen=True)
class LinearName:
    # It stands before ".weight", ".qweight" ... in the output.
    prefix: str
    # These tensors of the checkpoint hold the float weight, alone or with others.
    replaces: tuple[str, ...]


def linear_names(source: ModelSource, linears: list[str]) -> dict[str, LinearName]:
    """The name of each linear, by its name in the (taken apart) model."""
    return {name: _name_of(source, name) for name in linears}


def _name_of(source: ModelSource, linear: str) -> LinearName:
    found = source.names_of(f"{linear}.weight")
    if len(found) == 1 and found[0][1] is None:
        own = found[0][0]
        return LinearName(own.removesuffix(".weight"), (own,))
    match = _EXPERT.match(linear)
    if not found and match is not None:
        return _expert_name(source, match)
    raise UsageError(
        f"{linear}: its weight is not one tensor of the checkpoint "
        f"({', '.join(name for name, _ in found) or 'none'}); --ignore it"
    )


def _expert_name(source: ModelSource, match: re.Match[str]) -> LinearName:
    """Checkpoints have a matrix for each expert and projection, or all of them in one tensor."""
    fused, index, projection = match["fused"], int(match["index"]), match["projection"]
    parameter = f"{fused}.{'down_proj' if projection == 'down' else 'gate_up_proj'}"
    found = source.names_of(parameter)
    if not found:
        raise UsageError(f"{parameter}: the checkpoint has no tensors for it")
    if len(found) == 1 and found[0][1] is None:
        return LinearName(f"{fused}.{index}.{projection}_proj", (found[0][0],))
    # Names are sorted by expert; a converter's first source pattern is gate, its second up.
    patterns = list(dict.fromkeys(pattern for _, pattern in found))
    pattern = patterns[1 if projection == "up" else 0]
    of_pattern = [name for name, own in found if own == pattern]
    name = of_pattern[index]
    return LinearName(name.removesuffix(".weight"), (name,))
