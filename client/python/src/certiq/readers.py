"""Who loads a result: the table proto/certiq/v1/readers.csv, which the server's certificates, the
certiq command and the documents have too.

    certiq.loads_in("gptq", bits=4, group_size=128)  # [Reader(name="GPTQModel", ...), ...]

`python -m certiq.readers` prints it as Markdown.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files


@dataclass(frozen=True)
class Reader:
    """A program that loads results of a format."""

    name: str
    versions: str
    """The releases that do, with what they need beside them."""
    checked: str
    """The day on which that was looked up or tried, YYYY-MM-DD."""
    note: str
    """What a user has to know or give; may be empty."""

    def __str__(self) -> str:
        return f"{self.name} {self.versions}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Line:
    """A line of the table: its lists as they stand there, "any" being no condition."""

    formats: tuple[str, ...]
    reader: Reader
    bits: str
    grids: str
    group_sizes: str
    group_order: str


@lru_cache
def lines() -> tuple[Line, ...]:
    """The table's lines, in its order."""
    text = files("certiq._proto").joinpath("readers.csv").read_text("utf-8")
    return tuple(
        Line(
            tuple(row["format"].split()),
            Reader(row["reader"], row["versions"], row["checked"], row["note"]),
            row["bits"],
            row["grids"],
            row["group_sizes"],
            row["group_order"],
        )
        for row in csv.DictReader(text.splitlines())
    )


def loads_in(
    format: str,
    *,
    bits: int = 4,
    symmetric: bool = True,
    group_size: int = 0,
    reordered_groups: bool = False,
) -> list[Reader]:
    """The readers that load such results, as a server of this version has them in
    Certificate.loads_in; empty where nobody is known to.

    `group_size` 0 is one scale a row. `reordered_groups`: groups that follow another order than the
    columns' (order="decreasing_norm" with group_scales="dynamic").
    """
    reordered = reordered_groups and group_size != 0
    return [
        line.reader
        for line in lines()
        if format in line.formats
        and _takes(line.bits, str(bits))
        and _takes(line.grids, "symmetric" if symmetric else "asymmetric")
        and _takes(line.group_sizes, str(group_size))
        and _takes(line.group_order, "reordered" if reordered else "columns")
    ]


def _takes(given: str, value: str) -> bool:
    return given == "any" or value in given.split()


def table() -> str:
    """The table as Markdown, for documents."""
    return "\n".join(_rows()) + "\n"


def _rows() -> Iterator[str]:
    yield "| format | loads in | bits | grid | group size | groups | as of |"
    yield "|---|---|---|---|---|---|---|"
    for line in lines():
        formats = ", ".join(f"`{name}`" for name in line.formats)
        groups = "of neighbouring columns" if line.group_order == "columns" else line.group_order
        yield (
            f"| {formats} | {line.reader} | {line.bits} | {line.grids} | {line.group_sizes} | "
            f"{groups} | {line.reader.checked} |"
        )


loads_in.__doc__ = f"{loads_in.__doc__}\n{table()}"

if __name__ == "__main__":
    print(table(), end="")
