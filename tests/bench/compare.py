"""Sets the engine beside the fastest quantizers of PyPI, both measured in one run.

python3 tests/bench/compare.py [--help]. Needs build/release/bin/engine_bench; makes the peers'
virtual environment in build/peers. Peers and engine take turns, one process at a time. Every
peer runs twice: with OMP_WAIT_POLICY=PASSIVE and with OpenMP's own policy, which is faster on an
idle machine and much slower on a busy one. What a peer returns is checked, not only timed.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from measure import ROOT, Engine, MeasurementError, Peer, Run, Shape, peers_python

GPTQ = ("gptq-torch", "llmcompressor", "brevitas-gptq")
QRONOS = "brevitas-qronos"
PHASES = ("statistics", "factor", "rounding")
# With AVX-512 and with AVX2: how many times faster than the fastest peer.
FACTOR_AND_ROUND_GOALS = {"x86-64-v4": 6, "x86-64-v3": 3}
WHOLE_GOALS = {"x86-64-v4": 4, "x86-64-v3": 2}
# What engine_bench runs in one turn for each thing compared; with one worker too where marked.
TURNS = {
    "statistics": (("statistics",), True),
    "optq": (("factor", "rounding", "quantize"), True),
    "qronos": (("qronos",), False),
    "shared": (("shared", "quantize"), False),
    "ladder": (("ladder", "quantize_held_out", "quantize"), False),
    "workers": (("quantize",), True),
}


@dataclass
class Samples:
    """Everything that was measured."""

    engine: dict[tuple[str, Shape, int], list[Run]] = field(
        default_factory=lambda: defaultdict(list)
    )
    peers: dict[tuple[str, Shape], list[dict]] = field(default_factory=lambda: defaultdict(list))
    context: dict[str, Any] = field(default_factory=dict)

    def add(self, shape: Shape, runs: Iterable[Run]) -> None:
        for run in runs:
            self.engine[run.kind, shape, run.workers].append(run)

    def has(self, shape: Shape, *kinds: str, workers: int) -> bool:
        return all((kind, shape, workers) in self.engine for kind in kinds)

    def ms(self, kind: str, shape: Shape, workers: int) -> float:
        return statistics.median(run.ms for run in self.engine[kind, shape, workers])

    def counter(self, kind: str, shape: Shape, workers: int, *names: str) -> float:
        """The median of the sum of these counters."""
        runs = self.engine[kind, shape, workers]
        return statistics.median(sum(run.counters[name] for name in names) for run in runs)

    def peak(self, kind: str, workers: int) -> float:
        """Of all turns: GFLOP/s."""
        found = (
            run.counters["gflops"]
            for (name, _, count), runs in self.engine.items()
            if (name, count) == (kind, workers)
            for run in runs
        )
        return statistics.median(found)

    def failure(self, peer: str, shape: Shape) -> str | None:
        answers = self.peers[peer, shape]
        return next((answer["failure"] for answer in answers if "failure" in answer), None)

    def peer_ms(self, peer: str, shape: Shape, phase: str) -> float:
        return 1e3 * statistics.median(answer[phase] for answer in self.peers[peer, shape])

    def fastest(self, names: Sequence[str], shape: Shape, phase: str) -> tuple[str, float] | None:
        """Of those whose every result was right; a name stands for both wait policies."""
        times = [
            (self.peer_ms(peer, shape, phase), peer)
            for peer, of in self.peers
            if of == shape and peer.split()[0] in names and not self.failure(peer, shape)
        ]
        return (min(times)[1], min(times)[0]) if times else None


@dataclass(frozen=True)
class Ratio:
    """What is compared: above / below."""

    what: str
    shape: Shape
    above: str
    above_ms: float
    below: str
    below_ms: float
    goal: float | None = None
    at_least: bool = True
    note: str = ""

    @property
    def value(self) -> float:
        return self.above_ms / self.below_ms

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return self.note
        met = self.value >= self.goal if self.at_least else self.value <= self.goal
        return "met" if met else "not met"

    def cells(self) -> tuple[str, ...]:
        sign = ">=" if self.at_least else "<="
        goal = "" if self.goal is None else f"{sign} {self.goal:g}"
        return (
            f"{self.what} {self.shape}",
            f"{self.above} {self.above_ms:.1f} ms",
            f"{self.below} {self.below_ms:.1f} ms",
            f"{self.value:.2f}",
            goal,
            self.verdict,
        )


def against_peers(samples: Samples, shape: Shape, threads: int) -> Iterator[Ratio]:
    isa = samples.context["isa"]
    if samples.has(shape, "statistics", workers=threads):
        peer = samples.fastest(GPTQ, shape, "statistics")
        if peer:
            ours = samples.ms("statistics", shape, threads)
            yield Ratio("statistics", shape, *peer, "certiq", ours, 2.2)
    peer = samples.fastest(GPTQ, shape, "quantize")
    if peer and samples.has(shape, "factor", workers=threads):
        sweep = samples.counter("quantize", shape, threads, "factor_ms", "round_ms")
        whole = samples.ms("quantize", shape, threads)
        yield Ratio(
            "factor + round", shape, *peer, "certiq", sweep, FACTOR_AND_ROUND_GOALS.get(isa)
        )
        yield Ratio("whole certificate", shape, *peer, "certiq", whole, WHOLE_GOALS.get(isa))
    peer = samples.fastest([QRONOS], shape, "quantize")
    if peer and samples.has(shape, "qronos", workers=threads):
        ours = samples.ms("qronos", shape, threads)
        yield Ratio("qronos", shape, *peer, "certiq", ours, 20)


def against_itself(samples: Samples, shape: Shape, threads: int) -> Iterator[Ratio]:
    if samples.has(shape, "shared", "quantize", workers=threads):
        # Of one layer that shares with nobody: a factor made three times would not hide here.
        alone = samples.counter("quantize", shape, threads, "factor_ms")
        alone += 3 * samples.counter("quantize", shape, threads, "round_ms")
        three = samples.counter("shared", shape, threads, "factor_ms", "round_ms")
        below = "one factor + 3 roundings"
        yield Ratio("shared", shape, "three layers", three, below, alone, 1.1, False)
    if samples.has(shape, "ladder", "quantize", workers=threads):
        above = samples.ms("ladder", shape, threads)
        below = samples.ms("quantize_held_out", shape, threads)
        yield Ratio("ladder", shape, "six dampings", above, "one, on unseen too", below, 2.5, False)
        below = samples.ms("quantize", shape, threads)
        yield Ratio("ladder", shape, "six dampings", above, "one", below, 2.5, False)
    if threads > 1 and samples.has(shape, "quantize", workers=1):
        above = samples.ms("quantize", shape, 1)
        below = samples.ms("quantize", shape, threads)
        most = samples.peak("peak_f32", threads) / samples.peak("peak_f32", 1)
        note = f"peak_f32 {most:.2f}"
        workers = f"{threads} workers"
        yield Ratio("quantize", shape, "1 worker", above, workers, below, note=note)


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def percent(samples: Samples, phase: str, shape: Shape, workers: int) -> str:
    if not samples.has(shape, phase, workers=workers):
        return "-"
    return f"{samples.counter(phase, shape, workers, 'peak_percent'):.0f} %"


def text(samples: Samples, ratios: Sequence[Ratio], options: argparse.Namespace) -> str:
    counts = sorted({1, options.threads} & {key[2] for key in samples.engine})
    context = samples.context
    peers = "none"
    if "torch" in context:
        peers = (
            f"torch {context['torch']}, {options.threads} threads, float32; "
            "each with OMP_WAIT_POLICY=PASSIVE and unset"
        )
    lines = [
        f"{context['cpu']}, {context['cpus']} CPUs, {context['isa']}; load before: "
        f"{context['load']:.2f}",
        f"peers: {peers}",
        f"{options.tokens} tokens (float16 for certiq, float32 for peers), 4 bits symmetric, "
        f"a scale a row; medians of {options.repeat} rounds",
        "",
        "GFLOP/s and percent of the peak (statistics, rounding: float32; factor: float64)",
    ]
    rows = [["", *(f"workers: {count}" for count in counts), "ratio"]]
    for kind in ("peak_f32", "peak_f64"):
        rates = [samples.peak(kind, count) for count in counts]
        rows.append([kind, *(f"{rate:.1f}" for rate in rates), f"{rates[-1] / rates[0]:.2f}"])
    for shape, phase in itertools.product(options.shapes, PHASES):
        if samples.has(shape, phase, workers=options.threads):
            rates = [percent(samples, phase, shape, count) for count in counts]
            rows.append([f"{phase} {shape}", *rates, ""])
    lines += [table(rows), ""]

    rows = [["peer", "statistics ms", "quantize ms", "error", "plain rounding's"]]
    for peer, shape in sorted(samples.peers, key=lambda key: (str(key[1]), key[0])):
        name = f"{peer} {shape}"
        failure = samples.failure(peer, shape)
        if failure:
            lines.append(f"FAILED {name}: {failure}")
            continue
        times = [samples.peer_ms(peer, shape, phase) for phase in ("statistics", "quantize")]
        answer = samples.peers[peer, shape][-1]
        errors = [answer["error"], answer["nearest_error"]]
        rows.append([name, *(f"{ms:.1f}" for ms in times), *(f"{e:.4f}" for e in errors)])
    if len(rows) > 1:
        lines += [table(rows), ""]

    rows = [["", "", "against", "ratio", "goal", ""]]
    lines.append(table(rows + [list(ratio.cells()) for ratio in ratios]))
    return "\n".join(lines)


def as_json(samples: Samples, ratios: Sequence[Ratio], options: argparse.Namespace) -> dict:
    return {
        "context": samples.context
        | {"threads": options.threads, "tokens": options.tokens, "repeat": options.repeat},
        "engine": [
            {"kind": kind, "shape": str(shape), "workers": workers}
            | {"runs": [asdict(run) for run in runs]}
            for (kind, shape, workers), runs in samples.engine.items()
        ],
        "peers": [
            {"peer": peer, "shape": str(shape), "answers": answers}
            for (peer, shape), answers in samples.peers.items()
        ],
        "ratios": [
            asdict(ratio)
            | {"shape": str(ratio.shape), "value": ratio.value, "verdict": ratio.verdict}
            for ratio in ratios
        ],
    }


def machine(reported: dict) -> dict[str, Any]:
    """What engine_bench says of the CPU, else what the kernel says."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": reported.get("cpu", names[0] if names else "unknown CPU"),
        "isa": reported.get("isa", "unknown ISA"),
        "cpus": len(os.sched_getaffinity(0)),
    }


