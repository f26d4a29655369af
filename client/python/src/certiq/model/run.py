"""A whole model, block by block: calibrate, quantize, go on with what the block now returns."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from certiq.client import Client
from certiq.model.blocks import BlockStack
from certiq.model.collect import Collector
from certiq.model.errors import UsageError
from certiq.model.evaluate import perplexity
from certiq.model.journal import Journal
from certiq.model.levels import Level, levels_of
from certiq.model.quantize import LevelQuantizer
from certiq.model.settings import RunSettings
from certiq.model.source import ModelSource
from certiq.model.text import calibration_sequences, evaluation_windows, read_token_ids
from certiq.torch.experts import take_experts_apart
from certiq.torch.linears import find_linears, set_weight

# These names stand for what runs through the model: "quantized" and "float" are calibration
# sequences.
QUANTIZED, FLOAT = "quantized", "float"
EVALUATED, EVALUATED_FLOAT = "evaluated", "evaluated_float"

# It is called with the name of a linear and its relative error.
Done = Callable[[str, float], None]


class ModelRun:
    """One run over one model; all that is finished is in the journal."""

    def __init__(
        self, client: Client, settings: RunSettings, source: ModelSource, journal: Journal
    ) -> None:
        self._client = client
        self._settings = settings
        self._source = source
        self._journal = journal
        self._device = source.device
        self.stack = BlockStack(source.model)
        self.block_count = min(settings.blocks or len(self.stack), len(self.stack))
        self.linears = self._find_all()
        self._ids: dict[str, list[torch.Tensor]] = {}
        self._states: dict[str, list[torch.Tensor]] = {}

    def done(self) -> list[str]:
        return [name for name in self.linears if self._journal.has(name)]

    def run(self, done: Done) -> None:
        """Quantizes what is not done. Call again after an interruption, with the same journal."""
        self._prepare()
        saved = self._journal.read_states()
        start = 0
        if saved is None:
            self._begin()
        else:
            start = saved[0]
            self._restore(saved[1])
        for index in range(start, len(self.stack)):
            began = time.monotonic()
            self._block(index, done)
            self._journal.write_states(index + 1, self._joined())
            self._add_seconds(time.monotonic() - began)

    def perplexity(self) -> dict[str, Any] | None:
        """Perplexities of the float and the quantized model, once `run` has returned."""
        known = self._journal.read_note("perplexity")
        if known is not None or EVALUATED not in self._states:
            return known
        result: dict[str, Any] = {"float": None}
        windows = self._ids[EVALUATED]
        for name, key in ((EVALUATED, "quantized"), (EVALUATED_FLOAT, "float")):
            if name in self._states:
                result[key] = perplexity(self.stack, windows, self._states[name])
        result["tokens"] = sum(batch.numel() for batch in windows)
        result["window"] = self._settings.evaluation_window
        self._journal.write_note("perplexity", result)
        return result

    def seconds(self) -> float:
        return float((self._journal.read_note("seconds") or {"seconds": 0.0})["seconds"])

    def _add_seconds(self, seconds: float) -> None:
        self._journal.write_note("seconds", {"seconds": self.seconds() + seconds})

    def _find_all(self) -> list[str]:
        """The linears to quantize, by their names in the whole model."""
        found: list[str] = []
        for index in range(self.block_count):
            block = copy.deepcopy(self.stack.blocks[index])
            take_experts_apart(block)
            prefix = self.stack.block_name(index)
            found += [f"{prefix}.{name}" for name in self._block_linears(prefix, block)]
        if not found:
            raise UsageError("no linears to quantize: all are ignored")
        return found

    def _block_linears(self, prefix: str, block: nn.Module) -> dict[str, nn.Module]:
        patterns = [re.compile(pattern) for pattern in self._settings.ignore]
        return find_linears(
            block, lambda name, _: not any(p.search(f"{prefix}.{name}") for p in patterns)
        )

    def _prepare(self) -> None:
        """Loads all but the blocks and tokenizes the texts."""
        settings, tokenizer = self._settings, self._source.tokenizer()
        ids = calibration_sequences(
            read_token_ids(settings.calibration, tokenizer),
            settings.sequences,
            settings.sequence_length,
            tokenizer,
            source=str(settings.calibration),
        )
        self._ids[QUANTIZED] = list(ids.split(settings.batch_size))
        if settings.mismatched:
            self._ids[FLOAT] = self._ids[QUANTIZED]
        if settings.evaluation is not None:
            windows = evaluation_windows(
                read_token_ids(settings.evaluation, tokenizer),
                settings.evaluation_tokens,
                settings.evaluation_window,
                source=str(settings.evaluation),
            )
            self._ids[EVALUATED] = list(windows.split(settings.batch_size))
            if settings.evaluate_float:
                self._ids[EVALUATED_FLOAT] = self._ids[EVALUATED]
        self._ids = {
            name: [batch.to(self._device) for batch in batches]
            for name, batches in self._ids.items()
        }
        self._source.load_shell(self.stack.name)
        first = self.stack.blocks[0]
        empty = copy.deepcopy(first)
        self._source.load_block(self.stack.block_name(0), first)
        self.stack.learn(self._ids[QUANTIZED][0][:1])
        self.stack.blocks[0] = empty

    def _begin(self) -> None:
        for name, batches in self._ids.items():
            self._states[name] = [self.stack.begin(batch).cpu() for batch in batches]

    def _restore(self, joined: dict[str, torch.Tensor]) -> None:
        """Hidden states from the journal; the blocks' other arguments are found anew."""
        for name, batches in self._ids.items():
            for batch in {tuple(batch.shape): batch for batch in batches}.values():
                self.stack.begin(batch)
            sizes = [batch.shape[0] for batch in batches]
            self._states[name] = list(joined[name].split(sizes))

    def _joined(self) -> dict[str, torch.Tensor]:
        return {name: torch.cat(batches) for name, batches in self._states.items()}

    def _block(self, index: int, done: Done) -> None:
        prefix = self.stack.block_name(index)
        block = self.stack.blocks[index]
        empty = copy.deepcopy(block)
        self._source.load_block(prefix, block)
        take_experts_apart(block)
        float_block = None
        if FLOAT in self._states or EVALUATED_FLOAT in self._states:
            float_block = copy.deepcopy(block)
        if index < self.block_count:
            linears = self._block_linears(prefix, block)
            names = {f"{prefix}.{name}" for name in linears}
            if all(self._journal.has(name) for name in names):
                self._restore_weights(prefix, tuple(linears), linears)
            else:
                self._quantize_block(index, block, float_block, linears, done)
        for name in self._states:
            runs_float = name in (FLOAT, EVALUATED_FLOAT)
            self._states[name] = [
                self._run(index, float_block if runs_float and float_block else block, batch).cpu()
                for batch in self._states[name]
            ]
        self.stack.blocks[index] = empty

    def _quantize_block(
        self,
        index: int,
        block: nn.Module,
        float_block: nn.Module | None,
        linears: dict[str, nn.Module],
        done: Done,
    ) -> None:
        prefix = self.stack.block_name(index)
        collector = Collector(
            self._client,
            lambda module, x: self._run(index, module, x),
            block_name=prefix,
            held_out_fraction=self._settings.effective_held_out_fraction,
            sequence_length=self._settings.sequence_length,
        )
        quantizer = LevelQuantizer(self._client, self._settings.spec, self._journal, done)
        batches = self._states[QUANTIZED]
        groups = collector.discover(block, linears, batches[0])
        mismatched = FLOAT in self._states
        for level in levels_of(list(linears), groups, sequential=self._settings.sequential):
            pending = self._pending(prefix, level)
            if pending:
                with collector.fill(
                    level,
                    block,
                    linears,
                    batches,
                    float_block=float_block if mismatched else None,
                    float_linears=(
                        self._block_linears(prefix, float_block)
                        if mismatched and float_block is not None
                        else None
                    ),
                    float_batches=self._states.get(FLOAT, ()),
                ) as collected:
                    quantizer.quantize(prefix, collected, linears, pending)
            self._restore_weights(prefix, level.linears, linears)

    def _pending(self, prefix: str, level: Level) -> frozenset[str]:
        return frozenset(
            name for name in level.linears if not self._journal.has(f"{prefix}.{name}")
        )

    def _restore_weights(
        self, prefix: str, names: tuple[str, ...], linears: dict[str, nn.Module]
    ) -> None:
        for name in names:
            set_weight(linears[name], self._journal.read(f"{prefix}.{name}").dequantized)

    def _run(self, index: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """One block, or a copy of it, on a batch."""
        return self.stack.run(index, hidden.to(self._device), block)
