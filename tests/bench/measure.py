"""Runs the peers and engine_bench, one at a time, and reads what they report."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
PEERS = ROOT / "build" / "peers"
REQUIREMENTS = FOLDER / "peers-requirements.txt"
SHAPE = re.compile(r"(\d+)x(\d+)")


class MeasurementError(RuntimeError):
    """What a program said when it could not be measured."""


@dataclass(frozen=True)
class Shape:
    rows: int
    features: int

    @classmethod
    def parse(cls, text: str) -> Self:
        match = SHAPE.fullmatch(text)
        if not match:
            raise ValueError(f"expected ROWSxFEATURES, got {text}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.rows}x{self.features}"


def tail(path: Path, lines: int = 10) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def peers_python() -> Path:
    """Makes the peers' virtual environment; again when what it is made of changes."""
    python = PEERS / "bin" / "python"
    made_from = PEERS / "made_from"
    wanted = f"{REQUIREMENTS.read_text()}{sys.version}\n{PEERS}\n"
    if python.is_file() and made_from.is_file() and made_from.read_text() == wanted:
        return python
    print(f"making {PEERS} (6 GB)", file=sys.stderr)
    shutil.rmtree(PEERS, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", PEERS], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "--requirement", REQUIREMENTS], check=True)
    made_from.write_text(wanted)
    return python


class Peer:
    """A process of peers.py, stopped by a signal except while it answers.

    Torch's threads spin for a while after each parallel loop, unless the wait policy is passive;
    a stopped process disturbs nobody, whatever its policy.
    """

    def __init__(self, python: Path, name: str, passive: bool, threads: int) -> None:
        self.name = name
        self.passive = passive
        self._log = PEERS / f"{self.label.replace(' ', '-')}.log"
        environment = dict(os.environ) | {"OMP_NUM_THREADS": str(threads)}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}
        if not passive:
            del environment["OMP_WAIT_POLICY"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, FOLDER / "peers.py", name, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        self.torch = self._answer()["torch"]
        self._process.send_signal(signal.SIGSTOP)

    @property
    def label(self) -> str:
        return f"{self.name} passive" if self.passive else self.name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise MeasurementError(f"{self.label} ended:\n{tail(self._log)}")
        return json.loads(line)

    def measure(self, shape: Shape, tokens: int) -> dict:
        """What peers.py answers."""
        assert self._process.stdin
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(asdict(shape) | {"tokens": tokens}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._process.send_signal(signal.SIGSTOP)
        return answer


@dataclass(frozen=True)
class Run:
    """One benchmark of engine_bench: "factor/features:8/workers:1" is a kind and numbers."""

    kind: str
    workers: int
    ms: float
    counters: dict[str, float]

    @classmethod
    def parse(cls, benchmark: dict) -> Self:
        if benchmark.get("error_occurred"):
            raise MeasurementError(f"{benchmark['name']}: {benchmark.get('error_message')}")
        if benchmark["time_unit"] != "ms":
            raise MeasurementError(f"{benchmark['name']} is not in milliseconds")
        kind, *parts = benchmark["name"].split("/")
        numbers = dict(part.split(":", 1) for part in parts if ":" in part)
        counters = {k: v for k, v in benchmark.items() if isinstance(v, float)}
        return cls(kind, int(numbers["workers"]), benchmark["real_time"], counters)


@dataclass(frozen=True)
class Engine:
    program: Path
    tokens: int

    def run(
        self, kinds: Collection[str], shape: Shape, workers: Sequence[int]
    ) -> tuple[list[Run], dict]:
        """The runs of these kinds and of the peaks, and the context that was reported."""
        wanted = "|".join(["peak_f32", "peak_f64", *sorted(kinds)])
        command = [
            self.program,
            f"--shapes={shape}",
            f"--workers={','.join(map(str, workers))}",
            f"--tokens={self.tokens}",
            "--benchmark_format=json",
            f"--benchmark_filter=^({wanted})/",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise MeasurementError(
                f"{self.program.name} ended with {done.returncode}:\n{done.stderr}"
            )
        report = json.loads(done.stdout)
        runs = [
            Run.parse(benchmark)
            for benchmark in report["benchmarks"]
            if benchmark.get("run_type", "iteration") == "iteration"
        ]
        missing = {*kinds, "peak_f32"} - {run.kind for run in runs}
        if missing:
            raise MeasurementError(f"{self.program.name} has no {', '.join(sorted(missing))}")
        return runs, report["context"]
