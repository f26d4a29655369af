"""What a layer costs a server, beside the formulas of deploy/README.md: memory and CPU seconds.

CPU seconds rather than wall clock: they depend less on what else the machine does. Where cores and
caches are shared they are still more than on an idle machine.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Servers, metrics, frames.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

import numpy as np
from programs import SERVER, Server
from raw import Layer, collect, connect, quantize

MIB = 1 << 20
TOKENS = 512
SHAPES = ("4096x4096", "11008x4096", "4096x11008", "8192x8192", "28672x8192")
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(server: Server) -> float:
    """Of all threads of the process so far."""
    text = Path(f"/proc/{server.process.pid}/stat").read_text()
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def formula_bytes(rows: int, features: int) -> int:
    """What a Quantize call of default settings reserves (deploy/README.md)."""
    messages = 3 * min(16 * MIB, 4 * rows * features)
    return 10 * features**2 + 9 * rows * features + 5 * 1024 * features + MIB + messages


def formula_seconds(rows: int, features: int) -> float:
    """Of one worker, on the machine of README.md when it is idle (deploy/README.md)."""
    n = features
    return TOKENS * n**2 / 180e9 + n**3 / 250e9 + rows * n**2 / 64e9


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


def measure(rows: int, features: int, program: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="certiq_sizing_") as folder:
        server = Server(Path(folder) / "server", ["--workers", "1"], program=program)
        try:
            idle = server.memory_bytes()
            layer = layer_of(rows, features, TOKENS)
            with reserved(server) as samples:
                took = run(server, layer, 4 * MIB)
            peak = server.memory_bytes("VmHWM") - idle
        finally:
            server.stop()
        del layer
        gc.collect()
    return {
        "rows": rows,
        "features": features,
        "formula_mib": formula_bytes(rows, features) / MIB,
        "reserved_mib": max(samples) / MIB,
        "rss_mib": peak / MIB,
        "cpu_seconds": took,
        "formula_seconds": formula_seconds(rows, features),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="ROWSxFEATURES, commas between")
    parser.add_argument("--server", type=Path, default=SERVER)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(
        f"{'R x N':>12} {'formula MiB':>12} {'reserved MiB':>13} {'RSS MiB':>10}"
        f" {'formula s':>10} {'CPU s':>8}     load {os.getloadavg()[0]:.1f}"
    )
    done = []
    for shape in options.shapes.split(","):
        rows, _, features = shape.partition("x")
        found = measure(int(rows), int(features), options.server)
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
