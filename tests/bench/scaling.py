"""Growth of the time of statistics, factor and rounding with a layer's size.

python3 tests/bench/scaling.py [--help]. Needs build/release/bin/engine_bench. N is the number of
features, R of rows, m of tokens. A round measures every size once, so what disturbs the machine
for a while disturbs one sample of many sizes, not all samples of one. Sums of 8192 features take
0.5 GiB, and a factor as much again.
"""

import argparse
import json
import math
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from compare import PHASES, Samples, machine, table
from measure import ROOT, Engine, MeasurementError, Shape


@dataclass(frozen=True)
class Case:
    """What one process of engine_bench is asked for."""

    rows: int
    features: int
    tokens: int

    @property
    def shape(self) -> Shape:
        return Shape(self.rows, self.features)


# What the tables call a field of Case.
LETTERS = {"features": "N", "rows": "R", "tokens": "m"}
# What the time of a phase depends on, and with which power.
THEORY: dict[str, dict[str, int]] = {
    "statistics": {"features": 2, "tokens": 1},
    "factor": {"features": 3},
    "rounding": {"features": 2, "rows": 1},
}


@dataclass(frozen=True)
class Series:
    """One phase at sizes that differ in one number."""

    phase: str
    varied: str
    cases: Sequence[Case]

    @property
    def theory(self) -> int:
        return THEORY[self.phase][self.varied]

    @property
    def sizes(self) -> list[int]:
        return [getattr(case, self.varied) for case in self.cases]

    @property
    def fixed(self) -> dict[str, int]:
        names = [name for name in THEORY[self.phase] if name != self.varied]
        return {name: getattr(self.cases[0], name) for name in names}

    def __str__(self) -> str:
        fixed = (f"{LETTERS[name]} = {value}" for name, value in self.fixed.items())
        return ", ".join([f"{self.phase} in {LETTERS[self.varied]}", *fixed])


@dataclass(frozen=True)
class Point:
    """Medians of one phase at one size."""

    ms: float
    gflops: float
    peak_percent: float


@dataclass
class Scaling:
    """Everything that was measured."""

    workers: int
    # Samples know no tokens.
    samples: dict[int, Samples] = field(default_factory=lambda: defaultdict(Samples))
    context: dict[str, Any] = field(default_factory=dict)

    def measure(self, program: Path, case: Case, phases: Sequence[str]) -> None:
        engine = Engine(program, case.tokens)
        runs, reported = engine.run(phases, case.shape, [self.workers])
        self.samples[case.tokens].add(case.shape, runs)
        self.context |= machine(reported)

    def points(self, series: Series) -> list[Point]:
        return [self._point(series.phase, case) for case in series.cases]

    def _point(self, phase: str, case: Case) -> Point:
        samples = self.samples[case.tokens]
        key = (phase, case.shape, self.workers)
        rates = [samples.counter(*key, name) for name in ("gflops", "peak_percent")]
        return Point(samples.ms(*key), *rates)

    def peaks(self, kind: str) -> list[float]:
        """Of every process: GFLOP/s."""
        return [
            run.counters["gflops"]
            for samples in self.samples.values()
            for (name, _, _), runs in samples.engine.items()
            if name == kind
            for run in runs
        ]


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float | None:
    """The p of the least-squares fit time = c * size^p in logarithms; None below two sizes."""
    if len(set(sizes)) < 2:
        return None
    logs = [[math.log(value) for value in values] for values in (sizes, times)]
    return statistics.linear_regression(*logs).slope


def upper_half(
    sizes: Sequence[float], times: Sequence[float]
) -> tuple[Sequence[float], Sequence[float]]:
    """The larger half of the sizes, the middle one included, and their times."""
    points = sorted(zip(sizes, times, strict=True))[len(sizes) // 2 :]
    return [size for size, _ in points], [time for _, time in points]


def exponents(series: Series, points: Sequence[Point]) -> tuple[float | None, float | None]:
    """Over all sizes and over the upper half."""
    times = [point.ms for point in points]
    return exponent(series.sizes, times), exponent(*upper_half(series.sizes, times))


def all_series(options: argparse.Namespace) -> list[Series]:
    base = Case(options.fixed_rows, options.fixed_features, options.fixed_tokens)
    return [
        Series(
            phase, varied, [replace(base, **{varied: size}) for size in getattr(options, varied)]
        )
        for varied in LETTERS
        for phase in PHASES
        if varied in THEORY[phase]
    ]


def turns(series: Sequence[Series]) -> Mapping[Case, Sequence[str]]:
    """The phases of each case, none twice: what two series share is measured once.

    Cases go from large to small: what does not fit into memory fails at once.
    """
    wanted: dict[Case, set[str]] = defaultdict(set)
    for one in series:
        for case in one.cases:
            wanted[case].add(one.phase)
    ordered = sorted(wanted, key=lambda case: (case.features, case.tokens, case.rows), reverse=True)
    return {case: sorted(wanted[case]) for case in ordered}


def measure(options: argparse.Namespace, series: Sequence[Series]) -> Scaling:
    scaling = Scaling(options.workers)
    scaling.context["load"] = os.getloadavg()[0]
    for turn in range(options.repeat):
        for case, phases in turns(series).items():
            print(
                f"round {turn + 1} of {options.repeat}: N {case.features}, R {case.rows}, "
                f"m {case.tokens}: {', '.join(phases)}",
                file=sys.stderr,
            )
            scaling.measure(options.engine_bench, case, phases)
    return scaling


def power(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def text(scaling: Scaling, series: Sequence[Series], options: argparse.Namespace) -> str:
    context = scaling.context
    lines = [
        f"{context['cpu']}, {context['cpus']} CPUs, {context['isa']}; load before: "
        f"{context['load']:.2f}",
        f"workers: {options.workers}; medians of {options.repeat} rounds; percent of the peak of "
        "the same run",
        "(statistics, rounding: float32; factor: float64)",
        "",
    ]
    rows = [["GFLOP/s", "median", "lowest", "highest"]]
    for kind in ("peak_f32", "peak_f64"):
        peaks = scaling.peaks(kind)
        rates = (statistics.median(peaks), min(peaks), max(peaks))
        rows.append([kind, *(f"{rate:.1f}" for rate in rates)])
    lines += [table(rows), ""]

    fits = [["exponent of time", "all sizes", "upper half", "theory"]]
    for one in series:
        points = scaling.points(one)
        rows = [[LETTERS[one.varied], "ms", "GFLOP/s", "of peak"]]
        for size, point in zip(one.sizes, points, strict=True):
            cells = (f"{point.ms:.2f}", f"{point.gflops:.1f}", f"{point.peak_percent:.0f} %")
            rows.append([str(size), *cells])
        lines += [str(one), table(rows), ""]
        fits.append([str(one), *map(power, exponents(one, points)), str(one.theory)])
    return "\n".join([*lines, table(fits)])


def fitted(series: Series, points: Sequence[Point]) -> dict:
    whole, upper = exponents(series, points)
    return {
        "phase": series.phase,
        "varied": series.varied,
        "theory": series.theory,
        "exponent": whole,
        "upper_exponent": upper,
        "points": [
            asdict(case) | asdict(point) for case, point in zip(series.cases, points, strict=True)
        ],
    }


def as_json(scaling: Scaling, series: Sequence[Series], options: argparse.Namespace) -> dict:
    return {
        "context": scaling.context | {"workers": options.workers, "repeat": options.repeat},
        "series": [fitted(one, scaling.points(one)) for one in series],
        "engine": [
            {"kind": kind, "shape": str(shape), "tokens": tokens, "workers": workers}
            | {"runs": [asdict(run) for run in runs]}
            for tokens, samples in scaling.samples.items()
            for (kind, shape, workers), runs in samples.engine.items()
        ],
    }


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def sizes(text: str) -> list[int]:
    """Ascending, none twice."""
    return sorted({positive(part) for part in text.split(",")})


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    lists = {
        "features": "512,1024,2048,4096,8192",
        "rows": "512,1024,2048,4096,8192",
        "tokens": "1024,2048,4096,8192,16384",
    }
    fixed = {"features": 2048, "rows": 1024, "tokens": 4096}
    for name, letter in LETTERS.items():
        parser.add_argument(
            f"--{name}",
            type=sizes,
            default=lists[name],
            help=f"{letter} where it varies, comma-separated (%(default)s)",
        )
        parser.add_argument(
            f"--fixed-{name}",
            type=positive,
            default=fixed[name],
            metavar=letter,
            help="where it does not (%(default)s)",
        )
    parser.add_argument("--workers", type=positive, default=2, help="threads (%(default)s)")
    parser.add_argument("--repeat", type=positive, default=3, help="rounds (%(default)s)")
    parser.add_argument(
        "--engine-bench",
        type=Path,
        metavar="PATH",
        default=ROOT / "build" / "release" / "bin" / "engine_bench",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="every sample and fit")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """1 where something could not be measured; an exponent that is off is no failure."""
    options = parse(arguments)
    series = all_series(options)
    try:
        scaling = measure(options, series)
    except (MeasurementError, OSError) as failure:
        print(f"scaling: {failure}", file=sys.stderr)
        return 1
    print(text(scaling, series, options))
    if options.json:
        content = as_json(scaling, series, options)
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
