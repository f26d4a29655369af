"""Starts the server, runs the command line, reads the metrics page."""

import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BINARIES = Path(os.environ.get("CERTIQ_BIN_DIR", ROOT / "build" / "release" / "bin"))
SERVER = BINARIES / "certiq-server"
CERTIQ = BINARIES / "certiq"
# Bounds a wait for something that happens soon; no test measures time.
PATIENCE_SECONDS = 120.0

SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
# Loopback is never reached through a proxy.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Polls until the condition holds; fails if it never does."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {PATIENCE_SECONDS} s in vain: {what}")
        time.sleep(0.02)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours without settings of certiq, which tests make themselves."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("CERTIQ_")}
    return kept | dict(extra or {})


@dataclass(frozen=True)
class Response:
    status: int
    content_type: str
    text: str


def http_get(port: int, path: str) -> Response:
    url = f"http://127.0.0.1:{port}{path}"
    try:
        with DIRECT.open(url, timeout=PATIENCE_SECONDS) as answer:
            return Response(
                answer.status, answer.headers.get("Content-Type", ""), answer.read().decode()
            )
    except urllib.error.HTTPError as error:
        return Response(error.code, error.headers.get("Content-Type", ""), error.read().decode())


class Metrics:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.families = set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))
        self.samples: list[tuple[str, dict[str, str], float]] = []
        for line in text.splitlines():
            if line and not line.startswith("#"):
                match = SAMPLE.match(line)
                assert match, f"not a sample: {line!r}"
                name, labels, value = match.groups()
                self.samples.append((name, dict(LABEL.findall(labels or "")), float(value)))

    def sum(self, name: str, **labels: str) -> float:
        """The sum of all samples of this name whose labels include these; 0 without any."""
        return sum(
            value
            for sample, found, value in self.samples
            if sample == name and labels.items() <= found.items()
        )


def spawn_server(
    folder: Path,
    flags: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    *,
    embedded_defaults: bool = True,
    program: Path = SERVER,
) -> subprocess.Popen:
    """Starts a certiq-server whose ports and log go into the folder; waits for nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(program)]
    if embedded_defaults:
        defaults = {
            "--listen": "127.0.0.1:0",
            "--metrics_listen": "127.0.0.1:0",
            "--data_dir": "",
            "--port_file": str(folder / "port"),
        }
        for flag, value in defaults.items():
            if flag not in flags:
                command += [flag, value]
    with (folder / "server.log").open("wb") as log:
        return subprocess.Popen(
            [*command, *flags],
            env=environment(env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


class Server:
    """A certiq-server on free ports of the loopback; ready when constructed."""

    def __init__(
        self,
        folder: Path,
        flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        *,
        embedded_defaults: bool = True,
        program: Path = SERVER,
    ) -> None:
        self.port_file = folder / "port"
        self.metrics_port_file = folder / "port.metrics"
        self.log_file = folder / "server.log"
        self.process = spawn_server(
            folder, flags, env, embedded_defaults=embedded_defaults, program=program
        )
        try:
            wait_until(self._is_ready, f"{SERVER.name} writes its ports")
        except AssertionError:
            self.stop()
            raise
        self.port = int(self.port_file.read_text())
        self.metrics_port = int(self.metrics_port_file.read_text())

    def _is_ready(self) -> bool:
        status = self.process.poll()
        assert status is None, f"{SERVER.name} ended with {status}:\n{self.log()}"
        return all(
            file.is_file() and file.read_text().endswith("\n")
            for file in (self.port_file, self.metrics_port_file)
        )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def metrics(self) -> Metrics:
        response = http_get(self.metrics_port, "/metrics")
        assert response.status == 200
        return Metrics(response.text)

    def memory_bytes(self, line: str = "VmRSS") -> int:
        """Memory of the process as the kernel counts it: VmRSS now, VmHWM at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (found,) = re.findall(rf"^{line}:\s+(\d+) kB$", status, re.MULTILINE)
        return int(found) << 10

    def wait_idle(self) -> None:
        """Until nothing runs, waits or is held in memory for a client.

        Never where calibrations were used: what they share is kept as long as there is room.
        """

        def idle() -> bool:
            assert self.process.poll() is None, f"{SERVER.name} ended:\n{self.log()}"
            page = self.metrics()
            return all(
                page.sum(name) == 0
                for name in (
                    "certiq_memory_reserved_bytes",
                    "certiq_workers_busy",
                    "certiq_queue_depth",
                )
            )

        wait_until(idle, "the server gives back what it held")

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)

    def stop(self) -> int:
        """Ends it, by force if a request does not help; its exit status."""
        if self.process.poll() is None:
            self.terminate()
            try:
                return self.process.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


def run_server(*flags: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
    """For command lines that end by themselves."""
    return subprocess.run(
        [str(SERVER), *flags],
        env=environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def certiq(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
    """Runs the command line and returns what it said, whatever its exit status."""
    return subprocess.run(
        [str(CERTIQ), *arguments],
        env=environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
