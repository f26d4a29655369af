"""The Helm chart, rendered: every combination of values that changes what there is."""

import itertools
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from chart import (
    BARE,
    CHART,
    CLEAR,
    KUBERNETES_VERSION,
    MUTUAL,
    TLS,
    Manifest,
    Rendered,
    autoscaling,
    environment,
    merge,
    render,
)

COMPONENTS: dict[str, dict[str, Any]] = {
    "both": {},
    "store": {"quantize": {"enabled": False}},
    "quantize": {"store": {"enabled": False}},
}
SECURITY: dict[str, dict[str, Any]] = {
    "clear": CLEAR,
    "tls": TLS,
    "mutual": MUTUAL,
    "bare": merge(TLS, BARE),
    "bare-mutual": merge(MUTUAL, BARE),
}
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
    for container in (*spec.get("initContainers", ()), *spec["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    for volume in spec.get("volumes", ()):
        (kind,) = volume.keys() - {"name"}
        assert kind in ("secret", "configMap", "emptyDir")


def mounts_of(container: Manifest) -> dict[str, str]:
    return {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", ())}


def check_edge(pod: Manifest, volumes: set[str]) -> None:
    """It outlives the server, has the only port for clients, and is ready when it listens."""
    (edge,) = pod["spec"]["initContainers"]
    assert edge["restartPolicy"] == "Always"
    assert mounts_of(edge).keys() == volumes
    (container,) = pod["spec"]["containers"]
    ports = [[port["containerPort"] for port in one["ports"]] for one in (edge, container)]
    assert ports == [[8470], [8471]]
    assert edge["readinessProbe"]["tcpSocket"] == {"port": 8470}
    # A busy Envoy that was restarted would cut every stream.
    assert "livenessProbe" not in edge
    assert "checksum/edge" in pod["metadata"]["annotations"]


def check_pod(pod: Manifest, values: dict[str, Any]) -> None:
    check_restricted(pod)
    (container,) = pod["spec"]["containers"]
    mounts = mounts_of(container)
    of_store = component(pod) == "store"
    volumes = {volume["name"] for volume in pod["spec"].get("volumes", ())}
    edge = "tls" in values and "edge" not in values
    at_the_edge = {"edge", "tls", "client-ca"} if edge else set()
    assert mounts.keys() == volumes - at_the_edge | ({"data"} if of_store else set())
    assert ("initContainers" in pod["spec"]) == edge
    if edge:
        check_edge(pod, volumes & (at_the_edge | {"run"}))

    variables = environment(pod)
    files = {
        "tls": ("CERTIQ_TLS_CERT", "CERTIQ_TLS_KEY"),
        "client-ca": ("CERTIQ_TLS_CLIENT_CA",),
        "tokens": ("CERTIQ_TOKEN_FILE",),
    }
    for volume, names in files.items():
        for name in names:
            assert (name in variables) == (volume in mounts)
            if volume in mounts:
                assert variables[name].startswith(mounts[volume] + "/")
    socket = f"unix:{mounts.get('run')}/server.sock"
    assert variables["CERTIQ_LISTEN"] == (socket if edge else "0.0.0.0:8470")
    assert (variables.get("CERTIQ_ALLOW_CLEARTEXT") == "true") == ("tls" not in values)
    # Set even where it is empty: the image has a default.
    assert variables["CERTIQ_DATA_DIR"] == ("/var/lib/certiq/store" * of_store)

    expected = "grpc" if "tls" not in values else "httpGet" if "client-ca" in mounts else "exec"
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
        kinds = ["ContainerResource"] * (settings.get("cpuUtilization") != 0)
        kinds += ["Pods"] * ("queueDepth" in settings)
        assert [metric["type"] for metric in scaler["spec"]["metrics"]] == kinds

    accounts = {m["metadata"]["name"] for m in rendered.all("ServiceAccount")} or {"theirs"}
    assert {pod["spec"]["serviceAccountName"] for pod in rendered.pods()} == accounts
    enabled = "metrics" in values
    for kind in ("ServiceMonitor", "PrometheusRule"):
        assert len(rendered.all(kind)) == enabled
    assert len(rendered.all("ConfigMap", "-dashboard")) == enabled
    edge = "tls" in values and "edge" not in values
    assert len(rendered.all("ConfigMap", "-edge")) == edge
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


def test_validation_would_find_a_mistake(helm: Path) -> None:
    pod = render(helm, CLEAR).one("Deployment")
    pod["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)
