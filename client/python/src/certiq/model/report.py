"""The report of a run: report.json, from which report.html is made.

The certificates' numbers as the service sent them; nothing is recomputed but ratios.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping, Sequence
from typing import Any

SCHEMA_VERSION = 2
WORST = 10


def linear_report(
    name: str,
    block: str,
    group: Sequence[str],
    certificate: Mapping[str, Any],
    notes: Sequence[str],
    seconds: float,
    *,
    routed_tokens: int | None = None,
    prior_tokens: int = 0,
) -> dict[str, Any]:
    """One linear. `certificate` is the protobuf as JSON with the proto's field names.

    `routed_tokens`: what an expert saw, None of others; `prior_tokens` are those of all experts
    that the certificate's tokens count beside them.
    """
    energy = float(certificate.get("reference_energy", 0.0))
    bound = float(certificate.get("l2_bound", 0.0))
    damped = float(certificate.get("damped_squared_error", 0.0))
    attempts = certificate.get("damping_attempts", [])
    return {
        "name": name,
        "block": block,
        "shares_input_with": [other for other in group if other != name],
        "relative_error": float(certificate.get("relative_error", 0.0)),
        "relative_bound": bound / math.sqrt(energy) if energy > 0 else None,
        # The damped error is at most the damped bound, so this is at most 1.
        "bound_tightness": math.sqrt(damped) / bound if bound > 0 else None,
        "held_out_relative_error": certificate.get("held_out_relative_error"),
        "lambda_requested": certificate.get("lambda_requested"),
        "lambda_used": certificate.get("lambda_used"),
        "stability_failures": [
            attempt for attempt in attempts if _cause(attempt) not in ("NONE", "UNSPECIFIED")
        ],
        "tokens": int(certificate.get("tokens", 0)),
        "routed_tokens": routed_tokens,
        "prior_tokens": prior_tokens,
        "weights": int(certificate["rows"]) * int(certificate["features"]),
        "bits_per_weight": float(certificate.get("bits_per_weight", 0.0)),
        "clipped_weights": int(certificate.get("clipped_weights", 0)),
        "dead_features": int(certificate.get("dead_features", 0)),
        "underflowed_rows": int(certificate.get("underflow", {}).get("rows", 0)),
        "outcome": certificate.get("outcome"),
        "notes": list(notes),
        "warnings": list(certificate.get("warnings", [])),
        "seconds": seconds,
        "certificate": dict(certificate),
    }


def _cause(attempt: Mapping[str, Any]) -> str:
    return str(attempt.get("cause", "UNSPECIFIED")).removeprefix("STABILITY_CAUSE_")


def totals(linears: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    weights = sum(item["weights"] for item in linears)
    errors = [item["relative_error"] for item in linears if item["relative_error"] > 0]
    unseen = [
        item["held_out_relative_error"]
        for item in linears
        if item["held_out_relative_error"] is not None
    ]
    return {
        "linears": len(linears),
        "weights": weights,
        "bits_per_weight": (
            sum(item["bits_per_weight"] * item["weights"] for item in linears) / weights
            if weights
            else None
        ),
        "mean_relative_error": _geometric_mean(errors),
        "mean_held_out_relative_error": _geometric_mean(unseen),
        "largest_relative_error": max(errors, default=None),
        "linears_with_stability_failures": sum(
            bool(item["stability_failures"]) for item in linears
        ),
        "stability_failures": sum(len(item["stability_failures"]) for item in linears),
        "fell_back_to_nearest": [
            item["name"] for item in linears if str(item["outcome"]).endswith("NEAREST")
        ],
        "experts": _coverage(linears),
        "with_notes": [item["name"] for item in linears if item["notes"]],
        "clipped_weights": sum(item["clipped_weights"] for item in linears),
        "dead_features": sum(item["dead_features"] for item in linears),
        "underflowed_rows": sum(item.get("underflowed_rows", 0) for item in linears),
        "worst": [
            item["name"]
            for item in sorted(linears, key=lambda item: -item["relative_error"])[:WORST]
        ],
    }


def _coverage(linears: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How many tokens the linears of experts saw; None without experts."""
    seen = sorted(
        item["routed_tokens"] for item in linears if item.get("routed_tokens") is not None
    )
    if not seen:
        return None
    return {
        "linears": len(seen),
        "without_tokens": sum(tokens == 0 for tokens in seen),
        "fewest_tokens": seen[0],
        "median_tokens": seen[len(seen) // 2],
        "most_tokens": seen[-1],
    }


def _geometric_mean(values: Sequence[float]) -> float | None:
    positive = [value for value in values if value > 0]
    if not positive:
        return None
    return math.exp(sum(math.log(value) for value in positive) / len(positive))


def model_report(
    settings: Mapping[str, Any],
    linears: Sequence[Mapping[str, Any]],
    *,
    left_float: Sequence[str],
    plan: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    seconds: float,
    versions: Mapping[str, str],
    loads_in: Sequence[str],
    texts: Mapping[str, Any],
    float_model: str,
    tensor_bytes: int,
    proof: Mapping[str, Any],
    files: Mapping[str, Any],
) -> dict[str, Any]:
    """`float_model`: how the float model's logits compare with transformers'. `evaluation` has a
    text's measurements by its name."""
    return {
        "schema_version": SCHEMA_VERSION,
        "settings": dict(settings),
        "versions": dict(versions),
        # Who reads the checkpoint, with versions; empty where nobody is known to.
        "loads_in": list(loads_in),
        "totals": totals(linears),
        "plan": dict(plan),
        "texts": dict(texts),
        "float_model": float_model,
        # The first text's, which is --evaluation's.
        "perplexity": (evaluation or {}).get("evaluation"),
        "evaluation": dict(evaluation or {}),
        "left_float": list(left_float),
        "tensor_bytes": tensor_bytes,
        "proof": dict(proof),
        "files": dict(files),
        # All sessions of the run count together.
        "seconds": seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "linears": [dict(item) for item in linears],
    }
