"""report.html and report.md, with a picture and a CSV for each table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from certiq.experiments.tables import Table, shown

STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
    "img{max-width:100%}table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "td,th{padding:.15rem .7rem .15rem 0;text-align:left}th{border-bottom:1px solid #ccc}"
)
# Tables with more rows than this are in the CSV alone.
MOST_ROWS = 48


def write(tables: Sequence[Table], output: Path, about: str) -> None:
    for table in tables:
        table.write_csv(output)
        _draw(table, output)
    (output / "report.md").write_text(_markdown(tables, about), encoding="utf-8")
    (output / "report.html").write_text(_html(tables, about), encoding="utf-8")


def _draw(table: Table, output: Path) -> None:
    if table.draw is None:
        return
    # Agg needs no display, whatever the user's settings say.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    table.draw(table, figure)
    figure.savefig(output / f"{table.name}.png", dpi=110)


def _markdown(tables: Sequence[Table], about: str) -> str:
    parts = ["# Experiments", "", about, ""]
    for table in tables:
        parts += [
            f"## {table.title}",
            "",
            table.text,
            "",
            f"![{table.title}]({table.name}.png)",
            "",
        ]
        parts += [f"Numbers: [{table.name}.csv]({table.name}.csv)", ""]
        if len(table.rows) <= MOST_ROWS:
            parts += [
                "| " + " | ".join(table.columns) + " |",
                "|" + "---|" * len(table.columns),
                *("| " + " | ".join(shown(cell) for cell in row) + " |" for row in table.rows),
                "",
            ]
    return "\n".join(parts)


def _html(tables: Sequence[Table], about: str) -> str:
    parts = [
        f"<!doctype html><meta charset=utf-8><title>Experiments</title><style>{STYLE}</style>",
        f"<h1>Experiments</h1><p>{escape(about)}</p>",
    ]
    for table in tables:
        parts.append(f"<h2>{escape(table.title)}</h2><p>{escape(table.text)}</p>")
        parts.append(f"<img src={table.name}.png alt='{escape(table.title)}'>")
        parts.append(f"<p><a href={table.name}.csv>{table.name}.csv</a></p>")
        if len(table.rows) <= MOST_ROWS:
            head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
            body = "".join(
                "<tr>" + "".join(f"<td>{escape(shown(cell))}</td>" for cell in row) + "</tr>"
                for row in table.rows
            )
            parts.append(f"<table><tr>{head}</tr>{body}</table>")
    return "\n".join(parts) + "\n"