def measure(options: argparse.Namespace) -> Samples:
    samples = Samples()
    samples.context["load"] = os.getloadavg()[0]
    engine = Engine(options.engine_bench, options.tokens)
    # The one where Qronos is compared: Brevitas takes minutes for large ones.
    smallest = min(options.shapes, key=lambda shape: shape.rows * shape.features)
    names = [] if options.skip_peers else wanted_peers(options.only)
    with ExitStack() as stack:
        python = peers_python() if names else Path()
        peers = [
            stack.enter_context(Peer(python, name, passive, options.threads))
            for name, passive in itertools.product(names, (False, True))
        ]
        if peers:
            samples.context["torch"] = peers[0].torch
        for shape, turn in itertools.product(options.shapes, range(options.repeat)):
            print(f"{shape}: round {turn + 1} of {options.repeat}", file=sys.stderr)
            theirs = [peer for peer in peers if peer.name != QRONOS or shape == smallest]
            ours = [
                TURNS[what]
                for what in options.only
                if (what != "workers" or "optq" not in options.only)
                and (what != "qronos" or shape == smallest)
            ]
            for step in range(max(len(theirs), len(ours))):
                if step < len(theirs):
                    answer = theirs[step].measure(shape, options.tokens)
                    samples.peers[theirs[step].label, shape].append(answer)
                if ours:
                    kinds, with_one = ours[step % len(ours)]
                    workers = sorted({1, options.threads}) if with_one else [options.threads]
                    runs, reported = engine.run(kinds, shape, workers)
                    samples.add(shape, runs)
                    samples.context |= machine(reported)
    return samples


