"""Plots the queries of every panel of the dashboard, as Grafana would lay them out.

python picture.py OUTPUT.png, with matplotlib. Starts a server, clients and a Prometheus of its own.
"""

import argparse
import io
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, PercentFormatter
from PIL import Image
from programs import Server
from test_grafana import DASHBOARD, Panel, expanded
from traffic import Traffic
from watching import Prometheus

UNITS = {
    "s": EngFormatter("s"),
    "bytes": EngFormatter("B"),
    "Bps": EngFormatter("B/s"),
    "flops": EngFormatter("flop/s"),
    "short": EngFormatter(),
    "percentunit": PercentFormatter(1),
    "cps": EngFormatter("/s"),
}


def legend(template: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        template = template.replace(f"{{{{{name}}}}}", value)
    return template.strip()


def plot(axes: Axes, panel: Panel, prometheus: Prometheus, start: float, end: float) -> None:
    axes.set_title(panel["title"], fontsize=9, loc="left")
    drawn: list[tuple[str, list[float], list[float]]] = []
    for target in panel["targets"]:
        data = prometheus.get(
            "query_range", query=expanded(target["expr"]), start=str(start), end=str(end), step="1"
        )
        for series in data["result"]:
            times = [float(at) - start for at, _ in series["values"]]
            values = [float(value) for _, value in series["values"]]
            drawn.append((legend(target["legendFormat"], series["metric"]), times, values))
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if panel["type"] == "stat":
        axes.set_axis_off()
        value = drawn[0][2][-1]
        shown = f"{value:.0%}" if unit == "percentunit" else f"{value:,.0f}"
        axes.text(0.5, 0.4, shown, fontsize=20, ha="center", va="center", color="tab:green")
        return
    for name, times, values in drawn:
        axes.plot(times, values, linewidth=1, label=name)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=6)
    axes.grid(alpha=0.3)
    if unit in UNITS:
        axes.yaxis.set_major_formatter(UNITS[unit])
    # Lines at 0 need no names where others have some.
    handles, names = axes.get_legend_handles_labels()
    named = [
        (handle, name)
        for handle, name, (_, _, values) in zip(handles, names, drawn, strict=True)
        if max(values) > 0
    ]
    if named and named[0][1]:
        axes.legend(*zip(*named, strict=True), fontsize=5, ncols=2, frameon=False, loc="lower left")


def draw(output: Path, prometheus: Prometheus, start: float, end: float) -> None:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(16, bottom * 0.3), dpi=65)
    grid = figure.add_gridspec(bottom, 24, hspace=2, wspace=6)
    for panel in panels:
        place = panel["gridPos"]
        # A line for its title.
        rows = slice(place["y"] + (panel["type"] != "stat"), place["y"] + place["h"])
        columns = slice(place["x"], place["x"] + place["w"])
        plot(figure.add_subplot(grid[rows, columns]), panel, prometheus, start, end)
    for row in (panel for panel in DASHBOARD["panels"] if panel["type"] == "row"):
        axes = figure.add_subplot(grid[row["gridPos"]["y"], :])
        axes.set_axis_off()
        axes.text(0, 0.5, row["title"], fontsize=12, weight="bold", va="center")
    drawing = io.BytesIO()
    figure.savefig(drawing, bbox_inches="tight")
    # Few colours make a small file.
    with Image.open(drawing) as image:
        image.convert("RGB").quantize(64).save(output, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="certiq_picture_") as name:
        folder = Path(name)
        prometheus = Prometheus(folder / "prometheus")
        server = Server(folder / "server", ["--workers", "2", "--data_dir", str(folder / "data")])
        try:
            prometheus.targets([server.metrics_port])
            prometheus.scraped(server)
            start = time.time()
            with Traffic(server):
                time.sleep(options.seconds)
            draw(options.output, prometheus, start, time.time())
        finally:
            prometheus.close()
            server.stop()


if __name__ == "__main__":
    main()
