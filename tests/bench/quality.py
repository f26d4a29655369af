"""Quality: the error of quantized layers on tokens that were not used to calibrate them.

Real layers go through a real server, `certiq quantize` with the flags of each setting. The first
half of the stored tokens calibrates, the second half judges, in float64. Every number is a
geometric mean over linears of |X W^T - X Q^T| / |X W^T|, divided by that of plain OPTQ (absmax,
natural order, lambda 0.01), with the engine's seconds beside it, likewise divided. Beacon is
computed here, in numpy (beacon.py); its seconds are no engine's, and are left out.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import beacon
import numpy as np

# Servers and tensors.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

from programs import CERTIQ, ROOT, Server, environment
from safetensors.numpy import load_file, save_file

DATA = Path(os.environ.get("CERTIQ_SHARED_DATA", ROOT.parent / "shared" / "data"))
# The yardsticks: plain rounding, OPTQ as everybody has it, and the best settings that GPTQ's
# implementations offer.
SETTINGS = {
    "rtn": "--method nearest",
    "optq": "--method optq --damping relative_trace:0.01",
    "peers' best": (
        "--method optq --order decreasing_norm --scale mse --damping relative_trace:0.01"
    ),
    "fast": "--quality fast",
    "balanced": "--quality balanced",
    "best": "--quality best",
}
# Not a setting of the engine: its lambda, a multiple of trace / N.
BEACON = "beacon"
PLAIN = "optq"
PEERS = "peers' best"
PHASES = ("factor", "round", "certify", "reference", "pack")
SMOLLM_SPACES = {
    "q_proj": "attn_in",
    "k_proj": "attn_in",
    "v_proj": "attn_in",
    "o_proj": "attn_out",
    "gate_proj": "mlp_in",
    "up_proj": "mlp_in",
    "down_proj": "mlp_act",
}
MINILM_SPACES = {
    "query": "attn_in",
    "key": "attn_in",
    "value": "attn_in",
    "attention.output.dense": "attn_out",
    "intermediate.dense": "mlp_in",
    "output.dense": "mlp_act",
}


@dataclass(frozen=True)
class Linear:
    """A weight, and the activations that it reads."""

    name: str
    weight: np.ndarray
    x: np.ndarray


def smollm2() -> Iterator[Linear]:
    folder = DATA / "smollm2-135m"
    for layer in (0, 15):
        weights = load_file(folder / f"layer_{layer:02d}.safetensors")
        activations = load_file(folder / f"activations_layer_{layer:02d}.safetensors")
        for name, weight in weights.items():
            space = SMOLLM_SPACES[name.split(".")[-2]]
            x = activations[f"layer.{layer}.{space}.x"]
            yield Linear(name.removesuffix(".weight"), weight, x)


def minilm() -> Iterator[Linear]:
    folder = DATA / "minilm"
    activations = load_file(folder / "activations_layer_03.safetensors")
    for name, weight in load_file(folder / "layer_03.safetensors").items():
        # The longest end that fits: attention.output.dense before output.dense.
        ends = [end for end in MINILM_SPACES if name.endswith(f"{end}.weight")]
        space = MINILM_SPACES[max(ends, key=len)]
        x = activations[f"layer.3.{space}.x"]
        yield Linear(name.removesuffix(".weight"), weight, x)


MODELS = {"smollm2": smollm2, "minilm": minilm}


@dataclass(frozen=True)
class Outcome:
    """One linear, quantized once."""

    linear: str
    setting: str
    bits: int
    group_size: int
    tokens: int
    # On the tokens that judge, and on those that calibrated.
    unseen: float
    seen: float
    # What the certificate says of tokens it held out.
    held_out: float | None
    seconds: float
    bits_per_weight: float
    # lambda, divided by trace / N.
    damping: float


def relative_error(x: np.ndarray, weight: np.ndarray, quantized: np.ndarray) -> float:
    x = x.astype(np.float64)
    change = x @ (weight.astype(np.float64) - quantized).T
    return float(np.linalg.norm(change) / np.linalg.norm(x @ weight.astype(np.float64).T))


def quantize(server: Server, folder: Path, flags: list[str], repeat: int) -> tuple[dict, float]:
    """The report, and the least seconds of the engine."""
    best = float("inf")
    report: dict = {}
    for _ in range(repeat):
        command = [
            *(str(CERTIQ), "quantize", "--server", f"127.0.0.1:{server.port}"),
            *("--weights", str(folder / "layer.safetensors"), "--weight", "weight"),
            *("--activations", str(folder / "layer.safetensors"), "--x", "x"),
            *("--output", str(folder / "out.safetensors"), "--report", str(folder / "report.json")),
            *("--compare_nearest", "false", "--per_row", "false", *flags),
        ]
        run = subprocess.run(
            command, env=environment(), capture_output=True, text=True, check=False
        )
        if run.returncode != 0:
            raise SystemExit(f"{shlex.join(command)}\n{run.stderr}")
        report = json.loads((folder / "report.json").read_text())
        phases = report.get("phase_seconds", {})
        best = min(best, sum(phases.get(phase, 0.0) for phase in PHASES))
    return report, best


def beacon_outcome(
    linear: Linear, seen: np.ndarray, unseen: np.ndarray, bits: int, damping: float
) -> Outcome:
    gram = seen.astype(np.float64).T @ seen.astype(np.float64)
    gram += damping * np.trace(gram) / len(gram) * np.eye(len(gram))
    quantized = beacon.quantize(gram, linear.weight.astype(np.float64), bits)
    return Outcome(
        linear.name,
        BEACON,
        bits,
        0,
        len(seen),
        relative_error(unseen, linear.weight, quantized),
        relative_error(seen, linear.weight, quantized),
        None,
        float("nan"),
        bits + 32 / linear.weight.shape[1],
        damping,
    )


def measure(
    server: Server,
    linear: Linear,
    settings: dict[str, str],
    case: tuple[int, int, int | None],
    options: argparse.Namespace,
) -> Iterator[Outcome]:
    bits, group_size, tokens = case
    half = len(linear.x) // 2
    # Fewer tokens than there are: the last ones before those that judge.
    seen = linear.x[half - min(half, tokens or half) : half]
    unseen = linear.x[half:]
    if options.beacon is not None:
        yield beacon_outcome(linear, seen, unseen, bits, options.beacon)
    with tempfile.TemporaryDirectory(prefix="certiq_quality_") as name:
        folder = Path(name)
        tensors = {"weight": linear.weight, "x": np.ascontiguousarray(seen)}
        save_file(tensors, folder / "layer.safetensors")
        for setting, flags in settings.items():
            case_flags = ["--bits", str(bits), "--group_size", str(group_size)]
            every = [*case_flags, *shlex.split(flags)]
            report, seconds = quantize(server, folder, every, options.repeat)
            quantized = load_file(folder / "out.safetensors")["weight"].astype(np.float64)
            trace = float(np.sum(seen.astype(np.float64) ** 2)) / seen.shape[1]
            yield Outcome(
                linear.name,
                setting,
                bits,
                group_size,
                len(seen),
                relative_error(unseen, linear.weight, quantized),
                relative_error(seen, linear.weight, quantized),
                report.get("held_out_relative_error"),
                seconds,
                report["bits_per_weight"],
                float(report.get("lambda_used", 0.0)) / trace,
            )


def ratio(outcomes: Iterable[Outcome], setting: str, to: str, what: str) -> float:
    """Geometric mean over linears; nan where it was not measured."""
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for outcome in outcomes:
        if outcome.setting == setting:
            ours[outcome.linear] = getattr(outcome, what)
        if outcome.setting == to:
            theirs[outcome.linear] = getattr(outcome, what)
    ratios = [ours[name] / theirs[name] for name in ours]
    return float("nan") if any(map(math.isnan, ratios)) else statistics.geometric_mean(ratios)


def table(outcomes: list[Outcome], settings: Iterable[str]) -> Iterator[str]:
    yield (
        "| bits | setting | unseen, over plain OPTQ | over peers' best "
        "| calibration, over plain OPTQ | unseen over calibration | seconds, over plain OPTQ |"
    )
    yield "|---|---|---|---|---|---|---|"
    for bits in sorted({outcome.bits for outcome in outcomes}, reverse=True):
        here = [outcome for outcome in outcomes if outcome.bits == bits]
        for setting in settings:
            gap = statistics.geometric_mean(
                outcome.unseen / outcome.seen for outcome in here if outcome.setting == setting
            )
            cells = [
                f"{ratio(here, setting, PLAIN, 'unseen'):.3f}",
                f"{ratio(here, setting, PEERS, 'unseen'):.3f}",
                f"{ratio(here, setting, PLAIN, 'seen'):.3f}",
                f"{gap:.2f}",
                f"{ratio(here, setting, PLAIN, 'seconds'):.1f}",
            ]
            yield f"| {bits} | {setting} | {' | '.join(cells)} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2")
    parser.add_argument("--bits", default="4,3,2", help="some of them (default %(default)s)")
    parser.add_argument("--group_size", type=int, default=0, help="0: one scale a row (default)")
    parser.add_argument("--tokens", default="", help="calibrate with so many: 128,256,... (all)")
    parser.add_argument("--linears", default="", help="only those whose name has one of these")
    parser.add_argument("--settings", default="", help="only some of them: optq,best (all)")
    parser.add_argument(
        "--add", action="append", default=[], metavar="NAME=FLAGS", help="a setting of your own"
    )
    parser.add_argument(
        "--beacon",
        type=float,
        metavar="L",
        help="Beacon too, with L trace / N on the diagonal; 0: as published",
    )
    parser.add_argument("--repeat", type=int, default=1, help="runs; the fastest counts")
    parser.add_argument("--json", type=Path, help="write every outcome here")
    options = parser.parse_args()
    if options.beacon is not None and options.group_size != 0:
        parser.error("--beacon: expected --group_size 0, as it has one scale a row")
    return options


def main() -> None:
    options = parse()
    chosen = options.settings.split(",") if options.settings else list(SETTINGS)
    settings = {name: SETTINGS[name] for name in {PLAIN: 0, PEERS: 0} | dict.fromkeys(chosen)}
    for added in options.add:
        name, _, flags = added.partition("=")
        settings[name] = flags
    wanted = [part for part in options.linears.split(",") if part]
    linears = [
        linear
        for linear in MODELS[options.model]()
        if not wanted or any(part in linear.name for part in wanted)
    ]
    tokens = [int(count) for count in options.tokens.split(",") if count] or [None]
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="certiq_quality_") as folder:
        server = Server(Path(folder))
        try:
            for count in tokens:
                here = [
                    outcome
                    for bits in (int(text) for text in options.bits.split(","))
                    for linear in linears
                    for outcome in measure(
                        server, linear, settings, (bits, options.group_size, count), options
                    )
                ]
                outcomes += here
                print(f"\n{options.model}, group {options.group_size}, tokens {count or 'all'}\n")
                rows = [*settings, BEACON] if options.beacon is not None else list(settings)
                print("\n".join(table(here, rows)), flush=True)
        finally:
            server.stop()
    if options.json:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))


if __name__ == "__main__":
    main()
