"""deploy/prometheus: its files, its unit tests, and every alert fired by a cause of its own."""

import copy
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import certiq
import grpc
import numpy as np
import pytest
import yaml
from programs import SERVER, Server, environment, http_get, wait_until
from raw import refusal
from sums import made_up
from watching import FOLDER, RULES, Document, Prometheus, load, name_of, rules_of, tool
from work import big_job, calibrated, client_of, create, small, wait_state

UNIT_TESTS = FOLDER / "certiq.rules_test.yml"
ALERTS = [name_of(rule) for rule in rules_of(load(RULES)) if "alert" in rule]
PLACES = [
    (group, rule)
    for group, content in enumerate(load(RULES)["groups"])
    for rule in range(len(content["rules"]))
]


def promtool(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """What it said is all in stdout, in order."""
    return subprocess.run(
        [tool("promtool"), *arguments],
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )


# The files.


def test_configuration() -> None:
    done = promtool("check", "config", "--lint-fatal", str(FOLDER / "prometheus.yml"))
    assert done.returncode == 0, done.stdout


def test_unit_tests_of_the_rules() -> None:
    done = promtool("test", "rules", str(UNIT_TESTS))
    assert done.returncode == 0, done.stdout


def broken(rule: Document) -> list[str]:
    """Expressions that a rule should not be able to have without a unit test noticing."""
    never = f"({rule['expr']}) and on () vector(1) < 0"
    if "alert" in rule:
        return [never, "sum without () (up) >= 0 or certiq_jobs_total >= 0 or vector(1)"]
    return [never, f"2 * ({rule['expr']})"]


def only_tests_of(rule: Document) -> Document:
    """The unit tests that speak of a rule."""
    tests = load(UNIT_TESTS)
    speak = [test for test in tests["tests"] if name_of(rule) in yaml.safe_dump(test)]
    assert speak, name_of(rule)
    return tests | {"tests": speak}


def test_unit_tests_notice_every_rule_that_is_broken(tmp_path: Path) -> None:
    rules = load(RULES)
    mutants: dict[str, str] = {}
    for group, number in PLACES:
        original = rules["groups"][group]["rules"][number]
        for expression in broken(original):
            folder = tmp_path / str(len(mutants))
            folder.mkdir()
            changed = copy.deepcopy(rules)
            changed["groups"][group]["rules"][number]["expr"] = expression
            (folder / RULES.name).write_text(yaml.safe_dump(changed))
            tests = folder / UNIT_TESTS.name
            tests.write_text(yaml.safe_dump(only_tests_of(original)))
            mutants[str(tests)] = f"{name_of(original)}: {expression}"
    # All of them by one program, whose start would take longest.
    done = promtool("test", "rules", *mutants)
    output = done.stdout
    assert "parse error" not in output, output
    verdicts = dict(re.findall(r"^Unit Testing:\s+(\S+)\s+(SUCCESS|FAILED)", output, re.MULTILINE))
    assert verdicts.keys() == mutants.keys(), output
    assert [mutants[file] for file, verdict in verdicts.items() if verdict == "SUCCESS"] == []


def test_every_alert_says_what_it_means() -> None:
    guide = (FOLDER.parent / "monitoring.md").read_text()
    for rule in rules_of(load(RULES)):
        if "alert" in rule:
            assert rule["labels"]["severity"] in {"warning", "critical"}
            assert rule["annotations"].keys() == {"summary", "description"}
            assert f"`{name_of(rule)}`" in guide, "what to do is missing in deploy/monitoring.md"


def test_the_metrics_page_pleases_promtool(tmp_path: Path) -> None:
    server = Server(tmp_path / "server")
    try:
        page = http_get(server.metrics_port, "/metrics").text
    finally:
        assert server.stop() == 0
    done = promtool("check", "metrics", text=page)
    assert done.returncode == 0, done.stdout


# Every alert, fired by its cause.


def without_patience(rules: Document) -> None:
    """Alerts fire at once; half a second is long."""
    for rule in rules_of(rules):
        rule.pop("for", None)
        if rule.get("record") == "certiq:job_duration_seconds:target":
            rule["expr"] = "vector(0.5)"


@dataclass
class Scene:
    """Servers, each with a trouble of its own, and who watches them."""

    folder: Path
    prometheus: Prometheus
    servers: dict[str, Server]

    def start(self, name: str, *flags: str) -> Server:
        self.servers[name] = Server(self.folder / name, ["--workers", "1", *flags])
        return self.servers[name]

    def instance(self, name: str) -> str:
        return f"127.0.0.1:{self.servers[name].metrics_port}"


class StuckLog(Server):
    """Its log goes into a pipe that is full from some moment on, until it is emptied."""

    def __init__(self, folder: Path, flags: list[str]) -> None:
        folder.mkdir(parents=True)
        self.reader, self.writer = os.pipe()
        self.port_file = folder / "port"
        self.metrics_port_file = folder / "port.metrics"
        self.log_file = folder / "server.log"
        self.log_file.touch()
        command = [str(SERVER), "--listen", "127.0.0.1:0", "--metrics_listen", "127.0.0.1:0"]
        self.process = subprocess.Popen(
            [*command, "--data_dir", "", "--port_file", str(self.port_file), *flags],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.writer,
        )
        wait_until(self._is_ready, "the server writes its ports")
        self.port = int(self.port_file.read_text())
        self.metrics_port = int(self.metrics_port_file.read_text())

    def fill(self) -> None:
        os.set_blocking(self.writer, False)
        try:
            while True:
                os.write(self.writer, b"x" * 512)
        except BlockingIOError:
            os.set_blocking(self.writer, True)
            os.close(self.writer)

    def empty(self) -> None:
        """To the end of the pipe, which is the end of the server."""
        while os.read(self.reader, 1 << 16):
            pass
        os.close(self.reader)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("scene")
    prometheus = Prometheus(folder / "prometheus", without_patience)
    scene = Scene(folder, prometheus, {})
    stuck = None
    try:
        # Before there is anything to scrape.
        wait_until(lambda: prometheus.firing("CertiqAbsent") != [], "nothing is scraped")
        scene.start("well")
        scene.start("gone")
        scene.start("busy", "--queue_limit", "2")
        on_disk = ("--data_dir", str(folder / "poor_data"))
        scene.start("poor", "--memory_budget_bytes", str(16 << 20), *on_disk)
        scene.start("lambda")
        scene.start("damaged", "--data_dir", str(folder / "data"))
        stuck = StuckLog(folder / "stuck", ["--workers", "1", "--drain_seconds", "0"])
        scene.servers["stuck"] = stuck
        prometheus.targets(server.metrics_port for server in scene.servers.values())
        # Increases are seen from a first value on.
        for server in scene.servers.values():
            prometheus.scraped(server)
        stuck.fill()
        stuck.terminate()
        yield scene
    finally:
        prometheus.close()
        if stuck is not None and stuck.process.poll() is None:
            stuck.empty()
        for server in scene.servers.values():
            server.stop()


@dataclass
class Layer:
    """A made-up layer, and what is done with it."""

    spec: certiq.Spec = field(default_factory=lambda: certiq.Spec(bits=4))
    W: np.ndarray = field(init=False)
    X: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng(1)
        self.W = random.standard_normal((16, 32), dtype="<f4")
        self.X = random.standard_normal((128, 32), dtype="<f4")


def quantize_all(server: Server, layers: list[Layer]) -> list[grpc.StatusCode | None]:
    """How each call ended; None where well."""
    ended: list[grpc.StatusCode | None] = []
    with client_of(server) as client:
        for layer in layers:
            try:
                client.quantize(layer.W, layer.X, layer.spec)
                ended.append(None)
            except certiq.Error as error:
                ended.append(error.code)
    return ended


def twins(on_failure: str) -> Layer:
    """Two equal columns and no damping: a pivot of zero, in every attempt."""
    layer = Layer(certiq.Spec(bits=4, damping="absolute:0", max_attempts=1, on_failure=on_failure))
    layer.X[:, 1] = layer.X[:, 0]
    return layer


def outliers() -> Layer:
    """One weight of each row is a thousand times the others, on a feature that hardly fires."""
    layer = Layer()
    layer.W[:, 0] *= 1e3
    layer.X[:, 0] *= 1e-4
    return layer


def cause_nothing(_scene: Scene) -> None:
    """The fixture waited for it."""


def cause_instance_down(scene: Scene) -> None:
    scene.servers["gone"].process.kill()
    scene.servers["gone"].wait()


def cause_full_queue(scene: Scene) -> None:
    client = client_of(scene.servers["busy"])
    request = small(client) | {"deadline": 1}
    running = client.submit(**big_job(client))
    wait_state(running, "running")
    waiting = [client.submit(**request) for _ in range(2)]
    failed = refusal(lambda: client.submit(**request))
    assert failed.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    # They wait until their deadline, which is what jobs that take long look like.
    for job in waiting:
        assert job.wait().state == "expired"
    running.cancel()


def cause_no_memory(scene: Scene) -> None:
    client = client_of(scene.servers["poor"])
    # 32 MiB of sums do not fit 16.
    assert refusal(lambda: create(client, 2048)).code == grpc.StatusCode.RESOURCE_EXHAUSTED
    # A job that fits an empty server finds calibrations in its way.
    request = small(client, features=512, rows=64)
    wait_until(lambda: not fits(client), "calibrations fill the budget")
    client.submit(**request)


def fits(client: certiq.Client) -> bool:
    try:
        create(client, 256)
    except certiq.ResourceExhausted:
        return False
    return True


def cause_lambda_failures(scene: Scene) -> None:
    layers = [twins("fail"), twins("nearest"), outliers()]
    assert quantize_all(scene.servers["lambda"], layers) == [
        grpc.StatusCode.FAILED_PRECONDITION,
        None,
        None,
    ]


def cause_damage(scene: Scene) -> None:
    client = client_of(scene.servers["damaged"])
    random = np.random.default_rng(1)
    calibration = calibrated(client, made_up(random, "rank-0", 64, 32))
    before = set((scene.folder / "data" / "tensors").iterdir())
    W = random.standard_normal((16, 32)).astype("<f4")
    job = client.submit(W, calibration=calibration).wait()
    (result,) = set((scene.folder / "data" / "tensors").iterdir()) - before
    content = bytearray(result.read_bytes())
    content[len(content) // 2] ^= 4
    result.write_bytes(content)
    assert refusal(job.result).code == grpc.StatusCode.DATA_LOSS


CAUSES: dict[str, tuple[Callable[[Scene], None], str]] = {
    "CertiqAbsent": (cause_nothing, ""),
    "CertiqInstanceDown": (cause_instance_down, "gone"),
    "CertiqQueueNearLimit": (cause_full_queue, "busy"),
    "CertiqJobLatencyHigh": (cause_full_queue, ""),
    "CertiqBudgetExhausted": (cause_no_memory, "poor"),
    "CertiqJobsWaitForMemory": (cause_no_memory, "poor"),
    "CertiqLambdaFailures": (cause_lambda_failures, ""),
    "CertiqLambdaFallback": (cause_lambda_failures, ""),
    "CertiqJobsFailing": (cause_lambda_failures, ""),
    "CertiqErrorAboveTarget": (cause_lambda_failures, ""),
    "CertiqServerErrors": (cause_damage, "damaged"),
    # Its log is full since the fixture told it to end.
    "CertiqDrainStuck": (cause_nothing, "stuck"),
}


@pytest.fixture(scope="module")
def caused(scene: Scene) -> set[Callable[[Scene], None]]:
    """Causes that were set going; each is, once."""
    return set()


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_fires(scene: Scene, caused: set[Callable[[Scene], None]], alert: str) -> None:
    cause, culprit = CAUSES[alert]
    if cause not in caused:
        caused.add(cause)
        cause(scene)
    if alert == "CertiqAbsent":
        # It did, and is over.
        wait_until(lambda: scene.prometheus.firing(alert) == [], "servers are scraped")
        return
    wait_until(lambda: scene.prometheus.firing(alert) != [], f"{alert} fires")
    found = {labels.get("instance", "") for labels in scene.prometheus.firing(alert)}
    assert found == ({scene.instance(culprit)} if culprit else {""})


def test_nothing_fires_for_a_server_that_works(scene: Scene) -> None:
    well = scene.servers["well"]
    assert quantize_all(well, [Layer()] * 3) == [None] * 3
    scene.prometheus.scraped(well)
    instance = scene.instance("well")
    assert [
        labels
        for alert in ALERTS
        for labels in scene.prometheus.firing(alert)
        if labels.get("instance") == instance
    ] == []


def test_every_rule_is_evaluated(scene: Scene) -> None:
    groups = scene.prometheus.get("rules")["groups"]
    states = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
    assert states.keys() == {name_of(rule) for rule in rules_of(load(RULES))}
    assert set(states.values()) == {"ok"}
