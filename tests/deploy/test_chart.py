"""The Helm chart, rendered: every combination of values that changes what there is."""

import itertools
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from chart import CHART, KUBERNETES_VERSION, ROOT, Manifest, Rendered, environment, refusal, render
from programs import SERVER, Server

CLEAR = {"allowCleartext": True}
TLS = {"tls": {"secretName": "certificate"}}
MUTUAL = {"tls": {"secretName": "certificate", "clientCASecretName": "authority"}}
GIB = 1 << 30


def merge(*parts: dict[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merge(merged[key], value) if both else value
    return merged


def autoscaling(**settings: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"quantize": {"autoscaling": {"enabled": True, **settings}}}


COMPONENTS: dict[str, dict[str, Any]] = {
    "both": {},
    "store": {"quantize": {"enabled": False}},
    "quantize": {"store": {"enabled": False}},
}
SECURITY: dict[str, dict[str, Any]] = {"clear": CLEAR, "tls": TLS, "mutual": MUTUAL}
SCALING: dict[str, dict[str, Any]] = {
    "fixed": {},
    "cpu": autoscaling(),
    "queue": autoscaling(cpuUtilization=0, queueDepth=4),
    "cpu+queue": autoscaling(queueDepth=2.5),
}
# Switched on in turn, so that each meets each of the above.
EXTRAS: tuple[dict[str, Any], ...] = (
    {},
    {"tokens": {"secretName": "tokens"}, "imagePullSecrets": [{"name": "registry"}]},
    {
        "metrics": {
            "serviceMonitor": {"enabled": True},
            "prometheusRule": {"enabled": True},
            "dashboard": {"enabled": True},
        },
        "serviceAccount": {"create": False, "name": "theirs"},
    },
    {
        "store": {"podDisruptionBudget": {"enabled": True}, "service": {"type": "LoadBalancer"}},
        "quantize": {"service": {"type": "NodePort", "headless": False}},
        "networkPolicy": {"enabled": False},
        "extraEnv": [{"name": "GRPC_VERBOSITY", "value": "ERROR"}],
    },
    {
        "networkPolicy": {
            "clients": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
            "metrics": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
        },
        "store": {
            "resources": {"limits": {"cpu": "4"}},
            "nodeSelector": {"disk": "fast"},
            "tolerations": [{"key": "quantization", "operator": "Exists"}],
            "persistence": {"storageClass": "block", "accessMode": "ReadWriteOncePod"},
        },
        "quantize": {"podAnnotations": {"a": "b"}, "podDisruptionBudget": {"enabled": False}},
        "podLabels": {"team": "a"},
    },
)


def combinations() -> list[Any]:
    cases = itertools.product(COMPONENTS, SECURITY, SCALING)
    return [
        pytest.param(
            merge(COMPONENTS[part], SECURITY[security], SCALING[scaling], EXTRAS[i % len(EXTRAS)]),
            id=f"{part}-{security}-{scaling}-{i % len(EXTRAS)}",
        )
        for i, (part, security, scaling) in enumerate(cases)
    ]


def component(pod: Manifest) -> str:
    return str(pod["metadata"]["labels"]["app.kubernetes.io/component"])


def check_selectors(rendered: Rendered) -> None:
    """What selects pods selects the pods that it is meant for, and no others."""
    labels = {component(pod): pod["metadata"]["labels"] for pod in rendered.pods()}
    for manifest in rendered.manifests:
        spec = manifest.get("spec", {})
        selector = {
            "Service": spec.get("selector"),
            "PodDisruptionBudget": spec.get("selector", {}).get("matchLabels"),
            "StatefulSet": spec.get("selector", {}).get("matchLabels"),
            "Deployment": spec.get("selector", {}).get("matchLabels"),
            "NetworkPolicy": spec.get("podSelector", {}).get("matchLabels"),
        }.get(manifest["kind"])
        if selector is None:
            continue
        of_all = manifest["kind"] == "NetworkPolicy" or manifest["metadata"]["name"].endswith(
            "-metrics"
        )
        of_one = manifest["metadata"]["labels"].get("app.kubernetes.io/component")
        expected = set(labels) if of_all else {of_one}
        assert {c for c, have in labels.items() if selector.items() <= have.items()} == expected


def check_restricted(pod: Manifest) -> None:
    """The rules of Kubernetes' pod security standard "restricted", and a read-only root."""
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    assert spec["automountServiceAccountToken"] is False
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    for volume in spec.get("volumes", ()):
        assert volume.keys() - {"name"} == {"secret"}


def check_pod(pod: Manifest, values: dict[str, Any]) -> None:
    check_restricted(pod)
    (container,) = pod["spec"]["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", ())}
    of_store = component(pod) == "store"
    volumes = {volume["name"] for volume in pod["spec"].get("volumes", ())}
    assert mounts.keys() == volumes | ({"data"} if of_store else set())

    variables = environment(pod)
    files = {
        "tls": ("CERTIQ_TLS_CERT", "CERTIQ_TLS_KEY"),
        "client-ca": ("CERTIQ_TLS_CLIENT_CA",),
        "tokens": ("CERTIQ_TOKEN_FILE",),
    }
    for volume, names in files.items():
        for name in names:
            assert (name in variables) == (volume in volumes)
            if volume in volumes:
                assert variables[name].startswith(mounts[volume] + "/")
    assert (variables.get("CERTIQ_ALLOW_CLEARTEXT") == "true") == ("tls" not in values)
    # Set even where it is empty: the image has a default.
    assert variables["CERTIQ_DATA_DIR"] == ("/var/lib/certiq/store" * of_store)

    expected = "grpc" if "tls" not in values else "httpGet" if "client-ca" in volumes else "exec"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert {"grpc", "httpGet", "exec"} & container[probe].keys() == {expected}
        # --probe has a limit of its own, 5 s.
        assert container[probe]["timeoutSeconds"] > 5

    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = float(variables["CERTIQ_DRAIN_SECONDS"])
    assert pod["spec"]["terminationGracePeriodSeconds"] >= sleep + drain + 10


@pytest.mark.parametrize("values", combinations())
def test_every_combination_is_valid_and_hangs_together(helm: Path, values: dict[str, Any]) -> None:
    rendered = render(helm, values)
    names = [(m["kind"], m["metadata"]["name"]) for m in rendered.manifests]
    assert len(names) == len(set(names))
    check_selectors(rendered)
    for pod in rendered.pods():
        check_pod(pod, values)
    parts = [part for part in ("store", "quantize") if values.get(part, {}).get("enabled", True)]
    assert [component(pod) for pod in rendered.pods()] == parts
    assert len(rendered.all("Service")) == len(parts) + 1

    scaled = "quantize" in parts and "autoscaling" in values.get("quantize", {})
    assert len(rendered.all("HorizontalPodAutoscaler")) == scaled
    for deployment in rendered.all("Deployment"):
        # The autoscaler's number would be set back by every upgrade.
        assert ("replicas" in deployment["spec"]) != scaled
    for scaler in rendered.all("HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]["name"]
        assert rendered.one(scaler["spec"]["scaleTargetRef"]["kind"])["metadata"]["name"] == target
        settings = values["quantize"]["autoscaling"]
        kinds = ["Resource"] * (settings.get("cpuUtilization") != 0)
        kinds += ["Pods"] * ("queueDepth" in settings)
        assert [metric["type"] for metric in scaler["spec"]["metrics"]] == kinds

    accounts = {m["metadata"]["name"] for m in rendered.all("ServiceAccount")} or {"theirs"}
    assert {pod["spec"]["serviceAccountName"] for pod in rendered.pods()} == accounts
    enabled = "metrics" in values
    for kind in ("ServiceMonitor", "PrometheusRule", "ConfigMap"):
        assert len(rendered.all(kind)) == enabled
    assert len(rendered.all("NetworkPolicy")) == (values.get("networkPolicy") != {"enabled": False})


@pytest.mark.parametrize("security", [CLEAR, TLS], ids=["clear", "tls"])
def test_lint(helm: Path, security: dict[str, Any], tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(security))
    done = subprocess.run(
        [str(helm), "lint", "--strict", "--values", str(values), str(CHART)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 chart(s) linted, 0 chart(s) failed" in done.stdout


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            merge(CLEAR, {"store": {"replicas": 2}}),
            ["store.replicas: expected 0 or 1, got 2", "replicas do not share one yet"],
        ),
        (
            merge(CLEAR, {"store": {"enabled": False}, "quantize": {"enabled": False}}),
            ["store.enabled and quantize.enabled: expected at least one"],
        ),
        ({}, ["tls.secretName: expected", "allowCleartext=true"]),
        (merge(CLEAR, TLS), ["allowCleartext: expected false"]),
        (
            merge(CLEAR, {"tls": {"clientCASecretName": "a"}}),
            ["tls.clientCASecretName", "expected tls.secretName"],
        ),
        (merge(TLS, {"probes": {"type": "grpc"}}), ["probes.type: expected auto, exec or http"]),
        (
            merge(CLEAR, autoscaling(minReplicas=3, maxReplicas=2)),
            ["maxReplicas: expected minReplicas (3) or more, got 2"],
        ),
        (
            merge(CLEAR, autoscaling(cpuUtilization=0)),
            ["expected cpuUtilization or queueDepth to be above 0"],
        ),
        (
            merge(
                CLEAR,
                autoscaling(),
                {"quantize": {"workers": 2, "resources": {"requests": {"cpu": None}}}},
            ),
            ["quantize.resources.requests.cpu: expected to be set"],
        ),
        (
            merge(CLEAR, {"store": {"resources": {"limits": {"memory": None}}}}),
            ["store.resources.limits.memory: expected to be set"],
        ),
        (
            merge(CLEAR, {"store": {"resources": {"requests": {"cpu": None}}}}),
            ["store.workers: expected more than 0"],
        ),
        (
            merge(CLEAR, {"quantize": {"service": {"type": "LoadBalancer"}}}),
            ["quantize.service.headless: expected false", "LoadBalancer"],
        ),
        (
            merge(CLEAR, {"serviceAccount": {"create": False, "annotations": {"a": "b"}}}),
            ["serviceAccount.annotations: expected none"],
        ),
        # The schema's part.
        (merge(CLEAR, {"store": {"replica": 1}}), ["/store", "replica"]),
        (merge(CLEAR, {"store": {"replicas": -1}}), ["/store/replicas"]),
        (
            merge(CLEAR, {"quantize": {"resources": {"limits": {"memory": "8 GB"}}}}),
            ["/quantize/resources/limits/memory"],
        ),
        # As values files are read, a number becomes floating-point.
        (
            merge(CLEAR, {"quantize": {"resources": {"limits": {"memory": 8589934592}}}}),
            ["/quantize/resources/limits/memory", "want string"],
        ),
        (merge(CLEAR, {"memoryBudgetFraction": 1}), ["/memoryBudgetFraction"]),
        (merge(CLEAR, {"image": {"digest": "sha256:abc"}}), ["/image/digest"]),
        (merge(CLEAR, {"probes": {"type": "tcp"}}), ["/probes/type"]),
        (
            merge(CLEAR, {"store": {"persistence": {"accessMode": "ReadWriteMany"}}}),
            ["/store/persistence/accessMode"],
        ),
        (
            merge(CLEAR, {"extraEnv": [{"name": "CERTIQ_DRAIN_SECONDS", "value": "5"}]}),
            ["/extraEnv/0/name"],
        ),
        (merge(CLEAR, {"drain": {"delaySeconds": 0}}), ["/drain/delaySeconds"]),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(
    helm: Path, values: dict[str, Any], words: list[str]
) -> None:
    said = refusal(helm, values).replace("'", "")
    for word in words:
        assert word in said


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
    assert calls == {"from": [{"podSelector": {}}], "ports": [{"port": "grpc"}]}
    assert scrapes == {"from": [{"namespaceSelector": {}}], "ports": [{"port": "metrics"}]}


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


def test_version_is_the_servers() -> None:
    project = (ROOT / "CMakeLists.txt").read_text()
    (version,) = re.findall(r"^project\(certiq VERSION (\S+)", project, re.MULTILINE)
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == version


def known_values(schema: dict[str, Any], path: str = "") -> set[str]:
    properties = schema.get("properties")
    if properties is None or schema.get("additionalProperties") is not False:
        return {path}
    return set().union(*(known_values(s, f"{path}/{name}") for name, s in properties.items()))


def lacks(values: dict[str, Any], path: str) -> bool:
    at: Any = values
    for step in path.strip("/").split("/"):
        if not isinstance(at, dict) or step not in at:
            return True
        at = at[step]
    return False


def test_every_value_of_the_schema_is_in_the_values_file() -> None:
    """The other way round is helm's: it holds values.yaml to the schema."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    missing = {path for path in known_values(schema) if lacks(values, path)}
    # Every subset of these is left to the user.
    resources = {path for path in missing if "/resources/" in path}
    assert missing - resources == {"/global"}


def test_validation_would_find_a_mistake(helm: Path) -> None:
    pod = render(helm, CLEAR).one("Deployment")
    pod["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)


def flags_of_the_server() -> set[str]:
    said = subprocess.run(
        [str(SERVER), "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    return set(re.findall(r"--(\w+)", said))


def test_real_server_starts_with_the_charts_environment(helm: Path, tmp_path: Path) -> None:
    """Every variable is a flag of the server's, and means what the chart takes it to mean."""
    tokens = {"tokens": {"secretName": "tokens"}}
    flags = flags_of_the_server()
    everything = render(helm, merge(MUTUAL, tokens)).pods() + render(helm, CLEAR).pods()
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
