"""Tables of results: rows of numbers, a few words, a way to draw them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Cell = str | int | float | None


@dataclass
class Table:
    name: str
    """The name of the CSV and the picture."""
    title: str
    columns: tuple[str, ...]
    text: str
    rows: list[tuple[Cell, ...]] = field(default_factory=list)
    draw: Callable[[Table, Any], None] | None = None
    """Draws onto a matplotlib figure."""

    def add(self, *cells: Cell) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"{self.name}: {len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(cells)

    def column(self, name: str, **where: Cell) -> list[Any]:
        """The cells of rows whose other columns have these values (underscores for spaces)."""
        at = self.columns.index(name)
        wanted = {self.columns.index(key.replace("_", " ")): value for key, value in where.items()}
        return [row[at] for row in self.rows if all(row[i] == v for i, v in wanted.items())]

    def values(self, name: str) -> list[Any]:
        """The distinct values of a column, in its order."""
        return list(dict.fromkeys(self.column(name)))

    def write_csv(self, folder: Path) -> None:
        with (folder / f"{self.name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows(self.rows)


def shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
