"""The stack of equal blocks (decoder layers) that a transformer runs one after another.

The tools run a model block by block, so that one block is in memory at a time: `BlockStack.begin`
gives what the first block reads, `run` runs one, `finish` what the model makes of the last one's
output. Each model's own forward stays in charge of embeddings, masks, norms and head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from certiq.model.errors import UsageError
from certiq.torch.linears import is_linear


class _CapturedError(Exception):
    """Ends a forward whose block input is known."""


@dataclass(frozen=True)
class BlockCall:
    """The arguments that the model passes to a block beside the hidden states."""

    positional: tuple[Any, ...]
    keywords: dict[str, Any]


def find_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The outermost list of blocks that holds linears, and its name."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and not inside and _holds_linears(module):
            found.append((name, module))
    if not found:
        raise UsageError(f"{type(model).__name__}: no list of layers that holds linears")
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise UsageError(
            f"{type(model).__name__} has several lists of layers ({names}); "
            "models that are one stack (decoders, encoders) are supported"
        )
    return found[0]


def _holds_linears(blocks: nn.ModuleList) -> bool:
    return any(is_linear(module) for module in blocks.modules())


class BlockStack:
    """Runs a model's blocks one at a time.

    All but the blocks of the model must be loaded. Inputs are token ids [batch, positions] without
    padding. A block's other arguments (masks, rotary embeddings) depend on their shape alone and
    are kept by it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self.name, self.blocks = find_stack(model)
        self._calls: dict[tuple[int, ...], list[BlockCall]] = {}
        self._wraps: bool | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    def block_name(self, index: int) -> str:
        return f"{self.name}.{index}"

    @torch.no_grad()
    def learn(self, ids: torch.Tensor) -> None:
        """Finds out how a block returns its output. Call once, the first block being loaded."""
        hidden: list[Any] = []

        def capture(*positional: Any, **keywords: Any) -> Any:
            hidden.append((positional, keywords))
            raise _CapturedError

        with self._forwards(lambda index: capture), suppress(_CapturedError):
            self._forward(ids)
        positional, keywords = hidden[0]
        self._wraps = isinstance(self.blocks[0](*positional, **keywords), tuple)

    @torch.no_grad()
    def begin(self, ids: torch.Tensor) -> torch.Tensor:
        """The hidden states that the first block reads, [batch, positions, width]."""
        calls: list[BlockCall] = []
        first: list[torch.Tensor] = []

        def record(*positional: Any, **keywords: Any) -> Any:
            if positional:
                hidden, positional = positional[0], positional[1:]
            else:
                keywords = dict(keywords)
                hidden = keywords.pop("hidden_states")
            calls.append(BlockCall(positional, keywords))
            first.append(hidden)
            if len(calls) == len(self.blocks):
                # The output of the head is not needed.
                raise _CapturedError
            return self._wrap(hidden)

        with self._forwards(lambda index: record), suppress(_CapturedError):
            self._forward(ids)
        self._calls[tuple(ids.shape)] = calls
        return first[0]

    @torch.no_grad()
    def run(self, index: int, hidden: torch.Tensor, block: nn.Module | None = None) -> torch.Tensor:
        """One block's output for hidden states whose ids `begin` has seen the shape of; `block`
        stands in for the stack's own."""
        call = self._calls[tuple(hidden.shape[:2])][index]
        output = (block or self.blocks[index])(hidden, *call.positional, **call.keywords)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def finish(self, ids: torch.Tensor, hidden: torch.Tensor) -> Any:
        """The model's output, given what its last block returned."""
        last = len(self.blocks) - 1

        def forward_of(index: int) -> Callable[..., Any]:
            def passing(*positional: Any, **keywords: Any) -> Any:
                own = positional[0] if positional else keywords["hidden_states"]
                return self._wrap(hidden if index == last else own)

            return passing

        with self._forwards(forward_of):
            return self._forward(ids)

    def knows(self, shape: torch.Size | tuple[int, ...]) -> bool:
        return tuple(shape) in self._calls

    def _forward(self, ids: torch.Tensor) -> Any:
        arguments: dict[str, Any] = {"input_ids": ids}
        if getattr(self.model.config, "use_cache", None) is not None:
            arguments["use_cache"] = False
        return self.model(**arguments)

    def _wrap(self, hidden: torch.Tensor) -> Any:
        if self._wraps is None:
            raise AssertionError("BlockStack.learn comes first")
        return (hidden,) if self._wraps else hidden

    @contextmanager
    def _forwards(self, forward_of: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """Gives each block another forward for a while."""
        for index, block in enumerate(self.blocks):
            block.forward = forward_of(index)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward
