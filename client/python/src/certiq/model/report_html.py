"""report.html: one file without scripts, to be opened anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from certiq.model.levels import pattern_of

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #1c2330; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid #c8ced8; }
td.n, th.n { text-align: right; }
code { font: .92em ui-monospace, monospace; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; }
.card { border: 1px solid #d5dae2; border-radius: .5rem; padding: .6rem 1rem; min-width: 9rem; }
.card b { display: block; font-size: 1.35rem; font-weight: 600; }
.card span { color: #5a6475; font-size: .87rem; }
.bar { fill: #3b6fb6; } .unseen { fill: #e08a2e; } .bound { stroke: #a3202c; stroke-width: 2; }
.axis { stroke: #c8ced8; } text { font: 11px ui-monospace, monospace; fill: #1c2330; }
.warn { color: #8a4b00; } .key { color: #5a6475; font-size: .87rem; }
.scroll { overflow-x: auto; }
"""

ROW_HEIGHT = 16
NAME_WIDTH = 330
PLOT_WIDTH = 640


def render(report: Mapping[str, Any], title: str) -> str:
    linears = report["linears"]
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        _cards(report),
        _evaluation(report["evaluation"]),
        _plan(report["plan"]),
        "<h2>Error against bound</h2>",
        "<p class=key>Blue: relative output error |X W^T - X~ Q^T| / |X W^T| on the calibration "
        "tokens. Orange: on held-out tokens. Red: the certificate's bound, never passed.</p>",
        f"<div class=scroll>{_bars(linears)}</div>",
        "<h2>Worst linears</h2>",
        _worst(linears, report["totals"]["worst"]),
        "<h2>λ and its failures</h2>",
        _damping(linears),
        _notes(linears),
        "<h2>Settings</h2>",
        _settings(report),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _cards(report: Mapping[str, Any]) -> str:
    totals, perplexity = report["totals"], report["perplexity"]
    cards = []
    if perplexity:
        cards.append((number(perplexity["float"], 5), "perplexity before"))
        cards.append((number(perplexity["quantized"], 5), "perplexity after"))
    cards += [
        (number(totals["bits_per_weight"]), "bits a weight, scales included"),
        (number(totals["mean_relative_error"], 3), "relative error (geometric mean)"),
        (number(totals["mean_held_out_relative_error"], 3), "the same on held-out tokens"),
        (str(totals["linears"]), "linears"),
        (f"{totals['weights'] / 1e6:.1f} M", "weights"),
        (str(totals["linears_with_stability_failures"]), "linears whose λ had to be raised"),
        (str(len(totals["fell_back_to_nearest"])), "fell back to plain rounding"),
        (f"{report['seconds']:.0f} s", "wall time"),
    ]
    inner = "".join(
        f"<div class=card><b>{escape(value)}</b><span>{escape(name)}</span></div>"
        for value, name in cards
    )
    return f"<div class=cards>{inner}</div>"


def _bars(linears: Sequence[Mapping[str, Any]]) -> str:
    limit = max(
        (
            value
            for item in linears
            for value in (
                item["relative_error"],
                item["relative_bound"] or 0.0,
                item["held_out_relative_error"] or 0.0,
            )
        ),
        default=0.0,
    )
    limit = limit or 1.0
    height = ROW_HEIGHT * len(linears) + 24
    width = NAME_WIDTH + PLOT_WIDTH + 90
    rows = [f"<svg width={width} height={height} role=img>"]
    for tick in range(5):
        x = NAME_WIDTH + PLOT_WIDTH * tick / 4
        rows.append(f"<line class=axis x1={x:.1f} x2={x:.1f} y1=14 y2={height} />")
        rows.append(f"<text x={x:.1f} y=10 text-anchor=middle>{limit * tick / 4:.3g}</text>")
    for index, item in enumerate(linears):
        y = 18 + ROW_HEIGHT * index
        name = escape(item["name"])
        error, bound = item["relative_error"], item["relative_bound"]
        unseen = item["held_out_relative_error"]
        rows.append(f"<text x={NAME_WIDTH - 6} y={y + 10} text-anchor=end>{name}</text>")
        rows.append(
            f"<rect class=bar x={NAME_WIDTH} y={y} height=7 width={_scaled(error, limit)}>"
            f"<title>{name}: error {number(error)}, bound {number(bound)}, "
            f"held out {number(unseen)}</title></rect>"
        )
        if unseen is not None:
            rows.append(
                f"<rect class=unseen x={NAME_WIDTH} y={y + 7} height=4 "
                f"width={_scaled(unseen, limit)} />"
            )
        if bound is not None:
            x = NAME_WIDTH + float(_scaled(bound, limit))
            rows.append(f"<line class=bound x1={x:.1f} x2={x:.1f} y1={y - 1} y2={y + 12} />")
        end = NAME_WIDTH + PLOT_WIDTH + 6
        rows.append(f"<text x={end} y={y + 10}>{number(error, 3)}</text>")
    rows.append("</svg>")
    return "".join(rows)


