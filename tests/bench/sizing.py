"""The cost of a layer to a server, beside the formulas of deploy/sizing.md: memory and CPU seconds.

CPU seconds rather than wall clock: they depend less on what else the machine does. Where cores and
caches are shared they are still more than on an idle machine; --realtime lets the server (and not
its client) run before everything else. The peak of one core, which the formula of seconds divides
by, is measured first, by engine_bench.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Servers, metrics, frames.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

import numpy as np
from programs import BINARIES, SERVER, Server
from raw import Layer, collect, connect, quantize

MIB = 1 << 20
SHAPES = (
    *("1024x1024", "2048x2048", "1024x4096", "4096x4096", "11008x4096"),
    *("4096x11008", "1024x8192", "8192x8192", "28672x8192"),
)
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(server: Server) -> float:
    """Of all threads of the process so far."""
    text = Path(f"/proc/{server.process.pid}/stat").read_text()
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def formula_bytes(rows: int, features: int) -> int:
    """What a Quantize call of default settings reserves (deploy/sizing.md)."""
    messages = 3 * min(16 * MIB, 4 * rows * features)
    return 10 * features**2 + 9 * rows * features + 5 * 1024 * features + MIB + messages


def formula_seconds(rows: int, features: int, tokens: int, peak: float) -> float:
    """Of one worker that has a core of `peak` float32 operations a second (deploy/sizing.md)."""
    n = features
    operations = tokens * n**2 / 0.78 + n**3 / 0.65 + rows * n**2 / 0.38
    return operations / peak + rows * n / 60e6 + 0.04


def peak_of_a_core(program: Path, *before: str) -> float:
    """float32 operations a second, counting a fused multiply-add as two."""
    command = [*before, str(program), "--shapes=256x256"]
    found = []
    # The best of some: of those that nobody disturbed.
    for _ in range(5):
        done = subprocess.run(
            [*command, "--benchmark_filter=^peak_f32/workers:1/"],
            capture_output=True,
            text=True,
            check=True,
        )
        found += re.findall(r"^peak_f32\S* .*\bgflops=([\d.]+)", done.stdout, re.MULTILINE)
    return max(map(float, found)) * 1e9


def layer_of(rows: int, features: int, tokens: int) -> Layer:
    random = np.random.default_rng(1)
    W = random.standard_normal((rows, features), dtype=np.float32)
    return Layer(W, random.standard_normal((tokens, features), dtype=np.float32))


@contextmanager
def reserved(server: Server) -> Iterator[list[float]]:
    """Samples of what the server has reserved meanwhile."""
    samples: list[float] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(0.02):
            samples.append(server.metrics().sum("certiq_memory_reserved_bytes"))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def run(server: Server, layer: Layer, chunk_bytes: int) -> float:
    """CPU seconds of a Quantize call, its upload included."""
    before = cpu_seconds(server)
    with connect(server) as channel:
        collect(quantize(channel, layer.frames(max(1, chunk_bytes // layer.W[0].nbytes)), 3600))
    server.wait_idle()
    return cpu_seconds(server) - before


@contextmanager
def started_by(command: list[str], program: Path) -> Iterator[Path]:
    """A program that starts the other through this command; the other itself without one."""
    if not command:
        yield program
        return
    with tempfile.TemporaryDirectory(prefix="certiq_sizing_") as folder:
        made = Path(folder) / program.name
        made.write_text(f"#!/bin/sh\nexec {' '.join(command)} '{program.absolute()}' \"$@\"\n")
        made.chmod(0o755)
        yield made


def measure(rows: int, features: int, tokens: int, program: Path, peak: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="certiq_sizing_") as folder:
        server = Server(Path(folder) / "server", ["--workers", "1"], program=program)
        try:
            idle = server.memory_bytes()
            layer = layer_of(rows, features, tokens)
            with reserved(server) as samples:
                took = run(server, layer, 4 * MIB)
            resident = server.memory_bytes("VmHWM") - idle
        finally:
            server.stop()
        del layer
        gc.collect()
    return {
        "rows": rows,
        "features": features,
        "formula_mib": formula_bytes(rows, features) / MIB,
        "reserved_mib": max(samples) / MIB,
        "rss_mib": resident / MIB,
        "cpu_seconds": took,
        "formula_seconds": formula_seconds(rows, features, tokens, peak),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="ROWSxFEATURES, commas between")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--server", type=Path, default=SERVER)
    parser.add_argument("--engine_bench", type=Path, default=BINARIES / "engine_bench")
    parser.add_argument("--realtime", action="store_true", help="takes root")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    first = ["chrt", "--rr", "10"] if options.realtime else []
    peak = peak_of_a_core(options.engine_bench, *first)
    print(f"peak of a core: {peak / 1e9:.0f} GF/s float32")
    print(
        f"{'R x N':>12} {'formula MiB':>12} {'reserved MiB':>13} {'RSS MiB':>10}"
        f" {'formula s':>10} {'CPU s':>8}     load {os.getloadavg()[0]:.1f}"
    )
    done = []
    for shape in options.shapes.split(","):
        rows, _, features = shape.partition("x")
        with started_by(first, options.server) as server:
            found = measure(int(rows), int(features), options.tokens, server, peak)
        done.append(found)
        print(
            f"{shape:>12} {found['formula_mib']:>12,.0f} {found['reserved_mib']:>13,.0f}"
            f" {found['rss_mib']:>10,.0f}"
            f" {found['formula_seconds']:>10.2f} {found['cpu_seconds']:>8.2f}",
            flush=True,
        )
    if options.json is not None:
        options.json.write_text(json.dumps(done, indent=2) + "\n")


if __name__ == "__main__":
    main()
