"""The three experiments of the error analysis of OPTQ and Qronos (arXiv 2508.04853)."""

from __future__ import annotations

import math

import numpy as np

from certiq import Client, Spec
from certiq._proto.certificate_pb2 import OUTCOME_QUANTIZED
from certiq.experiments import plots
from certiq.experiments.data import (
    Array,
    RealLayer,
    largest_error,
    relative_error,
)
from certiq.experiments.tables import Table

LAMBDAS = tuple(10.0 ** (exponent / 2) for exponent in range(-10, -1))
# The threshold of stability is looked for within these decades.
THRESHOLD_DECADES = (-18.0, -1.0)


def order(client: Client, layers: list[RealLayer]) -> Table:
    """Features by decreasing norm against their natural order, with the terms of the bound."""
    table = Table(
        "order",
        "Order of features",
        ("layer", "bits", "order", "error", "unseen error", "bound", "C2", "C inf", "clipped"),
        "OPTQ, absmax scales, lambda = 0.01 trace / N. The bound is sqrt(sum eps_j^2 D_j) over "
        "|X W^T|; C2 = sqrt(mean D_j) and C inf = max sqrt(D_j) are what the order changes in it. "
        "Unseen: the last quarter of the tokens.",
        draw=plots.order,
    )
    for layer in layers:
        fit, unseen = layer.split()
        for bits in (4, 3, 2):
            for name in ("natural", "decreasing_norm"):
                spec = Spec(bits=bits, order=name, damping="relative_trace:0.01")  # type: ignore[arg-type]
                done = client.quantize(layer.W, fit, spec)
                c = done.certificate
                table.add(
                    *(layer.name, bits, name, c.relative_error),
                    relative_error(layer.W, done.dequantized(), unseen),
                    c.l2_bound / math.sqrt(c.reference_energy),
                    *(c.c2, c.c_inf, c.clipped_weights),
                )
    return table


def rounding(client: Client, head: RealLayer, labels: Array, seeds: int) -> Table:
    """Stochastic against deterministic rounding: the largest error, flips of the best class."""
    table = Table(
        "rounding",
        "Rounding: the largest error and flips of the best class",
        (
            *("bits", "rounding", "seed", "error", "largest error", "largest unseen error"),
            *("bound of the largest", "flips", "accuracy"),
        ),
        "A classification head on real activations. Flips: share of unseen tokens whose best class "
        "is not the float head's. The bound holds for calibration tokens, for stochastic rounding "
        "with probability 0.999.",
        draw=plots.rounding,
    )
    fit, unseen = head.split()
    expected = (unseen @ head.W.T).argmax(1)
    truth = labels[len(fit) :]
    for bits in (4, 3, 2):
        runs: list[tuple[str, int | None]] = [("nearest", None)]
        runs += [("stochastic", seed) for seed in range(seeds)]
        for name, seed in runs:
            spec = Spec(bits=bits, rounding=name, seed=seed, damping="relative_trace:0.01")  # type: ignore[arg-type]
            done = client.quantize(head.W, fit, spec)
            Q = done.dequantized()
            found = (unseen @ Q.T).argmax(1)
            table.add(
                *(bits, name, seed, done.relative_error),
                *(largest_error(head.W, Q, fit), largest_error(head.W, Q, unseen)),
                done.certificate.linf_bound,
                float(np.mean(found != expected)),
                float(np.mean(found == truth)),
            )
    return table


def damping(client: Client, layers: list[RealLayer]) -> Table:
    """lambda from 1e-5 to 1e-1 of trace / N, and where factorisations begin to fail."""
    table = Table(
        "damping",
        "Damping",
        ("layer", "lambda / (trace / N)", "error", "unseen error", "bound", "stable from"),
        "OPTQ, 4 bits. 'Stable from' is the least lambda that the first attempt is accepted with, "
        "found by bisection between 1e-18 and 1e-1 of trace / N: below it the factor is refused.",
        draw=plots.damping,
    )
    for layer in layers:
        fit, unseen = layer.split()
        with client.calibration(layer.X.shape[1]) as calibration:
            with calibration.stream("experiment") as stream:
                stream.send(fit)
            calibration.finalize()
            threshold = _threshold(client, layer, calibration)
            for value in LAMBDAS:
                spec = Spec(bits=4, damping=f"relative_trace:{value}")
                done = client.quantize(layer.W, spec=spec, calibration=calibration)
                c = done.certificate
                table.add(
                    *(layer.name, value, c.relative_error),
                    relative_error(layer.W, done.dequantized(), unseen),
                    c.l2_bound / math.sqrt(c.reference_energy),
                    threshold,
                )
    return table


def _threshold(client: Client, layer: RealLayer, calibration: object) -> float | None:
    """None: stable all the way down."""

    def stable(exponent: float) -> bool:
        spec = Spec(
            bits=4,
            damping=f"relative_trace:{10.0**exponent}",
            max_attempts=1,
            on_failure="nearest",
        )
        done = client.quantize(layer.W[:8], spec=spec, calibration=calibration)  # type: ignore[arg-type]
        return bool(done.certificate.outcome == OUTCOME_QUANTIZED)

    low, high = THRESHOLD_DECADES
    if stable(low):
        return None
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (low, middle) if stable(middle) else (middle, high)
    return float(10.0**high)
