"""Pictures of the tables; each function draws onto a matplotlib figure."""

from __future__ import annotations

from typing import Any

import numpy as np

from certiq.experiments.tables import Table

NATURAL, NORM, UNSEEN, BOUND = "#8fa3bf", "#2f62a8", "#e08a2e", "#a3202c"


def _axes(figure: Any, table: Table) -> list[tuple[Any, str]]:
    """An axis for each layer."""
    names = table.values("layer")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name, fontsize=9)
    return list(zip(axes, names, strict=True))


def order(table: Table, figure: Any) -> None:
    for axis, name in _axes(figure, table):
        bits = table.values("bits")
        places = np.arange(len(bits))
        for shift, own, colour in ((-0.2, "natural", NATURAL), (0.2, "decreasing_norm", NORM)):
            errors = table.column("error", layer=name, order=own)
            axis.bar(places + shift, errors, 0.36, color=colour, label=f"error, {own}")
            bounds = table.column("bound", layer=name, order=own)
            axis.scatter(places + shift, bounds, marker="_", s=260, color=BOUND)
            unseen = table.column("unseen error", layer=name, order=own)
            axis.scatter(places + shift, unseen, s=14, color=UNSEEN, zorder=3)
        axis.set_xticks(places, [f"{value} bits" for value in bits])
        axis.set_yscale("log")
    figure.axes[0].legend(fontsize=7)
    figure.axes[0].set_ylabel("relative error; dots unseen, dashes bound", fontsize=8)


def rounding(table: Table, figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    bits = table.values("bits")
    for place, value in enumerate(bits):
        for axis, column in ((left, "largest error"), (right, "flips")):
            nearest = table.column(column, bits=value, rounding="nearest")
            scattered = table.column(column, bits=value, rounding="stochastic")
            axis.scatter([place] * len(scattered), scattered, s=16, color=NATURAL, zorder=2)
            axis.scatter([place], nearest, s=40, marker="D", color=NORM, zorder=3)
        bound = table.column("bound of the largest", bits=value, rounding="stochastic")
        left.scatter([place], [max(bound)], marker="_", s=400, color=BOUND)
    for axis in (left, right):
        axis.set_xticks(range(len(bits)), [f"{value} bits" for value in bits])
    left.set_yscale("log")
    left.set_title("largest error; dashes: bound (stochastic)", fontsize=9)
    right.set_title("flips of the best class, unseen tokens", fontsize=9)
    left.scatter([], [], color=NATURAL, label="stochastic")
    left.scatter([], [], color=NORM, marker="D", label="nearest")
    left.legend(fontsize=8)


def damping(table: Table, figure: Any) -> None:
    for axis, name in _axes(figure, table):
        x = table.column("lambda / (trace / N)", layer=name)
        for column, colour in (("error", NORM), ("unseen error", UNSEEN), ("bound", BOUND)):
            axis.plot(x, table.column(column, layer=name), color=colour, label=column, marker=".")
        threshold = table.column("stable from", layer=name)[0]
        if threshold is not None:
            axis.axvline(threshold, color="black", linestyle=":", label="stable from")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("lambda / (trace / N)", fontsize=8)
    figure.axes[0].legend(fontsize=7)


def sensitivity(table: Table, figure: Any) -> None:
    for axis, name in _axes(figure, table):
        for column, colour in (("error", NORM), ("unseen error", UNSEEN)):
            tokens = table.column("tokens", layer=name)
            axis.scatter(tokens, table.column(column, layer=name), s=18, color=colour, label=column)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("calibration tokens", fontsize=8)
    figure.axes[0].legend(fontsize=7)


def statistics(table: Table, figure: Any) -> None:
    for axis, name in _axes(figure, table):
        kinds = table.values("type")
        places = np.arange(len(kinds))
        for shift, column, colour in ((-0.2, "error", NORM), (0.2, "unseen error", UNSEEN)):
            values = table.column(column, layer=name)
            axis.bar(places + shift, values, 0.36, color=colour, label=column)
        axis.set_xticks(places, kinds)
    figure.axes[0].legend(fontsize=7)


def monte_carlo(table: Table, figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    largest = table.column("largest error")
    left.hist(largest, bins=20, color=NORM)
    left.axvline(max(table.column("bound")), color=BOUND, label="bound")
    left.set_xlim(left=0)
    left.set_title("largest error", fontsize=9)
    left.legend(fontsize=8)
    seeds = np.asarray(table.column("seed")) + 1
    right.plot(seeds, table.column("bias"), color=NORM, label="measured")
    right.plot(seeds, 1 / np.sqrt(seeds), color="black", linestyle=":", label="1 / sqrt(seeds)")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_title("distance of the mean from W", fontsize=9)
    right.legend(fontsize=8)
