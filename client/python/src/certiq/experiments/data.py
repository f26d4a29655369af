"""Real layers: weights with the activations they read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

Array = np.ndarray[Any, np.dtype[Any]]

# Each row is: name, folder, file of weights, weight, file of activations, activations.
LAYERS = (
    (
        "q_proj (SmolLM2, layer 15)",
        "smollm2-135m",
        "layer_15",
        "model.layers.15.self_attn.q_proj.weight",
        "activations_layer_15",
        "layer.15.attn_in.x",
    ),
    (
        "intermediate (MiniLM, layer 3)",
        "minilm",
        "layer_03",
        "encoder.layer.3.intermediate.dense.weight",
        "activations_layer_03",
        "layer.3.mlp_in.x",
    ),
    (
        "down_proj (SmolLM2, layer 15)",
        "smollm2-135m",
        "layer_15",
        "model.layers.15.mlp.down_proj.weight",
        "activations_layer_15",
        "layer.15.mlp_act.x",
    ),
)
CLASSES = 64


@dataclass(frozen=True)
class RealLayer:
    name: str
    W: Array
    """[rows, features], float32."""
    X: Array
    """[tokens, features], float32."""

    def split(self) -> tuple[Array, Array]:
        """The first three quarters of the tokens to calibrate on, the rest to measure with."""
        at = len(self.X) * 3 // 4
        return self.X[:at], self.X[at:]


def read(path: Path, name: str) -> Array:
    with safe_open(path, framework="np") as file:
        found: Array = file.get_tensor(name)
        return found


def real_layers(data: Path, rows: int) -> list[RealLayer]:
    """`rows` evenly spaced rows of each weight; 0: all."""
    layers = []
    for name, folder, weights, weight, activations, x in LAYERS:
        W = read(data / folder / f"{weights}.safetensors", weight)
        step = max(1, len(W) // rows) if rows else 1
        X = read(data / folder / f"{activations}.safetensors", x).astype(np.float32)
        layers.append(RealLayer(name, np.ascontiguousarray(W[::step][: rows or None]), X))
    return layers


def classification_head(data: Path) -> tuple[RealLayer, Array]:
    """A head that tells the commonest tokens from what layer 15 reads, by ridge regression; and the
    class of each row of X. The data has no head of its own."""
    path = data / "smollm2-135m" / "activations_layer_15.safetensors"
    X = read(path, "layer.15.attn_in.x").astype(np.float32)
    tokens = read(path, "tokens").reshape(-1)
    ids, counts = np.unique(tokens, return_counts=True)
    kept = ids[np.argsort(-counts, kind="stable")][:CLASSES]
    rows = np.isin(tokens, kept)
    labels = np.searchsorted(np.sort(kept), tokens[rows])
    inputs = X[rows].astype(np.float64)
    targets = np.eye(len(kept))[labels]
    gram = inputs.T @ inputs
    damping = 1e-3 * np.trace(gram) / len(gram)
    W = np.linalg.solve(gram + damping * np.eye(len(gram)), inputs.T @ targets).T
    return RealLayer("head", np.ascontiguousarray(W, np.float32), X[rows]), labels


def relative_error(W: Array, Q: Array, X: Array) -> float:
    """|X W^T - X Q^T| / |X W^T|, in float64."""
    X64 = X.astype(np.float64)
    reference = X64 @ W.astype(np.float64).T
    return float(np.linalg.norm(reference - X64 @ Q.astype(np.float64).T)) / float(
        np.linalg.norm(reference)
    )


def largest_error(W: Array, Q: Array, X: Array) -> float:
    """|X W^T - X Q^T|_inf."""
    return float(np.abs(X.astype(np.float64) @ (W - Q).astype(np.float64).T).max())
