"""What the chart refuses, and that its values, its schema and its comments agree."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart import CHART, CLEAR, TLS, autoscaling, merge, refusal


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
            merge(CLEAR, {"edge": {"enabled": True}}),
            ["edge.enabled: expected auto or false where tls.secretName is not set"],
        ),
        (
            merge(TLS, {"edge": {"resources": {"limits": {"memory": None}}}}),
            ["edge.resources.limits.memory: expected to be set"],
        ),
        (merge(TLS, {"edge": {"enabled": "yes"}}), ["/edge/enabled"]),
        (merge(TLS, {"edge": {"maxConnections": 0}}), ["/edge/maxConnections"]),
        (merge(TLS, {"edge": {"image": {"tag": ""}}}), ["/edge/image/tag"]),
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