def _scaled(value: float, limit: float) -> str:
    return f"{PLOT_WIDTH * value / limit:.1f}"


def _table(head: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> str:
    """Columns are (name, is a number); cells are HTML already."""
    cells = "".join(f"<th{' class=n' if right else ''}>{name}</th>" for name, right in head)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=n' if right else ''}>{cell}</td>"
            for cell, (_, right) in zip(row, head, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f"<div class=scroll><table><tr>{cells}</tr>{body}</table></div>"


def _worst(linears: Sequence[Mapping[str, Any]], worst: Sequence[str]) -> str:
    by_name = {item["name"]: item for item in linears}
    rows = [
        [
            f"<code>{escape(name)}</code>",
            number(by_name[name]["relative_error"]),
            number(by_name[name]["held_out_relative_error"]),
            number(by_name[name]["relative_bound"]),
            number(by_name[name]["bound_tightness"], 3),
            str(by_name[name]["clipped_weights"]),
            str(by_name[name]["tokens"]),
        ]
        for name in worst
    ]
    head = [("linear", False), ("error", True), ("held out", True), ("bound", True)]
    return _table([*head, ("error / bound", True), ("clipped", True), ("tokens", True)], rows)


def _damping(linears: Sequence[Mapping[str, Any]]) -> str:
    failed = [item for item in linears if item["stability_failures"]]
    used = [item["lambda_used"] for item in linears if item["lambda_used"] is not None]
    text = ""
    if used:
        text = f"<p>λ used: {number(min(used), 3)} to {number(max(used), 3)}.</p>"
    if not failed:
        return text + "<p>No λ stability failures.</p>"
    rows = [
        [
            f"<code>{escape(item['name'])}</code>",
            number(item["lambda_requested"]),
            number(item["lambda_used"]),
            "<br>".join(
                escape(f"λ {number(attempt.get('lambda'))}: {attempt.get('cause')}")
                for attempt in item["stability_failures"]
            ),
        ]
        for item in failed
    ]
    head = [("linear", False), ("λ asked", True), ("λ used", True), ("failures", False)]
    return text + _table(head, rows)


def _notes(linears: Sequence[Mapping[str, Any]]) -> str:
    said = [
        (item["name"], text) for item in linears for text in (*item["notes"], *item["warnings"])
    ]
    if not said:
        return ""
    rows = [[f"<code>{escape(name)}</code>", escape(text)] for name, text in said]
    return "<h2>Notes</h2>" + _table([("linear", False), ("", False)], rows)


def _evaluation(evaluation: Mapping[str, Mapping[str, Any]]) -> str:
    if not evaluation:
        return ""
    rows = [
        [
            escape(text.replace("_", " ")),
            str(own["tokens"]),
            number(own["float"], 5),
            number(own["quantized"], 5),
            number(own.get("kl_divergence")),
            _percent(own.get("top1_agreement")),
            _percent(own.get("flips")),
        ]
        for text, own in evaluation.items()
    ]
    head = [("text", False), ("tokens", True), ("perplexity before", True), ("after", True)]
    head += [("KL to the float model, nats", True), ("the same first token", True)]
    return "<h2>On text</h2>" + _table([*head, ("flips", True)], rows)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _plan(plan: Mapping[str, Any]) -> str:
    """What stays float, and why: modules that are alike are one line."""
    left = Counter((pattern_of(name), reason) for name, reason in plan["stay_float"].items())
    rows = [
        [f"<code>{escape(pattern)}</code>", str(count), escape(reason)]
        for (pattern, reason), count in left.items()
    ]
    text = f"<p>{100 * plan['share_quantized']:.1f} % of the layers' weights are quantized.</p>"
    text += "".join(f"<p>{escape(warning)}</p>" for warning in plan["warnings"])
    head = [("stays float", False), ("modules", True), ("because", False)]
    return "<h2>Plan</h2>" + text + (_table(head, rows) if rows else "")


def _settings(report: Mapping[str, Any]) -> str:
    rows = [
        [escape(key), f"<code>{escape(str(value))}</code>"]
        for key, value in (
            *report["settings"].items(),
            *report["versions"].items(),
            ("float model", report["float_model"]),
            ("largest tensor-parallel degree", report["proof"]["tensor_parallel"]),
            ("memory at the peak", f"{report['peak_memory_bytes'] / 1e6:.0f} MB"),
            ("loads in", "; ".join(report["loads_in"]) or "no reader that is known"),
        )
    ]
    return _table([("", False), ("", False)], rows)
