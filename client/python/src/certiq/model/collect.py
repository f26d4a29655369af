"""From what linears read to calibrations, one for each group of linears that read the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from certiq.calibration import ActivationStream, Calibration
from certiq.client import Client
from certiq.model.errors import UsageError
from certiq.model.levels import Group, Level, pattern_of
from certiq.model.lockstep import AtLevel, running
from certiq.tensors import Array
from certiq.torch.experts import TakenApart
from certiq.torch.finite import not_finite
from certiq.torch.taps import Seen

STREAM = "calibration"
PRIOR_STREAM = "prior"
# Experts see few tokens each. The sums of one are shrunk to those of all experts beside it by so
# many tokens of these for each feature. Measured on SmolLM2's layer 15 (3 bits, groups of 64, its
# tokens split into six experts by direction, errors on tokens that were not fitted): with 32 and 96
# tokens of 576 features 7 and 6 % lower than without; 1/8 to 1 differ by less than 1 %.
PRIOR_PER_FEATURE = 0.5
# What has so many tokens a feature is not changed by it.
ENOUGH_PER_FEATURE = 16
# The sums of all experts are known well enough from those with so many tokens a feature together.
POOLED_PER_FEATURE = 8


@dataclass
class Collected:
    """A group of linears and the calibration of what they read; None where there is nothing."""

    group: Group
    features: int
    calibration: Calibration | None
    tokens: int
    mismatched: bool
    prior: int = 0
    """Tokens' worth of all experts' sums in the calibration, beside the `tokens` of its own."""


class BlockReader:
    """Hooks on the linears of a block.

    What a group of them reads goes to the forward that runs it, which then waits for the group's
    level.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        blocks: Mapping[str, Sequence[nn.Module]],
        *,
        waits: bool,
    ) -> None:
        """`blocks`: what each stream that is read runs, a copy for each device. `waits`: False
        where a forward reads the whole block in float first."""
        self.levels = list(levels)
        self._done: set[int] = set()
        self._waits = waits
        self._level_of: dict[str, int] = {}
        self._group_of: dict[str, Group] = {}
        for number, level in enumerate(self.levels):
            for group in level.groups:
                for member in group.members:
                    self._level_of[member] = number
                    self._group_of[member] = group
        self._seen: dict[tuple[Any, str], Seen] = {}
        self._handles: list[Any] = []
        self._apart: list[TakenApart] = []
        self._streams = frozenset(blocks)
        for block in {id(own): own for copies in blocks.values() for own in copies}.values():
            self._watch(block)

    def _watch(self, block: nn.Module) -> None:
        names: dict[nn.Module, str] = {}

        def announce(readers: Sequence[tuple[nn.Module, torch.Tensor]]) -> None:
            for linear, x in readers:
                if linear in names:
                    self._read(names[linear], x)

        for name in self._level_of:
            module = block.get_submodule(name)
            names[module] = name
            self._handles.append(
                module.register_forward_pre_hook(
                    lambda _, arguments, name=name: self._called(name, arguments[0])
                )
            )
        for module in block.modules():
            if isinstance(module, TakenApart):
                self._apart.append(module)
                module.announce = announce

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._apart:
            module.announce = None
        self._seen.clear()

    def set_done(self, level: int) -> None:
        self._done.add(level)

    def is_done(self, level: int) -> bool:
        return level in self._done

    def _called(self, name: str, x: torch.Tensor) -> None:
        self._read(name, x)
        level = self._level_of[name]
        own = running()
        if self._waits and level not in self._done and own.stream in self._streams:
            own.pause(AtLevel(level), x)

    def _read(self, name: str, x: torch.Tensor) -> None:
        own = running()
        if own.stream not in self._streams:
            return
        group = self._group_of[name]
        seen = self._seen.get((own, group.name))
        if seen is not None:
            if not seen.same(x) and (self._waits or self._level_of[name] not in self._done):
                raise UsageError(
                    f"{name} does not read what {group.name} reads, as it did in a short sequence: "
                    "expected blocks that run the same way on every text; --ignore it"
                )
            return
        if self._level_of[name] in self._done:
            return
        self._seen[own, group.name] = Seen(x)
        rows = x.detach().reshape(-1, x.shape[-1])
        if rows.shape[0]:
            own.rows[group.name] = rows


@dataclass
class _Filling:
    calibration: Calibration
    stream: ActivationStream
    mismatched: bool
    features: int
    tokens: int = 0


