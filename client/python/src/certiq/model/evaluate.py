"""Perplexity of a model on text, block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from certiq.model.blocks import BlockStack


@torch.no_grad()
def perplexity(
    stack: BlockStack, ids: Sequence[torch.Tensor], hidden: Sequence[torch.Tensor]
) -> float:
    """exp of the mean negative log likelihood of each window's tokens but the first.

    `ids` are batches [windows, positions], `hidden` what the last block returned for them.
    """
    total, count = 0.0, 0
    for tokens, states in zip(ids, hidden, strict=True):
        # Logits are large, so there is one window at a time.
        for index in range(tokens.shape[0]):
            window = tokens[index : index + 1]
            logits = stack.finish(window, states[index : index + 1]).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(
                logits, window[0, 1:], reduction="sum"
            ).item()
            count += window.shape[1] - 1
    # Beyond a double's range a model is as bad as any.
    return math.exp(total / count) if total / count < 700 else math.inf
