"""From the inputs of a block to calibrations, one for each group of linears that share theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from certiq.calibration import ActivationStream, Calibration
from certiq.client import Client
from certiq.model.errors import UsageError
from certiq.model.levels import Level, is_expert
from certiq.torch.finite import not_finite
from certiq.torch.linears import features_of
from certiq.torch.taps import InputGroup, InputTap

STREAM = "calibration"
# It runs one block on the hidden states of a batch.
RunBlock = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class _StopError(Exception):
    """Ends a pass once what it was for has been read."""


@dataclass
class Collected:
    """A group of linears and the calibration of what they read; None where no token came."""

    name: str
    members: tuple[str, ...]
    features: int
    calibration: Calibration | None
    tokens: int
    mismatched: bool


@dataclass
class _Filling:
    calibration: Calibration
    stream: ActivationStream
    mismatched: bool
    tokens: int = 0


class Collector:
    """Fills calibrations with what the linears of one level read.

    `block` is the block as quantized so far, `float_block` the original one where Qronos needs
    both. Routing differs between the two, so experts are calibrated on what they see in the
    quantized model alone.
    """

    def __init__(
        self,
        client: Client,
        run: RunBlock,
        *,
        block_name: str,
        held_out_fraction: float,
        sequence_length: int,
    ) -> None:
        self._client = client
        self._run = run
        self._block_name = block_name
        self._held_out_fraction = held_out_fraction
        self._sequence_length = sequence_length

    def discover(
        self, block: nn.Module, linears: dict[str, nn.Module], x: torch.Tensor
    ) -> dict[str, InputGroup]:
        """The groups of linears that share an input, in the order one pass calls them."""
        with InputTap(linears, lambda name, rows: None) as tap:
            self._run(block, x)
        return tap.groups

    @contextmanager
    def fill(
        self,
        level: Level,
        block: nn.Module,
        linears: dict[str, nn.Module],
        batches: Sequence[torch.Tensor],
        *,
        float_block: nn.Module | None = None,
        float_linears: dict[str, nn.Module] | None = None,
        float_batches: Sequence[torch.Tensor] = (),
    ) -> Iterator[list[Collected]]:
        """Calibrations of a level, finalized; deleted at the end of the `with` block."""
        own = {name: linears[name] for name in level.linears}
        fillings: dict[str, _Filling] = {}
        with ExitStack() as calibrations:
            with ExitStack() as streams:
                rows: dict[str, torch.Tensor] = {}
                tap = streams.enter_context(InputTap(own, rows.__setitem__))
                float_rows: dict[str, torch.Tensor] = {}
                if float_block is not None and float_linears is not None:
                    floats = {name: float_linears[name] for name in level.linears}
                    streams.enter_context(InputTap(floats, float_rows.__setitem__))
                for index, batch in enumerate(batches):
                    self._pass(block, batch, level, linears)
                    if float_block is not None and float_linears is not None:
                        self._pass(float_block, float_batches[index], level, float_linears)
                    for name, x in rows.items():
                        group = tap.groups[name]
                        filling = fillings.get(name)
                        if filling is None:
                            filling = self._open(group, float_block, calibrations, streams)
                            fillings[name] = filling
                        self._send(name, filling, x, float_rows)
                    rows.clear()
                    float_rows.clear()
            yield self._finish(level, linears, tap.groups, fillings)

    def _pass(
        self, block: nn.Module, batch: torch.Tensor, level: Level, linears: dict[str, nn.Module]
    ) -> None:
        """Runs the block until all of the level has read its inputs, where that can be told: the
        last one that reads is not computed any more."""
        waiting = set(level.linears)

        def read(name: str) -> Callable[..., None]:
            def hook(*_: object) -> None:
                waiting.discard(name)
                if not waiting:
                    raise _StopError

            return hook

        # This hook runs behind those of the tap, which was entered before.
        watched = () if level.repeated else level.linears
        handles = [linears[name].register_forward_pre_hook(read(name)) for name in watched]
        try:
            self._run(block, batch)
        except _StopError:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def _open(
        self,
        group: InputGroup,
        float_block: nn.Module | None,
        calibrations: ExitStack,
        streams: ExitStack,
    ) -> _Filling:
        expert = is_expert(group.name)
        mismatched = float_block is not None and not expert
        calibration = calibrations.enter_context(
            self._client.calibration(
                group.features,
                mismatched=mismatched,
                held_out_fraction=self._held_out_fraction,
                # Tokens that were routed to an expert are no sequences any more.
                sequence_rows=0 if expert else self._sequence_length,
                labels=[f"{self._block_name}.{group.name}"],
            )
        )
        return _Filling(calibration, streams.enter_context(calibration.stream(STREAM)), mismatched)

    def _send(
        self,
        name: str,
        filling: _Filling,
        x: torch.Tensor,
        float_rows: dict[str, torch.Tensor],
    ) -> None:
        for rows, of_model in ((x, "quantized"), (float_rows.get(name), "float")):
            bad = None if rows is None else not_finite(rows, filling.tokens)
            if bad is not None:
                raise UsageError(
                    f"the input of {self._block_name}.{name} in the {of_model} model is {bad} of "
                    "the calibration's tokens: expected finite values in float32"
                )
        if filling.mismatched:
            if name not in float_rows or float_rows[name].shape != x.shape:
                raise UsageError(
                    f"{self._block_name}.{name} reads other tokens in the float model than in the "
                    "quantized one; only OPTQ can quantize it"
                )
            filling.stream.send(float_rows[name], x)
        else:
            filling.stream.send(x)
        filling.tokens += x.shape[0]

    def _finish(
        self,
        level: Level,
        linears: dict[str, nn.Module],
        groups: dict[str, InputGroup],
        fillings: dict[str, _Filling],
    ) -> list[Collected]:
        collected: list[Collected] = []
        reached: set[str] = set()
        for name, filling in fillings.items():
            filling.calibration.finalize(expected_tokens=filling.tokens)
            members = tuple(groups[name].members)
            reached.update(members)
            collected.append(
                Collected(
                    name,
                    members,
                    groups[name].features,
                    filling.calibration,
                    filling.tokens,
                    filling.mismatched,
                )
            )
        for name in level.linears:
            if name not in reached:
                features = features_of(linears[name])
                collected.append(Collected(name, (name,), features, None, 0, False))
        return collected
