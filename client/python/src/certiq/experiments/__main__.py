"""python -m certiq.experiments --server HOST:PORT --data DIR --output DIR"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from certiq import Client, Error
from certiq.experiments import checks, paper, report
from certiq.experiments.data import classification_head, real_layers
from certiq.experiments.tables import Table


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m certiq.experiments",
        description="Measures what the error analysis claims, on real layers, through a server.",
    )
    p.add_argument("--server", required=True, metavar="HOST:PORT")
    p.add_argument("--data", type=Path, required=True, help="smollm2-135m/ and minilm/ are there")
    p.add_argument("--output", type=Path, required=True)
    p.add_argument("--rows", type=int, default=192, help="of each weight; 0: all")
    p.add_argument("--seeds", type=int, default=64, help="of the Monte Carlo run")
    names = ("order", "rounding", "damping", "sensitivity", "statistics", "monte_carlo")
    p.add_argument("--only", action="append", choices=names, help="may be repeated")
    return p


def experiments(
    client: Client, data: Path, rows: int, seeds: int
) -> dict[str, Callable[[], Table]]:
    layers = real_layers(data, rows)
    head, labels = classification_head(data)
    return {
        "order": lambda: paper.order(client, layers),
        "rounding": lambda: paper.rounding(client, head, labels, max(1, seeds // 8)),
        "damping": lambda: paper.damping(client, layers),
        "sensitivity": lambda: checks.sensitivity(client, layers),
        "statistics": lambda: checks.statistics(client, layers),
        "monte_carlo": lambda: checks.monte_carlo(client, layers[0], seeds),
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        with Client(arguments.server, token=os.environ.get("CERTIQ_TOKEN")) as client:
            tables = []
            found = experiments(client, arguments.data, arguments.rows, arguments.seeds)
            for name, run in found.items():
                if arguments.only is None or name in arguments.only:
                    print(name, file=sys.stderr)
                    tables.append(run())
        rows = f"{arguments.rows} rows of each weight" if arguments.rows else "all rows"
        report.write(tables, arguments.output, f"Real layers, {rows}; {arguments.seeds} seeds.")
    except Error as error:
        print(f"certiq.experiments: {error}", file=sys.stderr)
        return 1
    except (OSError, ImportError) as error:
        print(f"certiq.experiments: {error}", file=sys.stderr)
        return 2
    print(arguments.output / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
