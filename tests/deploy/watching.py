"""A real Prometheus with the configuration of deploy/prometheus, on short intervals."""

import json
import math
import shutil
import subprocess
import urllib.parse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import DIRECT, ROOT, Server, wait_until

FOLDER = ROOT / "deploy" / "prometheus"
RULES = FOLDER / "certiq.rules.yml"
TICK = "500ms"

Document = dict[str, Any]
Labels = dict[str, str]


def tool(name: str) -> str:
    """A program of Debian's package prometheus."""
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"no {name} in PATH: bash deploy/install_packages.sh deploy")
    return found


def load(path: Path) -> Document:
    document = yaml.safe_load(path.read_text())
    assert isinstance(document, dict)
    return document


def rules_of(document: Document) -> list[Document]:
    return [rule for group in document["groups"] for rule in group["rules"]]


def name_of(rule: Document) -> str:
    name = rule.get("alert") or rule["record"]
    assert isinstance(name, str)
    return name


@dataclass(frozen=True)
class Series:
    labels: Labels
    value: float


class Prometheus:
    """Runs until closed. Which servers it scrapes is told by targets(), at any time."""

    def __init__(self, folder: Path, edit_rules: Callable[[Document], None] | None = None) -> None:
        folder.mkdir(parents=True)
        self._targets_file = folder / "targets.json"
        self.targets([])
        rules = load(RULES)
        if edit_rules is not None:
            edit_rules(rules)
        (folder / RULES.name).write_text(yaml.safe_dump(rules))
        config = load(FOLDER / "prometheus.yml")
        config["global"] |= {"scrape_interval": TICK, "evaluation_interval": TICK}
        (job,) = config["scrape_configs"]
        del job["static_configs"]
        job["file_sd_configs"] = [{"files": [str(self._targets_file)], "refresh_interval": "1s"}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._log_file = folder / "prometheus.log"
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    tool("prometheus"),
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    "--web.listen-address=127.0.0.1:0",
                    "--web.enable-lifecycle",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._port = 0
        wait_until(self._listens, "Prometheus listens")

    def _listens(self) -> bool:
        log = self._log_file.read_text(errors="replace")
        assert self._process.poll() is None, log
        for line in log.splitlines():
            if 'msg="Listening on"' in line:
                self._port = int(line.rpartition(":")[2].rstrip('"'))
        return self._port != 0 and "Server is ready to receive web requests" in log

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def targets(self, ports: Iterable[int]) -> None:
        """Replaces the servers that are scraped, by their metrics ports."""
        listed = json.dumps([{"targets": [f"127.0.0.1:{port}" for port in ports]}])
        new = self._targets_file.with_suffix(".new")
        new.write_text(listed)
        new.replace(self._targets_file)

    def get(self, path: str, **parameters: str) -> Any:  # noqa: ANN401
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with DIRECT.open(url, timeout=30) as answer:
            found = json.load(answer)
        assert found["status"] == "success", found
        return found["data"]

    def query(self, expression: str) -> list[Series]:
        """Now; NaN is no data."""
        data = self.get("query", query=expression)
        if data["resultType"] == "scalar":
            return [Series({}, float(data["result"][1]))]
        assert data["resultType"] == "vector", data
        found = [Series(one["metric"], float(one["value"][1])) for one in data["result"]]
        return [series for series in found if not math.isnan(series.value)]

    def scraped(self, server: Server, times: int = 2) -> None:
        """Waits until a server was scraped so often from now on."""
        instance = f"127.0.0.1:{server.metrics_port}"
        count = f'count_over_time(up{{instance="{instance}"}}[1h])'

        def scrapes() -> float:
            return sum(series.value for series in self.query(count))

        enough = scrapes() + times
        wait_until(lambda: scrapes() >= enough, f"{instance} is scraped")

    def firing(self, alert: str) -> list[Labels]:
        return [
            one["labels"]
            for one in self.get("alerts")["alerts"]
            if one["labels"]["alertname"] == alert and one["state"] == "firing"
        ]