def wanted_peers(only: Sequence[str]) -> list[str]:
    gptq = GPTQ if {"statistics", "optq"} & set(only) else ()
    return [*gptq, *([QRONOS] if "qronos" in only else [])]


def comparisons(text: str) -> list[str]:
    names = text.split(",")
    unknown = set(names) - set(TURNS)
    if unknown:
        raise argparse.ArgumentTypeError(f"no comparison is called {', '.join(sorted(unknown))}")
    return names


def shapes(text: str) -> list[Shape]:
    return [Shape.parse(part) for part in text.split(",")]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--shapes",
        type=shapes,
        default="4096x4096,2048x2048",
        help="ROWSxFEATURES, comma-separated (%(default)s)",
    )
    parser.add_argument("--threads", type=int, default=2, help="of each side (%(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="(%(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds a shape (%(default)s)")
    parser.add_argument(
        "--only",
        type=comparisons,
        default=",".join(TURNS),
        help="what to compare, comma-separated (%(default)s)",
    )
    parser.add_argument("--skip-peers", action="store_true", help="certiq alone")
    parser.add_argument(
        "--engine-bench",
        type=Path,
        metavar="PATH",
        default=ROOT / "build" / "release" / "bin" / "engine_bench",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="every sample and ratio")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """1 where something could not be measured; a goal that is not met is no failure."""
    options = parse(arguments)
    try:
        samples = measure(options)
    except (MeasurementError, OSError, subprocess.CalledProcessError) as failure:
        print(f"compare: {failure}", file=sys.stderr)
        return 1
    ratios = [
        ratio
        for shape in options.shapes
        for ratio in (
            *against_peers(samples, shape, options.threads),
            *against_itself(samples, shape, options.threads),
        )
    ]
    print(text(samples, ratios, options))
    if options.json:
        options.json.write_text(json.dumps(as_json(samples, ratios, options), indent=1) + "\n")
    return int(any(samples.failure(*key) for key in samples.peers))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
