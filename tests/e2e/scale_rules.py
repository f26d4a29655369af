"""What a step must be by the rule it was found with, from the rule's definition alone.

Every set of codes that some scale gives is tried, with the scale that suits it best: all that the
server's searches are spared by bounds and incremental sums is done here in full, in float64.
Numbers in parentheses are the formulas of server/engine/README.md.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Levels:
    bits: int
    symmetric: bool
    # A negative scale reads the codes backwards: levels as of a positive one with one zero point
    # less, which is how it is looked at here.
    signed: bool = False

    @property
    def top(self) -> int:
        return 2**self.bits - 1

    @property
    def zeros(self) -> range:
        middle = 2 ** (self.bits - 1)
        return range(middle - self.signed, middle + 1) if self.symmetric else range(self.top + 1)

    def codes(self, w: np.ndarray, scale: object, zero: int) -> np.ndarray:
        """Signed codes of nearest rounding."""
        return np.clip(np.rint(w / np.asarray(scale)), -zero, self.top - zero)


@dataclass(frozen=True)
class Best:
    error: float
    scale: float
    zero: int


def step_error(
    levels: Levels, w: np.ndarray, metric: np.ndarray, linear: np.ndarray, scale: float, zero: int
) -> float:
    """(w - q)^T M (w - q) + 2 y^T (w - q) with q by nearest rounding (S3)."""
    e = w - scale * levels.codes(w, scale, zero)
    return float(e @ metric @ e + 2 * linear @ e)


def best_step(levels: Levels, w: np.ndarray, metric: np.ndarray, linear: np.ndarray) -> Best:
    """The least of step_error over all positive float32 scales and all zero points (S3)."""
    constant = float(w @ metric @ w + 2 * linear @ w)
    toward = metric @ w + linear
    best = Best(constant, np.inf, levels.zeros[0])
    for zero in levels.zeros:
        limits = np.where(w > 0, levels.top - zero, zero)
        points = [abs(x) / (np.arange(1, t + 1) - 0.5) for x, t in zip(w, limits, strict=True)]
        ends = np.unique(np.concatenate([[0.0], *points]))
        ends = ends[(ends > 0) | (np.arange(len(ends)) == 0)]
        # The float32 scales strictly between two ties.
        low = np.nextafter(ends[:-1].astype(np.float32), np.float32(np.inf))
        low = np.where(ends[:-1].astype(np.float32) > ends[:-1], ends[:-1], low).astype(np.float32)
        high = np.nextafter(ends[1:].astype(np.float32), np.float32(0))
        high = np.where(ends[1:].astype(np.float32) < ends[1:], ends[1:], high).astype(np.float32)
        some = low <= high
        low, high, middle = low[some], high[some], (0.5 * (ends[:-1] + ends[1:]))[some]
        k = levels.codes(w[None, :], middle[:, None], zero)
        a = k @ toward
        b = np.einsum("ij,ij->i", k @ metric, k)
        aim = np.divide(a, b, out=np.zeros_like(a), where=b > 0)
        scale = np.clip(aim.astype(np.float32), low, high).astype(np.float64)
        error = constant - 2 * scale * a + scale**2 * b
        at = int(np.argmin(error)) if len(error) else -1
        if at >= 0 and error[at] < best.error:
            best = Best(float(error[at]), float(scale[at]), zero)
    return best


def descend(
    levels: Levels,
    w: np.ndarray,
    metric: np.ndarray,
    groups: list[np.ndarray],
    passes: int,
) -> list[Best]:
    """Block coordinate descent over the groups of a row (S4), from the weights themselves."""
    change = np.zeros_like(w)
    found = [Best(0.0, 1.0, 0)] * len(groups)
    for _ in range(passes):
        for g, group in enumerate(groups):
            change[group] = 0
            linear = metric[group] @ change
            found[g] = best_step(levels, w[group], metric[np.ix_(group, group)], linear)
            scale, zero = found[g].scale, found[g].zero
            change[group] = w[group] - scale * levels.codes(w[group], scale, zero)
    return found


def absmax_step(levels: Levels, w: np.ndarray, shrink: float = 1.0) -> tuple[float, int]:
    """(S1) of the weights times `shrink`."""
    high = shrink * max(float(np.max(w, initial=0)), 0.0)
    low = shrink * min(float(np.min(w, initial=0)), 0.0)
    span = 2 * max(high, -low) if levels.symmetric else high - low
    scale = span / levels.top if span > 0 else 1.0
    return scale, levels.zeros[-1] if levels.symmetric else int(np.rint(-low / scale))


def shrunk_steps(levels: Levels, w: np.ndarray) -> list[tuple[float, float, int]]:
    """Loss, scale and zero point of every candidate of (S2)."""
    candidates = []
    for shrink in np.arange(80) / 100:
        scale, found = absmax_step(levels, w, 1 - shrink)
        for zero in levels.zeros if levels.symmetric else [found]:
            q = scale * levels.codes(w, scale, zero)
            candidates.append((float(np.sum(np.abs(w - q) ** 2.4)), scale, zero))
    return candidates
