"""Beacon, as a baseline: codes and the scale of a row found together.

Beacon (Zhang and Saab, arXiv 2508.20293) takes codes q from an unscaled symmetric grid and
maximises the cosine of X w and X q; the scale is then the projection of X w on X q. Codes are
first chosen one after another, each with the cosine of the partial sums up to it, then changed one
by one in cyclic sweeps until none gains. One scale a row. Written from the paper's description, in
numpy float64; here only to be compared with.
"""

import numpy as np


def alphabet(bits: int) -> np.ndarray:
    """Symmetric: -(2^b - 1) / 2, ..., -1/2, 1/2, ..., (2^b - 1) / 2."""
    return np.arange(2**bits) - (2**bits - 1) / 2


def _better(levels: np.ndarray, numerator: np.ndarray, square: np.ndarray) -> np.ndarray:
    """The level of largest cosine for each row; both arguments are [rows, levels]."""
    cosine = numerator / np.sqrt(np.maximum(square, np.finfo(np.float64).tiny))
    return levels[np.argmax(cosine, axis=1)]


def quantize(gram: np.ndarray, weight: np.ndarray, bits: int, sweeps: int = 4) -> np.ndarray:
    """Dequantized weights [rows, features]. `gram` is X^T X, damped where it is singular."""
    levels = alphabet(bits)
    rows, features = weight.shape
    toward = weight @ gram
    codes = np.zeros((rows, features))
    # Of the sums up to feature t: <X w, X q> and |X q|^2.
    inner = np.zeros(rows)
    square = np.zeros(rows)
    for t in range(features):
        seen = codes[:, :t] @ gram[:t, t]
        partial = weight[:, : t + 1] @ gram[: t + 1, t]
        inner += weight[:, t] * seen
        numerator = inner[:, None] + np.outer(partial, levels)
        norms = square[:, None] + 2 * np.outer(seen, levels) + gram[t, t] * levels**2
        codes[:, t] = _better(levels, numerator, norms)
        inner += codes[:, t] * partial
        square += 2 * codes[:, t] * seen + gram[t, t] * codes[:, t] ** 2
    image = codes @ gram
    for _ in range(sweeps):
        # Anew, so that rounding does not add up.
        inner = np.einsum("ij,ij->i", toward, codes)
        square = np.einsum("ij,ij->i", image, codes)
        changed = False
        for t in range(features):
            move = levels[None, :] - codes[:, t : t + 1]
            numerator = inner[:, None] + move * toward[:, t : t + 1]
            norms = square[:, None] + 2 * move * image[:, t : t + 1] + gram[t, t] * move**2
            step = _better(levels, numerator, norms) - codes[:, t]
            if not step.any():
                continue
            changed = True
            inner += step * toward[:, t]
            square += 2 * step * image[:, t] + gram[t, t] * step**2
            codes[:, t] += step
            image += np.outer(step, gram[t])
        if not changed:
            break
    inner = np.einsum("ij,ij->i", toward, codes)
    square = np.einsum("ij,ij->i", image, codes)
    return codes * (inner / square)[:, None]
