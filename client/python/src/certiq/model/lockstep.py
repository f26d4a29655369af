"""Forwards of many batches that advance together.

Each batch runs the model's own forward in a greenlet of its own, which is suspended where it has to
wait: in front of each block, until the block's weights are in memory, and in front of each linear
whose weight is not quantized yet, until the sums of what all batches read there have made one. So
every operation runs once, and whatever the model hands from one block to the next (masks, keys and
values, per-layer inputs) is that of the same batch. One thread runs all of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from certiq.model.errors import UsageError
from certiq.torch.linears import is_linear


@dataclass(frozen=True)
class AtBlock:
    """In front of a block, which has to be set, or behind the last one."""

    index: int


@dataclass(frozen=True)
class AtLevel:
    """In front of a linear of a level that is not quantized."""

    level: int


@dataclass(frozen=True)
class Finished:
    """Behind the head."""

    output: Any


Stop = AtBlock | AtLevel | Finished


class Forward(greenlet):
    """The model's forward on one batch of token ids [batch, positions] without padding."""

    def __init__(self, model: nn.Module, ids: torch.Tensor, stream: str) -> None:
        super().__init__(self._whole)
        self.stream = stream
        self.ids = ids
        self.stop: Stop | None = None
        """Where it waits; None before it has begun."""
        self.rows: dict[str, torch.Tensor] = {}
        """What linears of this block have read and nobody has taken, by the group's name."""
        self._model = model
        # What it goes on with, which may lie on disk while it waits.
        self._held: torch.Tensor | None = None
        self._parked: tuple[Path, int] | None = None

    def _whole(self) -> Finished:
        arguments: dict[str, Any] = {"input_ids": self.ids}
        if getattr(self._model.config.get_text_config(), "use_cache", None) is not None:
            arguments["use_cache"] = False
        return Finished(self._model(**arguments))

    def advance(self) -> Stop:
        """Runs it to the next place where it has to wait. UsageError where the model fails."""
        self._fetch()
        try:
            self.stop = self.switch()
        except (UsageError, KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:
            name = type(self._model).__name__
            at = f" behind block {self.stop.index}" if isinstance(self.stop, AtBlock) else ""
            raise UsageError(
                f"{name}: its forward with token ids alone fails{at}{self._too_long()}: "
                f"{type(error).__name__}: {str(error).strip() or 'without a message'}"
            ) from error
        assert self.stop is not None
        return self.stop

    def _too_long(self) -> str:
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        length = self.ids.shape[1]
        if not isinstance(positions, int) or length <= positions:
            return ""
        return f" on {length} tokens, more than its {positions} positions"

    def pause(self, stop: Stop, held: torch.Tensor | None = None) -> None:
        """Waits; `held` is the tensor that it goes on with, which may be parked meanwhile."""
        assert self.parent is not None
        self._held = held
        self.parent.switch(stop)
        self._held = None

    def park(self, file: Path) -> None:
        """Moves the tensor that it goes on with to a file; `advance` brings it back."""
        if self._held is None or self._parked is not None or self._held.device.type != "cpu":
            return
        storage = self._held.untyped_storage()
        size = storage.nbytes()
        if size == 0 or not storage.resizable():
            return
        try:
            with file.open("wb") as opened:
                opened.write(_octets(storage, size))
        except OSError as error:
            raise UsageError(f"{file}: cannot be written: {error}") from error
        self._parked = (file, size)
        # All views of it are empty until it is back.
        storage.resize_(0)

    def _fetch(self) -> None:
        if self._parked is None:
            return
        file, size = self._parked
        assert self._held is not None
        storage = self._held.untyped_storage()
        storage.resize_(size)
        with file.open("rb") as opened:
            if opened.readinto(_octets(storage, size)) != size:
                raise UsageError(f"{file}: is shorter than what was written to it")
        self._parked = None

    def end(self) -> None:
        """Gives up what it holds, if it is not finished."""
        self._parked = None
        if not self.dead and self.stop is not None:
            self.throw(GreenletExit)
        self.rows.clear()


def _octets(storage: torch.UntypedStorage, size: int) -> memoryview:
    """Its memory; numpy's view of it would forbid to resize it."""
    return memoryview((ctypes.c_char * size).from_address(storage.data_ptr()))


def running() -> Forward:
    own = getcurrent()
    assert isinstance(own, Forward)
    return own


def find_stack(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of blocks that token ids run through, and its name.

    It is the outermost list that holds linears. Where there are several (a model that sees, too),
    it is the one of the decoder.
    """
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and not inside and _holds_linears(module):
            found.append((name, module))
    if not found:
        raise UsageError(f"{type(model).__name__}: no list of layers that holds linears")
    if len(found) > 1:
        get = getattr(model, "get_decoder", None)
        decoder = get() if get is not None else None
        own = decoder if isinstance(decoder, nn.Module) and decoder is not model else None
        inner = [] if own is None else [m for m in own.modules() if isinstance(m, nn.ModuleList)]
        chosen = [(name, module) for name, module in found if any(module is m for m in inner)]
        if len(chosen) != 1:
            names = ", ".join(name for name, _ in found)
            raise UsageError(
                f"{type(model).__name__} has several lists of layers ({names}): expected one stack "
                "that token ids run through"
            )
        return chosen[0]
    return found[0]


def _holds_linears(blocks: nn.ModuleList) -> bool:
    # A list of linears themselves (Gemma 3n's altup_projections) is no stack of blocks.
    return any(
        is_linear(module) for block in blocks for module in block.modules() if module is not block
    )


class BlockStack:
    """The stack of a model, whose blocks are set one after another while forwards run.

    The model keeps its own blocks, without weights, and asks `set_block`'s for what they return.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.name, self.blocks = find_stack(model)
        self._index = -1
        self._of_stream: Callable[[str], nn.Module] | None = None
        self._repeats: Callable[[str], bool] = lambda stream: False

    def __len__(self) -> int:
        return len(self.blocks)

    def block_name(self, index: int) -> str:
        return f"{self.name}.{index}"

    def set_block(
        self,
        index: int,
        of_stream: Callable[[str], nn.Module],
        repeats: Callable[[str], bool] = lambda stream: False,
    ) -> None:
        """From here on block `index` is `of_stream(stream)`. Where `repeats(stream)` holds, a block
        runs twice: once to be read by its linears, and once they are quantized."""
        self._index = index
        self._of_stream = of_stream
        self._repeats = repeats

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Gives each block another forward for a while."""
        for index, block in enumerate(self.blocks):
            block.forward = self._forward_of(index)
        try:
            yield
        finally:
            for block in self.blocks:
                vars(block).pop("forward", None)

    def _forward_of(self, index: int) -> Callable[..., Any]:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            own = running()
            hidden = arguments[0] if arguments else keywords.get("hidden_states")
            own.pause(AtBlock(index), hidden if isinstance(hidden, torch.Tensor) else None)
            if self._of_stream is None or index != self._index:
                raise AssertionError(f"block {index} is not in memory, but {self._index}")
            block = self._of_stream(own.stream)
            if self._repeats(own.stream):
                block(*arguments, **keywords)
                own.pause(AtLevel(0))
            output = block(*arguments, **keywords)
            if index == len(self.blocks) - 1:
                # Not everyone needs the head's output.
                own.pause(AtBlock(index + 1))
            return output

        return forward
