"""Whether a checkpoint folder is whole, and who loads it: from configuration and headers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certiq.model.errors import UsageError
from certiq.model.loaders import integrity
from certiq.model.loaders.checkpoint import Checkpoint
from certiq.model.loaders.findings import ALL, Finding, error
from certiq.model.loaders.table import DENSE, LLAMA_CPP, RULES
from certiq.model.loaders.tensor_parallel import largest_of
from certiq.readers import Reader, lines, loads_in

READERS = tuple(dict.fromkeys([*(line.reader.name for line in lines()), LLAMA_CPP.name]))


@dataclass(frozen=True)
class CheckResult:
    """What was found in a folder."""

    findings: tuple[Finding, ...]
    loads_in: tuple[Reader, ...]
    """Those that load it, with versions and what a user has to give; none if it is damaged."""
    tensor_parallel: int
    """The most devices over which vLLM can split it."""

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def ok(self) -> bool:
        return not self.errors

    def as_json(self) -> dict[str, Any]:
        return {
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "loads_in": [str(reader) for reader in self.loads_in],
            "tensor_parallel": self.tensor_parallel,
        }


def check_model(folder: Path, readers: Sequence[str] | None = None) -> CheckResult:
    """Checks a folder of safetensors files for the readers of these names (in any case).

    Damage is an error in any event. What one reader alone does not take is an error if that reader
    was asked for; without `readers`, a warning as long as some other reader loads the folder.
    UsageError where there is no such folder or reader, or no checkpoint in it.
    """
    wanted = READERS if readers is None else [_reader(name) for name in readers]
    checkpoint = Checkpoint(folder)
    findings = list(integrity.check(checkpoint))
    whole = not any(finding.severity == "error" for finding in findings)
    loading: list[Reader] = []
    for name in wanted if checkpoint.understood else ():
        taken = _taken(checkpoint, name)
        own = list(_of_reader(checkpoint, name)) if _reads_format(checkpoint, name) else []
        if not taken:
            own = [finding for finding in own if finding.severity == "error"]
            own.append(Finding("error", name, "config.json", _not_taken(checkpoint, name)))
        if whole and not any(finding.severity == "error" for finding in own):
            loading += taken
        if readers is not None or _reads_format(checkpoint, name):
            findings += own
    if readers is None:
        findings = [
            dataclasses.replace(finding, severity="warning") if finding.reader != ALL else finding
            for finding in findings
        ]
        if whole and not loading:
            findings.append(error("config.json", "no reader is known to load it as it is"))
    return CheckResult(tuple(findings), tuple(loading), largest_of(checkpoint))


def _reader(name: str) -> str:
    for known in READERS:
        if known.lower() == name.strip().lower():
            return known
    raise UsageError(f"reader: expected some of {', '.join(READERS)}, got {name}")


def _of_reader(checkpoint: Checkpoint, name: str) -> Iterator[Finding]:
    for rule in RULES:
        if rule.reader == name and checkpoint.format in rule.formats:
            for where, text in rule.check(checkpoint):
                yield Finding(rule.severity, name, where, text)


def _taken(checkpoint: Checkpoint, name: str) -> list[Reader]:
    """The lines of the reader's that take each of the checkpoint's schemes; none if one is not."""
    if checkpoint.format is None or not _schemes(checkpoint):
        return []
    if name == LLAMA_CPP.name:
        return [LLAMA_CPP]
    found: list[Reader] = []
    for arguments in _schemes(checkpoint):
        own = [reader for reader in loads_in(checkpoint.format, **arguments) if reader.name == name]
        if not own:
            return []
        found += [reader for reader in own if reader not in found]
    return found


def _reads_format(checkpoint: Checkpoint, name: str) -> bool:
    return name == LLAMA_CPP.name or any(
        line.reader.name == name and checkpoint.format in line.formats for line in lines()
    )


def _not_taken(checkpoint: Checkpoint, name: str) -> str:
    if checkpoint.format is None or not _schemes(checkpoint):
        return "expected float or packed tensors, got none"
    if not _reads_format(checkpoint, name):
        formats = {form for line in lines() if line.reader.name == name for form in line.formats}
        return f"format: expected one of {', '.join(sorted(formats))}, got {checkpoint.format}"
    said = [
        f"bits {line.bits}, grid {line.grids}, group size {line.group_sizes}, groups in the order "
        f"{line.group_order}"
        for line in lines()
        if line.reader.name == name and checkpoint.format in line.formats
    ]
    bad = next(
        arguments
        for arguments in _schemes(checkpoint)
        if name not in {reader.name for reader in loads_in(checkpoint.format, **arguments)}
    )
    return f"expected {' or '.join(said)}; got {_described(bad)}"


def _described(arguments: dict[str, Any]) -> str:
    grid = "symmetric" if arguments["symmetric"] else "asymmetric"
    order = "reordered" if arguments["reordered_groups"] else "columns"
    return (
        f"bits {arguments['bits']}, grid {grid}, group size {arguments['group_size']}, groups in "
        f"the order {order}"
    )


def _schemes(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What the table of readers is asked for, once for each kind of packed module."""
    if checkpoint.format in DENSE:
        return [{}]
    found: list[dict[str, Any]] = []
    for module in checkpoint.modules.values():
        if module.scheme is None:
            continue
        arguments = {
            "bits": module.scheme.bits,
            "symmetric": module.scheme.symmetric,
            "group_size": module.scheme.group_size,
            "reordered_groups": module.name in checkpoint.reordered,
        }
        if arguments not in found:
            found.append(arguments)
    return found
