"""What a check has to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]
ALL = "all"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a checkpoint, or that its user has to know."""

    severity: Severity
    reader: str
    """A program's name in the table of readers, or "all"."""
    where: str
    """The module, tensor or file that it is about."""
    text: str

    def __str__(self) -> str:
        reader = "" if self.reader == ALL else f"{self.reader}: "
        return f"{self.severity}: {reader}{self.where}: {self.text}"


def error(where: str, text: str) -> Finding:
    return Finding("error", ALL, where, text)


def warning(where: str, text: str) -> Finding:
    return Finding("warning", ALL, where, text)
