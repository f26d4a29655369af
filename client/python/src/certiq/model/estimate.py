"""What a run will take, roughly: counts of operations and bytes at a rate that is measured here."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import torch

from certiq.model.lockstep import BlockStack
from certiq.model.plan import Plan
from certiq.model.settings import RunSettings
from certiq.model.source import ModelSource

_SIZE = 768


@dataclass(frozen=True)
class Estimate:
    """Times are those of one process on this machine, the server's as if it ran here, too."""

    client_seconds: float
    server_seconds: float
    peak_bytes: int

    def __str__(self) -> str:
        return (
            f"roughly {self.client_seconds:,.0f} s here, {self.server_seconds:,.0f} s in a server "
            f"on a machine like this one, and {self.peak_bytes / 1e9:,.2g} GB of memory here"
        )


def estimate(settings: RunSettings, source: ModelSource, stack: BlockStack, plan: Plan) -> Estimate:
    """Products of matrices are counted, by far the most of a run; searches of scales, presets that
    sweep several times, attention and the network are not."""
    rate = _rate(source)
    tokens = settings.sequences * settings.sequence_length
    forwards = tokens * (2 if settings.mismatched else 1)
    if settings.evaluation is not None:
        forwards += settings.evaluation_tokens * (2 if settings.evaluate_float else 1)
    in_blocks = [sum(own.numel() for own in block.parameters()) for block in stack.blocks]
    client = 2 * forwards * sum(in_blocks) / rate
    # Linears that read the same tensor share its sums; who does is not known before the model runs.
    # X^T X is symmetric: half of its products are made.
    server = 0.0
    for planned in plan.quantized.values():
        rows, features = planned.linear.rows, planned.linear.features
        sums = tokens * features**2 * (3 if settings.mismatched else 1)
        server += sums / 2 + features**3 + 6 * rows * features**2
    return Estimate(client, server / rate, _peak(settings, source, stack, in_blocks))


def state_bytes(settings: RunSettings, source: ModelSource, stack: BlockStack) -> int:
    """What suspended forwards hold in front of a linear: the residual and what it reads."""
    size = torch.empty(0, dtype=source.dtype).element_size()
    width = int(getattr(source.config.get_text_config(), "hidden_size", 0) or 0)
    inner = max((own.shape[-1] for own in stack.blocks.parameters() if own.dim() >= 2), default=0)
    tokens = settings.sequences * settings.sequence_length * (2 if settings.mismatched else 1)
    if settings.evaluation is not None:
        tokens += settings.evaluation_tokens * (2 if settings.evaluate_float else 1)
    return size * tokens * (2 * width + inner)


def _peak(
    settings: RunSettings, source: ModelSource, stack: BlockStack, in_blocks: list[int]
) -> int:
    size = torch.empty(0, dtype=source.dtype).element_size()
    shell = sum(own.numel() for own in source.model.parameters()) - sum(in_blocks)
    blocks = (3 if settings.mismatched else 2) * max(in_blocks)
    states = min(state_bytes(settings, source, stack), int(settings.state_memory * 1e9))
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return now + size * (shell + blocks) + states


def _rate(source: ModelSource) -> float:
    """Operations a second of a product of matrices in the type of the model."""
    x = torch.ones(_SIZE, _SIZE, dtype=source.dtype, device=source.device)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        # Waits for a device that works beside us.
        (x @ x)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * _SIZE**3 / best
