"""Messages between the processes of a torch.distributed group; without it there is one process."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """The processes that fill the same calibrations."""

    def __init__(self, group: Any = None) -> None:
        self._together = dist.is_available() and dist.is_initialized()
        self._group = group
        self.rank = dist.get_rank(group) if self._together else 0
        self.count = dist.get_world_size(group) if self._together else 1

    def from_first(self, value: T) -> T:
        """Rank 0's value, on every rank. A collective call."""
        if self.count == 1:
            return value
        shared = [value]
        source = dist.get_global_rank(self._group, 0) if self._group is not None else 0
        dist.broadcast_object_list(shared, src=source, group=self._group)
        return shared[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank. A collective call."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values
