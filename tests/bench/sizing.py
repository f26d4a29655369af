"""What a layer costs a server, beside the formulas of deploy/README.md: memory and CPU seconds.

CPU seconds rather than wall clock: they hardly depend on what else the machine does.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
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
    """What a matched OPTQ layer of one scale a row reserves at its peak (deploy/README.md)."""
    return 12 * features**2 + 9 * rows * features


def layer_of(rows: int, features: int, tokens: int) -> Layer:
    random = np.random.default_rng(1)
    W = random.standard_normal((rows, features), dtype=np.float32)
    return Layer(W, random.standard_normal((tokens, features), dtype=np.float32))


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
            took = run(server, layer, 4 * MIB)
            peak = server.memory_bytes("VmHWM") - idle
            # Four times the tokens: the difference is what tokens cost.
            layer.X = np.concatenate([layer.X] * 4)
            layer.header.x.shape[0] = len(layer.X)
            took_more = run(server, layer, 4 * MIB)
        finally:
            server.stop()
        del layer
        gc.collect()
    tokens = (took_more - took) / (3 * TOKENS)
    return {
        "rows": rows,
        "features": features,
        "formula_mib": formula_bytes(rows, features) / MIB,
        "rss_mib": peak / MIB,
        "cpu_seconds": took - TOKENS * tokens,
        "cpu_seconds_per_1000_tokens": 1000 * tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="ROWSxFEATURES, commas between")
    parser.add_argument("--server", type=Path, default=SERVER)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(
        f"{'R x N':>12} {'formula MiB':>12} {'RSS MiB':>10} {'CPU s':>8} {'CPU s / 1000 tokens':>20}"
        f"     load {os.getloadavg()[0]:.1f}"
    )
    done = []
    for shape in options.shapes.split(","):
        rows, _, features = shape.partition("x")
        found = measure(int(rows), int(features), options.server)
        done.append(found)
        print(
            f"{shape:>12} {found['formula_mib']:>12,.0f} {found['rss_mib']:>10,.0f}"
            f" {found['cpu_seconds']:>8.2f} {found['cpu_seconds_per_1000_tokens']:>20.2f}",
            flush=True,
        )
    if options.json is not None:
        options.json.write_text(json.dumps(done, indent=2) + "\n")


if __name__ == "__main__":
    main()
