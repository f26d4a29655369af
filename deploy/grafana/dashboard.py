"""The dashboard as code: python dashboard.py > certiq.json, with grafana-foundation-sdk.

panels.py has what it shows; how that looks is here. certiq.json is what Grafana imports;
tests/deploy/test_grafana.py makes sure that it is what this makes, and runs every query of it.
"""

import sys

from grafana_foundation_sdk.builders import common as shared
from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as models
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
)
from panels import NUMBERS, ROWS, Panel


def source() -> DataSourceRef:
    return DataSourceRef(type_val="prometheus", uid="$datasource")


def targets(panel: Panel) -> list[prometheus.Dataquery]:
    return [
        prometheus.Dataquery()
        .expr(query.expression)
        .legend_format(query.legend)
        .ref_id(chr(ord("A") + number))
        for number, query in enumerate(panel.queries)
    ]


def number(panel: Panel) -> stat.Panel:
    built = (
        stat.Panel()
        .title(panel.title)
        .datasource(source())
        .unit(panel.unit)
        .height(4)
        .span(4)
        .graph_mode(models.BigValueGraphMode.AREA)
        .reduce_options(shared.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    steps = [Threshold(value=None, color="green")]
    if panel.limits is not None:
        yellow, red = panel.limits
        steps += [Threshold(value=yellow, color="yellow"), Threshold(value=red, color="red")]
    built.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    for target in targets(panel):
        built.with_target(target)
    return built


def graph(panel: Panel) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.about)
        .datasource(source())
        .unit(panel.unit)
        .min(0)
        .height(8)
        .span(6)
        .line_width(1)
        .fill_opacity(30 if panel.stacked else 10)
        .show_points(models.VisibilityMode.NEVER)
        .tooltip(
            shared.VizTooltipOptions()
            .mode(models.TooltipDisplayMode.MULTI)
            .sort(models.SortOrder.DESCENDING)
        )
        .legend(
            shared.VizLegendOptions()
            .display_mode(models.LegendDisplayMode.LIST)
            .placement(models.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
    )
    if panel.top is not None:
        built.max(panel.top)
    if panel.stacked:
        built.stacking(shared.StackingConfig().mode(models.StackingMode.NORMAL).group("A"))
    for target in targets(panel):
        built.with_target(target)
    return built


def variable(name: str, label: str, query: str, everything: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(source())
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(everything)
    )


def build() -> dashboard.Dashboard:
    made = (
        dashboard.Dashboard("certiq")
        .uid("certiq")
        .description("Quantization as a service: throughput, queue, latency, quality, λ, memory.")
        .tags(["certiq"])
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .refresh("30s")
        .time("now-3h", "now")
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
        )
        .with_variable(variable("job", "Job", "label_values(certiq_build_info, job)", "certiq.*"))
        .with_variable(
            variable(
                "instance",
                "Instance",
                'label_values(certiq_build_info{job=~"$job"}, instance)',
                ".*",
            )
        )
    )
    for panel in NUMBERS:
        made.with_panel(number(panel))
    for title, panels in ROWS:
        made.with_row(dashboard.Row(title))
        for panel in panels:
            made.with_panel(graph(panel))
    return made


def text() -> str:
    encoder = JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False)
    return f"{encoder.encode(build().build())}\n"


if __name__ == "__main__":
    sys.stdout.write(text())
