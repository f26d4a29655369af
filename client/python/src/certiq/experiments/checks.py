"""Three further checks: which tokens, which type of statistics, how stochastic rounding
scatters."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from certiq import Client, Spec
from certiq.experiments import plots
from certiq.experiments.data import Array, RealLayer, largest_error, relative_error
from certiq.experiments.tables import Table

SIZES = (64, 128, 256, 512, 1024)
# So many sets of one size are compared.
SETS = 3


def sensitivity(client: Client, layers: list[RealLayer]) -> Table:
    """The dependence of the error on unseen tokens on the calibration set."""
    table = Table(
        "sensitivity",
        "Calibration sets",
        ("layer", "tokens", "set", "error", "unseen error"),
        "OPTQ, 4 bits, norm order, lambda = 0.01 trace / N. Sets are runs of neighbouring tokens, "
        "evenly spaced; unseen are the last quarter, no part of any.",
        draw=plots.sensitivity,
    )
    spec = Spec(bits=4, order="decreasing_norm", damping="relative_trace:0.01")
    for layer in layers:
        fit, unseen = layer.split()
        for size in (size for size in SIZES if size <= len(fit)):
            for index in range(SETS):
                start = (len(fit) - size) * index // (SETS - 1)
                X = fit[start : start + size]
                done = client.quantize(layer.W, X, spec)
                table.add(
                    *(layer.name, size, index, done.relative_error),
                    relative_error(layer.W, done.dequantized(), unseen),
                )
    return table


def rounded(X: Array, kind: str) -> Array:
    """X as a type holds it; INT8: symmetric, a scale for each feature."""
    if kind == "INT8":
        scale = np.abs(X).max(0) / 127
        scale[scale == 0] = 1
        return np.asarray(np.rint(X / scale) * scale, np.float32)
    types = {"FP32": np.float32, "FP16": np.float16, "BF16": ml_dtypes.bfloat16}
    return X.astype(types[kind])


def statistics(client: Client, layers: list[RealLayer]) -> Table:
    """Sums of activations in FP32, FP16, BF16 and INT8."""
    table = Table(
        "statistics",
        "Types of the activations behind the sums",
        ("layer", "type", "sums off by", "error", "unseen error", "stability failures"),
        "OPTQ, 4 bits, norm order, lambda = 0.01 trace / N; activations were rounded to the type, "
        "errors are measured with those that were not. 'Sums off by': |H' - H| / |H|.",
        draw=plots.statistics,
    )
    spec = Spec(bits=4, order="decreasing_norm", damping="relative_trace:0.01")
    for layer in layers:
        fit, unseen = layer.split()
        exact = fit.astype(np.float64).T @ fit.astype(np.float64)
        for kind in ("FP32", "FP16", "BF16", "INT8"):
            X = rounded(fit, kind)
            done = client.quantize(layer.W, X, spec)
            wide = X.astype(np.float64)
            Q = done.dequantized()
            table.add(
                *(layer.name, kind),
                float(np.linalg.norm(wide.T @ wide - exact) / np.linalg.norm(exact)),
                *(relative_error(layer.W, Q, fit), relative_error(layer.W, Q, unseen)),
                len(done.certificate.damping_attempts) - 1,
            )
    return table


def monte_carlo(client: Client, layer: RealLayer, seeds: int) -> Table:
    """Stochastic rounding many times over: is it unbiased, how often is the bound passed?"""
    table = Table(
        "monte_carlo",
        "Stochastic rounding, many seeds",
        ("seed", "error", "largest error", "bound", "bias"),
        "OPTQ, 4 bits, natural order. The bound of the largest error fails with probability 0.001 "
        "at most. Bias: |mean of Q over the seeds so far - W| / |one Q - W|; it falls as "
        "1 / sqrt(seeds) if rounding is unbiased, but for what clips.",
        draw=plots.monte_carlo,
    )
    fit, _ = layer.split()
    total = np.zeros(layer.W.shape)
    with client.calibration(layer.X.shape[1]) as calibration:
        with calibration.stream("experiment") as stream:
            stream.send(fit)
        calibration.finalize()
        for seed in range(seeds):
            spec = Spec(bits=4, rounding="stochastic", seed=seed, damping="relative_trace:0.01")
            done = client.quantize(layer.W, spec=spec, calibration=calibration)
            Q = done.dequantized()
            total += Q
            one = float(np.linalg.norm(Q - layer.W))
            table.add(
                *(seed, done.relative_error, largest_error(layer.W, Q, fit)),
                done.certificate.linf_bound,
                float(np.linalg.norm(total / (seed + 1) - layer.W)) / one,
            )
    return table