class Collector:
    """Fills the calibrations of a block's groups while forwards read it.

    With `mismatched` each row has the float model's beside it. Routing differs between the two, so
    experts are calibrated on what they see in the quantized model alone.
    """

    def __init__(
        self,
        client: Client,
        *,
        block_name: str,
        mismatched: bool,
        experts: frozenset[str],
        held_out_fraction: float,
        sequence_length: int,
    ) -> None:
        self._client = client
        self._block_name = block_name
        self._mismatched = mismatched
        self._experts = experts
        self._held_out_fraction = held_out_fraction
        self._sequence_length = sequence_length
        self._fillings: dict[str, _Filling] = {}
        self._streams = ExitStack()

    def __enter__(self) -> Collector:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with ExitStack() as calibrations:
            for filling in self._fillings.values():
                calibrations.push(filling.calibration)
            self._streams.__exit__(kind, error, trace)

    def take(self, rows: dict[str, torch.Tensor], float_rows: dict[str, torch.Tensor]) -> None:
        """Sends what one batch read, and forgets it."""
        for name, x in rows.items():
            self._send(name, x, float_rows.get(name))
        rows.clear()
        float_rows.clear()

    def finish(self, level: Level) -> list[Collected]:
        """Finalizes the calibrations of a level."""
        for group in level.groups:
            if group.name in self._fillings:
                self._fillings[group.name].stream.close()
        priors = self._add_priors(level)
        collected = []
        for group in level.groups:
            filling = self._fillings.get(group.name)
            if filling is None:
                collected.append(Collected(group, 0, None, 0, False))
                continue
            prior = priors.get(group.name, 0)
            filling.calibration.finalize(expected_tokens=filling.tokens + prior)
            collected.append(
                Collected(
                    group,
                    filling.features,
                    filling.calibration,
                    filling.tokens,
                    filling.mismatched,
                    prior,
                )
            )
        return collected

    def _add_priors(self, level: Level) -> dict[str, int]:
        """Adds to each expert with few tokens, or none, some of what all of them read."""
        alike: dict[str, list[Group]] = defaultdict(list)
        for group in level.groups:
            if group.name in self._experts:
                alike[pattern_of(group.name)].append(group)
        added: dict[str, int] = {}
        for groups in alike.values():
            fillings = {
                group.name: self._fillings[group.name]
                for group in groups
                if group.name in self._fillings
            }
            if not fillings:
                continue
            features = next(iter(fillings.values())).features
            few = [
                group.name
                for group in groups
                if group.name not in fillings
                or fillings[group.name].tokens < ENOUGH_PER_FEATURE * features
            ]
            if not few:
                continue
            mean = _mean_gram(fillings.values())
            tokens = max(1, round(PRIOR_PER_FEATURE * features))
            for name in few:
                if name not in fillings:
                    self._fillings[name] = self._open(name, features)
                    self._fillings[name].stream.close()
                self._fillings[name].calibration.import_statistics(
                    stream_id=PRIOR_STREAM, gram=mean * tokens, tokens=tokens
                )
                added[name] = tokens
        return added

    def drop(self, level: Level) -> None:
        """Deletes the calibrations of a level, once its jobs have ended."""
        for group in level.groups:
            filling = self._fillings.pop(group.name, None)
            if filling is not None:
                filling.calibration.delete()

    def _open(self, name: str, features: int) -> _Filling:
        expert = name in self._experts
        mismatched = self._mismatched and not expert
        calibration = self._client.calibration(
            features,
            mismatched=mismatched,
            held_out_fraction=self._held_out_fraction,
            # Tokens that were routed to an expert are no sequences any more.
            sequence_rows=0 if expert else self._sequence_length,
            labels=[f"{self._block_name}.{name}"[:256]],
        )
        stream = self._streams.enter_context(calibration.stream(STREAM))
        return _Filling(calibration, stream, mismatched, features)

    def _send(self, name: str, x: torch.Tensor, float_x: torch.Tensor | None) -> None:
        filling = self._fillings.get(name)
        if filling is None:
            filling = self._fillings[name] = self._open(name, x.shape[-1])
        for rows, of_model in ((x, "quantized"), (float_x, "float")):
            bad = None if rows is None else not_finite(rows, filling.tokens)
            if bad is not None:
                raise UsageError(
                    f"the input of {self._block_name}.{name} in the {of_model} model is {bad} of "
                    "the calibration's tokens: expected finite values in float32"
                )
        if filling.mismatched:
            if float_x is None or float_x.shape != x.shape:
                raise UsageError(
                    f"{self._block_name}.{name} reads other tokens in the float model than in the "
                    "quantized one; only OPTQ can quantize it"
                )
            filling.stream.send(float_x, x)
        else:
            filling.stream.send(x)
        filling.tokens += x.shape[0]


def _mean_gram(fillings: Iterable[_Filling]) -> Array:
    """E[x x^T] over the tokens of those that saw most, [N, N] float64."""
    total: Array | None = None
    tokens = 0
    for filling in sorted(fillings, key=lambda own: -own.tokens):
        statistics = filling.calibration.export_statistics()
        total = statistics.gram if total is None else total + statistics.gram
        tokens += statistics.tokens
        if tokens >= POOLED_PER_FEATURE * filling.features:
            break
    assert total is not None
    return total / max(1, tokens)
