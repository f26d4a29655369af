"""OPTQ and Qronos as a textbook has them: numpy float64, one column after the other.

The reference of the tests. It follows the formulas of server/engine/THEORY.md, whose numbers are in
parentheses, and takes nothing from the server but the grid, lambda and the order of a result.
W is [R, N], X and X~ [m, N], codes are unsigned.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Grid:
    """Code u of feature j stands for scale[r, g] (u - zero[r, g]), g = group_of[j]."""

    scale: np.ndarray
    zero: np.ndarray
    group_of: np.ndarray
    top: int

    @staticmethod
    def of(tensors: Mapping[str, np.ndarray], bits: int) -> "Grid":
        """That of a dense result. A negative scale is a positive one with the codes reversed."""
        scale, middle = tensors["scales"].astype(np.float64), 2 ** (bits - 1)
        zero = tensors.get("zeros", np.where(scale < 0, middle - 1, middle))
        features = tensors["weight"].shape[1]
        group_of = tensors.get("g_idx", np.zeros(features, np.int64))
        return Grid(np.abs(scale), zero.astype(np.int64), group_of, 2**bits - 1)

    def codes(self, weight: np.ndarray) -> np.ndarray:
        """The codes of weights that are levels of this grid."""
        unsigned = np.rint(weight / self.scale[:, self.group_of]) + self.zero[:, self.group_of]
        return unsigned.astype(np.int64)

    def levels(self, codes: np.ndarray) -> np.ndarray:
        return self.scale[:, self.group_of] * (codes - self.zero[:, self.group_of])

    def nearest(self, j: int, values: np.ndarray) -> np.ndarray:
        """The codes of feature j nearest to values [R]."""
        g = self.group_of[j]
        code = np.rint(values / self.scale[:, g]) + self.zero[:, g]
        return np.clip(code, 0, self.top).astype(np.int64)

    def level(self, j: int, codes: np.ndarray) -> np.ndarray:
        g = self.group_of[j]
        return self.scale[:, g] * (codes - self.zero[:, g])


@dataclass
class Problem:
    """A layer, what it sees, and how it is damped and ordered."""

    W: np.ndarray
    X: np.ndarray
    damping: float
    by_norm: bool = False
    X_quantized: np.ndarray | None = None

    @property
    def inputs(self) -> np.ndarray:
        """The inputs of the quantized layer: X~, or X where inputs match."""
        return self.X if self.X_quantized is None else self.X_quantized

    @cached_property
    def gram(self) -> np.ndarray:
        return self.inputs.T @ self.inputs

    @property
    def live(self) -> np.ndarray:
        """A mask of the features that are not dead (D3)."""
        return np.diag(self.gram) > 0

    @cached_property
    def order(self) -> np.ndarray:
        """Live features in the order in which they are worked on (O1)."""
        order = np.flatnonzero(self.live)
        if self.by_norm:
            order = order[np.argsort(-np.diag(self.gram)[order], kind="stable")]
        return order

    @property
    def H(self) -> np.ndarray:
        """X~^T X~ + lambda I over live features in working order."""
        damped = self.gram + self.damping * np.eye(len(self.gram))
        return damped[np.ix_(self.order, self.order)]

    @property
    def G(self) -> np.ndarray:
        """X~^T X + lambda I, alike."""
        damped = self.inputs.T @ self.X + self.damping * np.eye(len(self.gram))
        return damped[np.ix_(self.order, self.order)]

    @cached_property
    def factor(self) -> tuple[np.ndarray, np.ndarray]:
        """(M1): H = U D U^T, by the Cholesky factor of H reversed."""
        upper = np.linalg.cholesky(self.H[::-1, ::-1])[::-1, ::-1]
        pivots = np.diag(upper)
        return upper / pivots, pivots**2

    def row_error(self, Q: np.ndarray) -> np.ndarray:
        """|X w - X~ q| of each row; a dead feature's weight adds nothing."""
        return np.linalg.norm(self.outputs - self.inputs @ Q.T, axis=0)

    @cached_property
    def outputs(self) -> np.ndarray:
        """X W^T."""
        return self.X @ self.W.T

    @property
    def energy(self) -> np.ndarray:
        """|X w|^2 of each row."""
        return np.sum(self.outputs**2, axis=0)

    def relative_error(self, Q: np.ndarray) -> float:
        return float(np.linalg.norm(self.row_error(Q)) / np.sqrt(np.sum(self.energy)))

    def rounding_error(self, Q: np.ndarray) -> np.ndarray:
        """e = (W - Q) U over working features: (M2) solved for e."""
        U, _ = self.factor
        return (self.W - Q)[:, self.order] @ U

    def optq(self, grid: Grid) -> np.ndarray:
        """Codes by (M2): v_j = w_j + sum_{k<j} (w_k - q_k) U_kj."""
        U, _ = self.factor
        # [N, R]
        w = np.ascontiguousarray(self.W[:, self.order].T)
        residual = np.zeros_like(w)
        codes = grid.zero[:, grid.group_of]
        for k, j in enumerate(self.order):
            codes[:, j] = grid.nearest(j, w[k] + U[:k, k] @ residual[:k])
            residual[k] = w[k] - grid.level(j, codes[:, j])
        return codes

    def qronos(self, grid: Grid) -> np.ndarray:
        """Codes of the first feature by (M4), of the others nearest to the minimiser of
        |X w - X~ q|^2 over the features not yet rounded, by normal equations."""
        H, G, w = self.H, self.G, self.W[:, self.order]
        codes = grid.zero[:, grid.group_of]
        q = np.zeros_like(w)
        for k, j in enumerate(self.order):
            if k == 0:
                target = (w @ G[0] - w[:, 1:] @ H[0, 1:]) / H[0, 0]
            else:
                right = G[k:] @ w.T - H[k:, :k] @ q[:, :k].T
                target = np.linalg.solve(H[k:, k:], right)[0]
            codes[:, j] = grid.nearest(j, target)
            q[:, k] = grid.level(j, codes[:, j])
        return codes

    def free_weights(self, Q: np.ndarray, group: np.ndarray) -> np.ndarray:
        """The weights of a group (positions in working order) that suit best what was rounded
        before it: w_g + P U_gg^-1 (S5). The group's dynamic scales are found for these."""
        U, _ = self.factor
        before = np.arange(group[0])
        P = (self.W - Q)[:, self.order][:, before] @ U[np.ix_(before, group)]
        return self.W[:, self.order][:, group] + P @ np.linalg.inv(U[np.ix_(group, group)])


def absmax_scale(w: np.ndarray, bits: int, symmetric: bool, shrink: float = 1.0) -> tuple:
    """(S1) of the weights times `shrink`: scale and zero point."""
    high = shrink * max(float(np.max(w, initial=0)), 0.0)
    low = shrink * min(float(np.min(w, initial=0)), 0.0)
    span = 2 * max(high, -low) if symmetric else high - low
    scale = span / (2**bits - 1) if span > 0 else 1.0
    return scale, 2 ** (bits - 1) if symmetric else int(np.rint(-low / scale))


def shrunk_scales(w: np.ndarray, bits: int, symmetric: bool) -> list[tuple]:
    """Loss, scale and zero point of every candidate of (S2)."""
    candidates = []
    for percent in range(80):
        scale, middle = absmax_scale(w, bits, symmetric, 1 - percent / 100)
        for zero in [middle] if symmetric else range(2**bits):
            q = scale * np.clip(np.rint(w / scale), -zero, 2**bits - 1 - zero)
            candidates.append((float(np.sum(np.abs(w - q) ** 2.4)), scale, zero))
    return candidates
