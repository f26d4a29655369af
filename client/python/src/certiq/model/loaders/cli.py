"""certiq-check-model: is this checkpoint whole, and which programs load it?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from certiq.model.errors import UsageError
from certiq.model.loaders.check import READERS, check_model


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="certiq-check-model",
        description="Checks a checkpoint folder by its configuration and its tensors' headers.",
        epilog="Exit status: 0 without errors, 1 with errors, 2 where nothing could be checked.",
    )
    p.add_argument("folder", type=Path, metavar="DIR", help="a checkpoint folder")
    p.add_argument(
        "--for",
        dest="readers",
        metavar="READER,...",
        help=f"readers that have to load it, of {', '.join(READERS)}; unset: whoever does",
    )
    p.add_argument("--json", action="store_true", help="everything as one JSON object")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    readers = arguments.readers.split(",") if arguments.readers is not None else None
    try:
        result = check_model(arguments.folder, readers)
    except (UsageError, OSError) as cause:
        print(f"certiq-check-model: {cause}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(result.as_json(), indent=1))
    else:
        for finding in result.findings:
            print(finding)
        loading = "; ".join(str(reader) for reader in result.loads_in)
        print(f"loads in: {loading or 'no reader that is known'}")
    return 0 if result.ok else 1
