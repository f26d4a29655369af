"""The written folder, read back: by the loaders' rules, and by transformers itself."""

from __future__ import annotations

from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any

import torch

from certiq.model.check import TOKENS, too_large
from certiq.model.journal import Journal
from certiq.model.levels import pattern_of
from certiq.model.loaders.check import check_model
from certiq.model.loaders.loading import prove
from certiq.model.lockstep import BlockStack
from certiq.model.plan import Plan
from certiq.model.settings import RunSettings
from certiq.model.source import ModelSource
from certiq.torch.experts import take_experts_apart
from certiq.torch.linears import set_weight


@dataclass
class Proof:
    """What was found out about a written checkpoint."""

    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    tensor_parallel: int = 1
    """The largest degree that the groups allow."""
    loaded: dict[str, Any] = field(default_factory=dict)
    """How transformers read it, what was compared, and the largest differences."""

    def described(self) -> dict[str, Any]:
        return asdict(self)


def prove_output(
    settings: RunSettings,
    source: ModelSource,
    stack: BlockStack,
    plan: Plan,
    journal: Journal,
    ids: torch.Tensor,
) -> Proof:
    """Checks the rules, then loads the folder with transformers: a linear of every kind, and the
    logits of a short sequence, are those of the model with the dequantized weights.

    The blocks of `stack` get weights and keep them.
    """
    result = check_model(settings.output)
    proof = Proof(
        failures=[str(finding) for finding in result.findings if finding.severity == "error"],
        warnings=[str(finding) for finding in result.findings if finding.severity != "error"],
        tensor_parallel=result.tensor_parallel,
    )
    reason = _not_loaded(settings, source, plan)
    if reason is not None:
        proof.loaded = {"not_loaded": reason}
        return proof
    model = _dequantized(source, stack, plan, journal)
    expected = {name: journal.read(name).dequantized() for name in _sample(plan)}
    # Loaders show bars.
    with redirect_stderr(StringIO()):
        weights, logits = prove(settings.output, expected, model, ids[:1, :TOKENS])
    for found in (weights, logits):
        proof.failures += found.failures
    proof.loaded = {
        "route": weights.route,
        "not_loaded": weights.not_loaded,
        "linears": list(weights.compared),
        "largest_difference_of_weights": weights.largest_difference,
        "largest_difference_of_logits": logits.largest_difference,
    }
    return proof


def _not_loaded(settings: RunSettings, source: ModelSource, plan: Plan) -> str | None:
    if not settings.load_checks:
        return "not asked for"
    if plan.format.startswith("gptq"):
        return "GPTQ is read by the rules alone"
    if plan.mixed:
        return f"transformers does not load experts of which some are float ({plan.mixed[0]})"
    return too_large(source)


def _sample(plan: Plan) -> list[str]:
    """The first and the last linear of each kind."""
    first: dict[str, str] = {}
    last: dict[str, str] = {}
    for name in plan.quantized:
        first.setdefault(pattern_of(name), name)
        last[pattern_of(name)] = name
    return sorted({*first.values(), *last.values()})


def _dequantized(source: ModelSource, stack: BlockStack, plan: Plan, journal: Journal) -> Any:
    model = source.model
    for index in range(len(stack)):
        stack.blocks[index] = source.load_block(stack.blocks, stack.name, index)
    take_experts_apart(model)
    model.float()
    for name in plan.all():
        set_weight(model.get_submodule(name), journal.read(name).dequantized())
    return model
