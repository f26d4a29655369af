"""metrics.k8s.io and custom.metrics.k8s.io, as an autoscaler reads them, with readings set by hand.

    metrics_api.py CERTIFICATE KEY READINGS PORT_FILE KUBECTL...

In a cluster these come from metrics-server and from an adapter of Prometheus; fake nodes have
nothing to measure. READINGS is a JSON file, read at each request:

    {"cpu_millicores": 1500, "custom": {"certiq_queue_depth": 3}}

Every pod that is asked for is said to have them. Serves HTTPS on a free port of the loopback.
"""

import http.server
import json
import ssl
import subprocess
import sys
import urllib.parse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESOURCE = "metrics.k8s.io/v1beta1"
CUSTOM = "custom.metrics.k8s.io/v1beta2"


def resources(version: str, name: str, kind: str) -> dict[str, Any]:
    """What discovery is answered."""
    entry = {"name": name, "singularName": "", "namespaced": True, "kind": kind, "verbs": ["get"]}
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version} | {
        "resources": [entry]
    }


class Handler(http.server.BaseHTTPRequestHandler):
    readings_file: Path
    kubectl: list[str]

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(url.query)
        selector = query.get("labelSelector", [""])[0]
        steps = url.path.strip("/").split("/")
        if url.path == f"/apis/{RESOURCE}":
            self.answer(resources(RESOURCE, "pods", "PodMetrics"))
        elif url.path == f"/apis/{CUSTOM}":
            self.answer(resources(CUSTOM, "pods/certiq_queue_depth", "MetricValueList"))
        elif steps[1:4:2] == [RESOURCE.split("/")[0], "namespaces"] and steps[5:] == ["pods"]:
            self.answer(self.usage(steps[4], selector))
        elif steps[1:4:2] == [CUSTOM.split("/")[0], "namespaces"] and len(steps) == 8:
            self.answer(self.custom(steps[4], selector, steps[7]))
        else:
            self.answer({"kind": "Status", "apiVersion": "v1", "code": 404}, 404)

    def readings(self) -> dict[str, Any]:
        readings: dict[str, Any] = json.loads(self.readings_file.read_text())
        return readings

    def pods(self, namespace: str, selector: str) -> list[str]:
        done = subprocess.run(
            [*self.kubectl, "get", "pods", "-n", namespace, "-l", selector, "-o", "name"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return [line.removeprefix("pod/") for line in done.stdout.split()]

    def usage(self, namespace: str, selector: str) -> dict[str, Any]:
        used = {"cpu": f"{self.readings()['cpu_millicores']}m", "memory": "1Gi"}
        items = [
            {
                "metadata": {"name": pod, "namespace": namespace},
                "timestamp": now(),
                "window": "15s",
                "containers": [{"name": "certiq-server", "usage": used}],
            }
            for pod in self.pods(namespace, selector)
        ]
        return {"kind": "PodMetricsList", "apiVersion": RESOURCE, "metadata": {}, "items": items}

    def custom(self, namespace: str, selector: str, metric: str) -> dict[str, Any]:
        value = str(self.readings()["custom"][metric])
        items = [
            {
                "describedObject": {"kind": "Pod", "namespace": namespace, "name": pod},
                "metric": {"name": metric},
                "timestamp": now(),
                "value": value,
            }
            for pod in self.pods(namespace, selector)
        ]
        return {"kind": "MetricValueList", "apiVersion": CUSTOM, "metadata": {}, "items": items}

    def answer(self, message: dict[str, Any], code: int = 200) -> None:
        body = json.dumps(message).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def main(certificate: str, key: str, readings: str, port_file: str, *kubectl: str) -> None:
    Handler.readings_file = Path(readings)
    Handler.kubectl = list(kubectl)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    ready = Path(port_file + ".tmp")
    ready.write_text(f"{server.server_port}\n")
    ready.rename(port_file)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
