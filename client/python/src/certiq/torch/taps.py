"""Hooks that deliver what linears read, once for all linears that read the same tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import nn

from certiq.torch.linears import features_of

# It is called with the name of a group's first linear and the rows [tokens, features] it reads.
Sink = Callable[[str, torch.Tensor], None]


class SharedInputError(RuntimeError):
    """Linears that read one tensor in the first call read different ones later."""


@dataclass
class InputGroup:
    """Linears that read the same tensor, named after the one that reads it first."""

    name: str
    features: int
    members: list[str] = field(default_factory=list)


class InputTap:
    """Watches the inputs of linears while it is entered.

    Which linears share an input is seen in the first call of each: q, k and v get the very same
    tensor. A group's rows go to the sink once, when its first linear reads them. Rows of padding
    are left out while `mask` is set.

    Not thread-safe: the model runs in one thread.
    """

    def __init__(
        self, linears: Mapping[str, nn.Module], sink: Sink, *, share_inputs: bool = True
    ) -> None:
        self.groups: dict[str, InputGroup] = {}
        # The mask [batch, positions] is true where a row counts; None: all of them do.
        self.mask: torch.Tensor | None = None
        self._linears = dict(linears)
        self._sink = sink
        self._share_inputs = share_inputs
        self._leader: dict[str, str] = {}
        # Each group has the tensor that its first linear read last.
        self._latest: dict[str, Seen] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> InputTap:
        for name, module in self._linears.items():
            self._handles.append(module.register_forward_pre_hook(self._hook_of(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._latest.clear()

    def _hook_of(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            self._read(name, module, arguments[0])

        return hook

    def _read(self, name: str, module: nn.Module, x: torch.Tensor) -> None:
        leader = self._leader.get(name)
        if leader is None:
            leader = self._find_leader(x) or name
            self._leader[name] = leader
            group = self.groups.setdefault(leader, InputGroup(leader, features_of(module)))
            group.members.append(name)
        if leader != name:
            latest = self._latest.get(leader)
            if latest is None or not latest.same(x):
                raise SharedInputError(
                    f"{name} read the same tensor as {leader} at first and another one later: "
                    "record them apart (share_inputs=False)"
                )
            return
        self._latest[name] = Seen(x)
        rows = self._counting_rows(x.detach())
        if rows.shape[0]:
            self._sink(name, rows)

    def _find_leader(self, x: torch.Tensor) -> str | None:
        if not self._share_inputs:
            return None
        for leader, seen in self._latest.items():
            if seen.same(x):
                return leader
        return None

    def _counting_rows(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.mask is None:
            return rows
        if self.mask.numel() != rows.shape[0]:
            # Experts read rows that were picked, of which padding cannot be told any more.
            return rows
        return rows[self.mask.reshape(-1).to(rows.device)]


class Seen:
    """A tensor that was read, held weakly."""

    def __init__(self, x: torch.Tensor) -> None:
        self._reference = weakref.ref(x)
        self._place = _place(x)

    def same(self, x: torch.Tensor) -> bool:
        seen = self._reference()
        return seen is not None and (seen is x or self._place == _place(x))


def _place(x: torch.Tensor) -> tuple[Any, ...]:
    version = 0 if x.is_inference() else x._version
    return (x.data_ptr(), x.shape, x.stride(), x.dtype, version)
