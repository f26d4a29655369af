"""deploy/grafana: every query of the dashboard, run against a Prometheus that watches a server."""

import importlib
import json
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from programs import ROOT, Server, wait_until
from traffic import Traffic
from watching import Prometheus

Panel = dict[str, Any]

FOLDER = ROOT / "deploy" / "grafana"
DASHBOARD = json.loads((FOLDER / "certiq.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [
    pytest.param(panel["title"], target["expr"], id=f"{panel['title']}-{target['refId']}")
    for panel in PANELS
    for target in panel["targets"]
]
# Where all is well these are 0: the rest of the dashboard has something to show under load.
MAY_BE_ZERO = {"Alerts firing", "Draining since"}
VARIABLES = {"$job": "certiq.*", "$instance": ".*", "$__rate_interval": "20s"}


def expanded(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """One that has scraped a server, and goes on while clients keep it busy."""
    folder = tmp_path_factory.mktemp("grafana")
    watching = Prometheus(folder / "prometheus")
    server = Server(folder / "server", ["--workers", "1", "--data_dir", str(folder / "data")])
    try:
        watching.targets([server.metrics_port])
        watching.scraped(server)
        with Traffic(server):
            yield watching
    finally:
        watching.close()
        assert server.stop() == 0, server.log()


def generator() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    return importlib.import_module("dashboard")


def test_the_file_is_what_the_code_makes() -> None:
    assert (FOLDER / "certiq.json").read_text() == generator().text()


def test_panels_have_titles_and_units_and_a_place_each() -> None:
    places = set()
    for panel in DASHBOARD["panels"]:
        assert panel["title"]
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in places, panel["title"]
                places.add((x, y))
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["targets"]
    assert max(x for x, _ in places) < 24


@pytest.mark.parametrize(("panel", "expression"), QUERIES)
def test_query_has_data(prometheus: Prometheus, panel: str, expression: str) -> None:
    query = expanded(expression)

    def shows() -> bool:
        now = time.time()
        data = prometheus.get(
            "query_range", query=query, start=str(now - 30), end=str(now), step="0.5"
        )
        values = [float(value) for series in data["result"] for _, value in series["values"]]
        numbers = [value for value in values if value == value]
        return any(value > 0 for value in numbers) or (panel in MAY_BE_ZERO and bool(numbers))

    wait_until(shows, f"{panel} has data: {query}")


@pytest.mark.parametrize("name", ["job", "instance"])
def test_variable_has_values(prometheus: Prometheus, name: str) -> None:
    (variable,) = (one for one in DASHBOARD["templating"]["list"] if one["name"] == name)
    family, _, label = variable["query"].removeprefix("label_values(")[:-1].rpartition(", ")
    found = prometheus.query(f"count by ({label}) ({expanded(family)})")
    assert [series.labels[label] for series in found] != [""]
    assert found
