"""A whole model, block by block: calibrate, quantize, go on with what the block now returns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from certiq.client import Client
from certiq.model.check import Checked, check_model, whole_model
from certiq.model.collect import BlockReader, Collected, Collector
from certiq.model.errors import UsageError
from certiq.model.estimate import state_bytes
from certiq.model.evaluate import Agreement
from certiq.model.journal import Journal
from certiq.model.levels import Group, Level, is_expert, joined
from certiq.model.lockstep import AtBlock, AtLevel, BlockStack, Finished, Forward
from certiq.model.plan import Plan
from certiq.model.quantize import LevelQuantizer
from certiq.model.settings import RunSettings
from certiq.model.source import ModelSource, moved
from certiq.model.text import CalibrationText, read_calibration, read_evaluation, self_samples
from certiq.torch.experts import take_experts_apart
from certiq.torch.linears import set_weight, weight_of
from certiq.torch.sums import held_out_hash, is_held_out_block

# What runs through the model: calibration sequences through the quantized and the float one, and
# evaluation windows alike.
QUANTIZED, FLOAT = "quantized", "float"
EVALUATED, EVALUATED_FLOAT = "evaluated", "evaluated_float"
# Logits of so many bytes are in memory at a time.
LOGITS_BYTES = 256 << 20

# It is called with the name of a linear and its relative error.
Done = Callable[[str, float], None]


class ModelRun:
    """One run over one model; all that is finished is in the journal."""

    def __init__(
        self,
        client: Client,
        settings: RunSettings,
        source: ModelSource,
        stack: BlockStack,
        plan: Plan,
        journal: Journal,
    ) -> None:
        self._client = client
        self._settings = settings
        self._source = source
        self._journal = journal
        self._plan = plan
        self.stack = stack
        # The model once on each device; the first is the source's own.
        self._stacks = [stack]
        self.linears = list(plan.quantized)
        self._parks = False
        # Weights of heads as they were, for the float model's logits.
        self._float_heads: dict[str, torch.Tensor] = {}
        self.checked: Checked | None = None
        # Batches of windows to evaluate on and how many special tokens each begins with, by the
        # text they are from.
        self._windows: dict[str, tuple[list[torch.Tensor], int]] = {}
        self.texts: dict[str, Any] = {}
        """What was read, for the report."""
        self.sample = torch.empty(1, 0, dtype=torch.int64)
        """The first calibration sequence."""
        self._forwards: dict[str, list[Forward]] = {}

    def done(self) -> list[str]:
        return [name for name in self._plan.all() if self._journal.has(name)]

    def run(self, done: Done) -> None:
        """Quantizes what is not done. Call again after an interruption, with the same journal."""
        began = time.monotonic()
        try:
            with torch.no_grad():
                ids = self._prepare()
                with ExitStack() as entered:
                    for stack in self._stacks:
                        entered.enter_context(stack.entered())
                    self._begin(ids, done)
                    for index in range(len(self.stack)):
                        self._block(index, done)
                    self._heads(done)
                    self._evaluate()
        finally:
            self._add_seconds(time.monotonic() - began)
            for forwards in self._forwards.values():
                for forward in forwards:
                    forward.end()

    def evaluation(self) -> dict[str, Any] | None:
        """Perplexities and agreement by text, once `run` has returned."""
        return self._journal.read_note("evaluation")

    def seconds(self) -> float:
        return float((self._journal.read_note("seconds") or {"seconds": 0.0})["seconds"])

    def _add_seconds(self, seconds: float) -> None:
        self._journal.write_note("seconds", {"seconds": self.seconds() + seconds})

    def _replicate(self) -> None:
        """Copies the shell of the model to the other devices."""
        for device in self._settings.devices()[1:]:
            self._stacks.append(BlockStack(moved(copy.deepcopy(self._source.model), device)))

    def _linears_of(self, index: int, block: nn.Module) -> dict[str, nn.Module]:
        """Those of a block that are to be quantized, by their names within it."""
        prefix = f"{self.stack.block_name(index)}."
        return {
            name.removeprefix(prefix): block.get_submodule(name.removeprefix(prefix))
            for name in self.linears
            if name.startswith(prefix)
        }

    def _prepare(self) -> torch.Tensor:
        """Loads all but the blocks, tokenizes the texts and checks the model on a few tokens; the
        calibration's ids [sequences, positions]."""
        settings, tokenizer = self._settings, self._source.tokenizer()
        vocabulary = int(self._source.config.get_text_config().vocab_size)
        text = self._calibration(tokenizer, vocabulary)
        ids = text.sequences
        self.sample = ids[:1]
        self.texts["calibration"] = text.described
        if settings.evaluation is not None:
            found = read_evaluation(
                settings.evaluation,
                tokenizer,
                settings.evaluation_tokens,
                settings.evaluation_window,
                vocabulary=vocabulary,
            )
            self.texts["evaluation"] = found.described
            self._windows["evaluation"] = (self._batches_of_windows(found.windows), found.special)
            held_out = self._held_out(ids)
            if held_out is not None and settings.evaluate_float:
                # Its sequences begin as the evaluation's windows do.
                self._windows["held_out_calibration"] = (
                    self._batches_of_windows(held_out),
                    found.special,
                )
        self._source.load_shell(self.stack.name)
        self.checked = check_model(
            self._source,
            self.stack,
            ids,
            self._linears_of,
            sequential=settings.sequential,
            compare=settings.load_checks,
        )
        if self._windows and not self.checked.has_logits:
            raise UsageError(
                f"{type(self.stack.model).__name__} has no logits of next tokens: expected a model "
                "that predicts them for --evaluation"
            )
        self._replicate()
        return ids

    def _calibration(self, tokenizer: Any, vocabulary: int) -> CalibrationText:
        settings = self._settings
        if settings.calibration:
            return read_calibration(
                settings.calibration,
                tokenizer,
                settings.sequences,
                settings.sequence_length,
                vocabulary=vocabulary,
            )
        kept = self._journal.read_note("own_samples")
        if kept is not None:
            return CalibrationText(
                torch.tensor(kept["sequences"]), kept["described"], kept["digest"]
            )
        text = self_samples(
            whole_model(self._source),
            tokenizer,
            settings.sequences,
            settings.sequence_length,
            settings.spec.seed or 0,
            settings.batch_size,
        )
        note = {
            "sequences": text.sequences.tolist(),
            "described": text.described,
            "digest": text.digest,
        }
        # Another torch might draw others.
        self._journal.write_note("own_samples", note)
        return text

    def _batches_of_windows(self, windows: torch.Tensor) -> list[torch.Tensor]:
        vocabulary = int(self._source.config.get_text_config().vocab_size)
        fitting = LOGITS_BYTES // (4 * windows.shape[1] * vocabulary)
        return list(windows.split(max(1, min(self._settings.batch_size, fitting))))

    def _held_out(self, ids: torch.Tensor) -> torch.Tensor | None:
        """The calibration sequences whose rows no fit sees, by the server's own rule."""
        fraction = self._settings.effective_held_out_fraction
        stream = held_out_hash("calibration")
        rows = [row for row in range(len(ids)) if is_held_out_block(stream, row, fraction)]
        return ids[rows] if rows else None

    def _begin(self, ids: torch.Tensor, done: Done) -> None:
        """Starts the forwards, which come to the first block."""
        batches = list(ids.split(self._settings.batch_size))
        needed = state_bytes(self._settings, self._source, self.stack)
        self._parks = needed > self._settings.state_memory * 1e9
        windows = [batch for batches, _ in self._windows.values() for batch in batches]
        # Those of the float model look up a float table.
        if self._settings.mismatched:
            self._start(FLOAT, batches)
        if self._settings.evaluate_float:
            self._start(EVALUATED_FLOAT, windows)
        self._embeddings(done)
        self._start(QUANTIZED, batches)
        self._start(EVALUATED, windows)

    def _start(self, stream: str, batches: Sequence[torch.Tensor]) -> None:
        devices = self._settings.devices()
        self._forwards[stream] = [
            Forward(
                self._stacks[number % len(devices)].model,
                batch.to(devices[number % len(devices)]),
                stream,
            )
            for number, batch in enumerate(batches)
        ]
        self._advance_all(stream)

    def _of(self, stream: str) -> list[Forward]:
        return self._forwards.get(stream, [])

    def _block(self, index: int, done: Done) -> None:
        """One block: from all forwards in front of it to all of them behind it."""
        assert self.checked is not None
        block = self._source.load_block(self.stack.blocks, self.stack.name, index)
        apart = take_experts_apart(block)
        others = self._settings.devices()[1:]
        # The same block on each device.
        blocks = [block, *(moved(copy.deepcopy(block), device) for device in others)]
        for stack, own in zip(self._stacks, blocks, strict=True):
            stack.set_block(index, partial(_any_stream, own))
        # The block is float yet.
        self._advance_all(EVALUATED_FLOAT)
        linears = _by_name(self._linears_of(index, own) for own in blocks)
        if not linears:
            for stream in (QUANTIZED, FLOAT, EVALUATED):
                self._advance_all(stream)
            return
        float_blocks = copy.deepcopy(blocks) if self._of(FLOAT) else blocks
        read = {QUANTIZED: blocks} | ({FLOAT: float_blocks} if self._of(FLOAT) else {})
        waits = self._settings.sequential
        with BlockReader(self.checked.levels[index], read, waits=waits) as reader:
            for number, stack in enumerate(self._stacks):
                of_stream = {QUANTIZED: blocks[number], EVALUATED: blocks[number]}
                of_stream[FLOAT] = float_blocks[number]
                stack.set_block(
                    index,
                    of_stream.__getitem__,
                    repeats=lambda stream: (
                        stream == QUANTIZED and not waits and not reader.is_done(0)
                    ),
                )
            self._quantize(index, reader, linears, apart, done)
        self._advance_all(EVALUATED)

    def _advance_all(self, stream: str) -> None:
        """Runs the forwards of a stream to where they wait next."""
        for forward in self._of(stream):
            forward.advance()
            self._park(forward)

    def _outside(self, *, embeddings: bool) -> dict[str, list[nn.Module]]:
        """Modules outside the blocks that are to be quantized, on each device, each with a weight
        of its own."""
        found = {}
        for name, planned in self._plan.outside.items():
            if planned.linear.embedding == embeddings:
                found[name] = [stack.model.get_submodule(name) for stack in self._stacks]
                for module in found[name]:
                    weight = module.weight.detach().clone()
                    module.weight = nn.Parameter(weight, requires_grad=False)
        return found

    def _quantizer(self, done: Done) -> LevelQuantizer:
        planned = self._plan.all()
        return LevelQuantizer(self._client, lambda name: planned[name].spec, self._journal, done)

    def _collector(self, prefix: str, experts: frozenset[str]) -> Collector:
        return Collector(
            self._client,
            block_name=prefix,
            mismatched=bool(self._of(FLOAT)),
            experts=experts,
            held_out_fraction=self._settings.effective_held_out_fraction,
            sequence_length=self._settings.sequence_length,
        )

    def _embeddings(self, done: Done) -> None:
        """Tables are rounded plainly, before anything is looked up in them."""
        for name, modules in self._outside(embeddings=True).items():
            level = Level((Group(name, (name,)),))
            self._restore("", level, {name: modules})
            nothing = [Collected(level.groups[0], 0, None, 0, False)]
            self._quantizer(done).quantize(
                "", nothing, {name: modules}, self._pending("", level), frozenset()
            )

    def _heads(self, done: Done) -> None:
        """What forwards read behind the last block."""
        for name, modules in self._outside(embeddings=False).items():
            self._float_heads[name] = weight_of(modules[0]).clone()
            level = Level((Group(name, (name,)),))
            self._restore("", level, {name: modules})
            if not self._pending("", level):
                continue
            shells = [stack.model for stack in self._stacks]
            read = {QUANTIZED: shells} | ({FLOAT: shells} if self._of(FLOAT) else {})
            with (
                BlockReader([level], read, waits=True) as reader,
                self._collector("", frozenset()) as collector,
            ):
                self._advance(len(self.stack), reader, collector)
                self._quantizer(done).quantize(
                    "", collector.finish(level), {name: modules}, frozenset({name}), frozenset()
                )
                collector.drop(level)

    @contextmanager
    def _with_float_heads(self) -> Iterator[None]:
        heads = {
            name: [stack.model.get_submodule(name) for stack in self._stacks]
            for name in self._float_heads
        }
        quantized = {name: weight_of(modules[0]).clone() for name, modules in heads.items()}
        try:
            _set_weights(heads, self._float_heads)
            yield
        finally:
            _set_weights(heads, quantized)

    def _quantize(
        self,
        index: int,
        reader: BlockReader,
        linears: dict[str, list[nn.Module]],
        apart: Collection[str],
        done: Done,
    ) -> None:
        """The levels of a block, one after another."""
        prefix = self.stack.block_name(index)
        experts = frozenset(
            name
            for name in linears
            if is_expert(name) or any(name.startswith(f"{fused}.") for fused in apart)
        )
        quantizer = self._quantizer(done)
        for number, level in enumerate(reader.levels):
            self._restore(prefix, level, linears)
            if not self._pending(prefix, level):
                reader.set_done(number)
        with self._collector(prefix, experts) as collector:

            def quantize(number: int) -> None:
                level = reader.levels[number]
                quantizer.quantize(
                    prefix,
                    collector.finish(level),
                    linears,
                    self._pending(prefix, level),
                    experts,
                )
                collector.drop(level)
                reader.set_done(number)

            while (waiting := self._advance(index, reader, collector)) is not None:
                quantize(waiting)
            # Those that no token reached; one of the float model may wait for them.
            for number in range(len(reader.levels)):
                if not reader.is_done(number):
                    quantize(number)
            self._advance(index, reader, collector)

    def _advance(self, index: int, reader: BlockReader, collector: Collector) -> int | None:
        """Runs each batch until it waits for a level; the first level that one waits for, or None
        where all are behind the block."""
        floats: Sequence[Forward | None] = self._of(FLOAT) or [None] * len(self._of(QUANTIZED))
        waiting: set[int] = set()
        for forward, beside in zip(self._of(QUANTIZED), floats, strict=True):
            self._advance_one(forward, index, reader)
            if beside is not None:
                self._advance_one(beside, index, reader)
            collector.take(forward.rows, {} if beside is None else beside.rows)
            self._park(forward, beside)
            if isinstance(forward.stop, AtLevel):
                waiting.add(forward.stop.level)
        return min(waiting, default=None)

    def _park(self, *forwards: Forward | None) -> None:
        """Hidden states go to disk where all of them would take more than the memory for them."""
        if not self._parks:
            return
        for forward in forwards:
            if forward is not None:
                forward.park(self._journal.state_file(id(forward)))

    @staticmethod
    def _advance_one(forward: Forward, index: int, reader: BlockReader) -> None:
        stop = forward.stop
        waits = isinstance(stop, AtLevel) and not reader.is_done(stop.level)
        if not waits and (isinstance(stop, AtLevel) or stop == AtBlock(index)):
            forward.advance()

    def _pending(self, prefix: str, level: Level) -> frozenset[str]:
        return frozenset(
            name for name in level.linears if not self._journal.has(joined(prefix, name))
        )

    def _restore(self, prefix: str, level: Level, linears: dict[str, list[nn.Module]]) -> None:
        """Gives those that are done their weights."""
        for name in level.linears:
            if self._journal.has(joined(prefix, name)):
                weight = self._journal.read(joined(prefix, name)).dequantized()
                _set_weights({name: linears[name]}, {name: weight})

    def _evaluate(self) -> None:
        """Runs the evaluation's forwards to their ends, window by window."""
        if not self._windows or self._journal.read_note("evaluation") is not None:
            return
        quantized = iter(self._of(EVALUATED))
        floats = iter(self._of(EVALUATED_FLOAT))
        result: dict[str, Any] = {}
        for text, (batches, special) in self._windows.items():
            agreement = Agreement()
            for batch in batches:
                own = self._output(next(quantized))
                other = None
                if self._of(EVALUATED_FLOAT):
                    with self._with_float_heads():
                        other = self._output(next(floats))
                agreement.add(batch, own, other, special=special)
            result[text] = agreement.described() | {"window": batches[0].shape[1]}
        self._journal.write_note("evaluation", result)

    def _output(self, forward: Forward) -> Any:
        stop = forward.advance()
        forward.stop = None
        if not isinstance(stop, Finished):
            raise UsageError(
                f"{type(self.stack.model).__name__}: its forward stopped at {stop} behind the last "
                "block, unlike that of a short sequence"
            )
        return stop.output


def _any_stream(block: nn.Module, stream: str) -> nn.Module:
    del stream
    return block


def _by_name(found: Iterable[dict[str, nn.Module]]) -> dict[str, list[nn.Module]]:
    """The same linear of each copy of a block."""
    by_name: dict[str, list[nn.Module]] = {}
    for linears in found:
        for name, module in linears.items():
            by_name.setdefault(name, []).append(module)
    return by_name


def _set_weights(
    modules: Mapping[str, Iterable[nn.Module]], weights: Mapping[str, torch.Tensor]
) -> None:
    for name, own in modules.items():
        for module in own:
            set_weight(module, weights[name])
