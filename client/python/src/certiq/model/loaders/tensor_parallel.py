"""How many devices can hold a part of each linear."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from certiq.model.loaders.checkpoint import Checkpoint, in_block

# Split along their inputs, so that groups of columns must not be cut.
ROW_PARALLEL = frozenset("o_proj down_proj out_proj fc2 w2 wo c_proj dense_4h_to_h".split())
# Split along their outputs, as attention heads or units of the MLP are.
COLUMN_PARALLEL = frozenset(
    "q_proj gate_proj up_proj gate_up_proj qkv_proj query_key_value c_attn c_fc fc1 w1 w3 "
    "dense_h_to_4h q_b_proj kv_b_proj".split()
)
# Split by heads, or repeated where there are fewer heads than devices.
KEY_VALUE = frozenset({"k_proj", "v_proj"})


def largest_tensor_parallel(folder: Path) -> int:
    """The largest number of devices over which vLLM can split every packed linear: no group and no
    packed word is cut. Linears of other names than those above are taken to be repeated."""
    return largest_of(Checkpoint(folder))


def largest_of(checkpoint: Checkpoint) -> int:
    heads = _count(checkpoint, "num_attention_heads", "n_head")
    parts = list(_parts(checkpoint))
    bound = min([part.size for part in parts] + ([heads] if heads else []), default=1)
    fitting = [
        degree
        for degree in range(2, bound + 1)
        if _heads_divide(checkpoint, degree) and all(part.fits(degree) for part in parts)
    ]
    return max(fitting, default=1)


@dataclass(frozen=True)
class _Part:
    """A side of a linear that is divided."""

    size: int
    unit: int
    """What each piece is to be a multiple of."""
    most: int | None = None
    """More devices than that repeat the pieces."""

    def fits(self, degree: int) -> bool:
        pieces = degree if self.most is None else min(degree, self.most)
        return self.size % pieces == 0 and self.size // pieces % self.unit == 0


def _parts(checkpoint: Checkpoint) -> Iterator[_Part]:
    for module in checkpoint.modules.values():
        scheme, rows, features = module.scheme, module.rows, module.features
        last = module.name.rpartition(".")[2]
        if scheme is None or rows is None or features is None or not in_block(module.name):
            continue
        # The fewest codes that fill whole words of 32 bits.
        word = 32 // math.gcd(32, scheme.bits)
        # Zero points are packed along the rows.
        across = word if checkpoint.gptq is not None or not scheme.symmetric else 1
        if last in ROW_PARALLEL:
            # The columns of a group that follows another order are everywhere.
            group = features if module.name in checkpoint.reordered else scheme.group_size
            yield _Part(features, math.lcm(word, group or 1))
        elif last in COLUMN_PARALLEL:
            yield _Part(rows, across)
        elif last in KEY_VALUE:
            yield _Part(rows, across, _key_value_heads(checkpoint))


def _heads_divide(checkpoint: Checkpoint, degree: int) -> bool:
    heads = _count(checkpoint, "num_attention_heads", "n_head")
    own = _key_value_heads(checkpoint)
    return (heads is None or heads % degree == 0) and (
        own is None or own % degree == 0 or degree % own == 0
    )


def _key_value_heads(checkpoint: Checkpoint) -> int | None:
    return _count(checkpoint, "num_key_value_heads", "num_attention_heads", "n_head")


def _count(checkpoint: Checkpoint, *keys: str) -> int | None:
    text = checkpoint.text_config
    return next((text[key] for key in keys if isinstance(text.get(key), int) and text[key]), None)
