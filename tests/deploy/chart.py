"""Renders the chart and checks what comes out against Kubernetes' own schemas."""

import functools
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate
import kubernetes_validate.utils
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "certiq"
KUBERNETES_VERSION = "1.36"
# Known to the Prometheus operator, not to Kubernetes.
CUSTOM_KINDS = frozenset({"ServiceMonitor", "PrometheusRule"})

# Values that say how clients reach the servers, as every release must.
CLEAR = {"allowCleartext": True}
TLS = {"tls": {"secretName": "certificate"}}
MUTUAL = {"tls": {"secretName": "certificate", "clientCASecretName": "authority"}}
# The server ends TLS itself.
BARE = {"edge": {"enabled": False}}

Manifest = dict[str, Any]

# It reads all of Kubernetes' definitions again for every manifest, and changes none.
kubernetes_validate.utils.schema_contents = functools.cache(
    kubernetes_validate.utils.schema_contents
)


def merge(*parts: dict[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merge(merged[key], value) if both else value
    return merged


def autoscaling(**settings: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"quantize": {"autoscaling": {"enabled": True, **settings}}}


@dataclass(frozen=True)
class Rendered:
    manifests: list[Manifest]

    def one(self, kind: str, suffix: str = "") -> Manifest:
        """The only manifest of this kind whose name ends so."""
        found = self.all(kind, suffix)
        names = [m["metadata"]["name"] for m in self.all(kind)]
        assert len(found) == 1, f"{kind} ending in {suffix!r}: expected one of {names}"
        return found[0]

    def all(self, kind: str, suffix: str = "") -> list[Manifest]:
        return [
            m
            for m in self.manifests
            if m["kind"] == kind and m["metadata"]["name"].endswith(suffix)
        ]

    def pods(self) -> list[Manifest]:
        """The pod templates, the store's first."""
        return [m["spec"]["template"] for k in ("StatefulSet", "Deployment") for m in self.all(k)]


def template(
    helm: Path, values: Mapping[str, Any], *arguments: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(str(helm), "template", "release", str(CHART), "--namespace", "space"),
            *("--kube-version", f"{KUBERNETES_VERSION}.0", "--values", "-", *arguments),
        ],
        input=yaml.safe_dump(dict(values)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def render(helm: Path, values: Mapping[str, Any], *arguments: str) -> Rendered:
    """Whatever is rendered has passed Kubernetes' schemas, strictly."""
    done = template(helm, values, *arguments)
    assert done.returncode == 0, done.stderr
    manifests = [m for m in yaml.load_all(done.stdout, yaml.CSafeLoader) if m]
    for manifest in manifests:
        if manifest["kind"] not in CUSTOM_KINDS:
            kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    return Rendered(manifests)


def refusal(helm: Path, values: Mapping[str, Any]) -> str:
    done = template(helm, values)
    assert done.returncode != 0, "was rendered, expected it to be refused"
    return str(done.stderr)


def environment(pod: Manifest) -> dict[str, Any]:
    """Variables of the server's container: text, or where it comes from."""
    (container,) = pod["spec"]["containers"]
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}
