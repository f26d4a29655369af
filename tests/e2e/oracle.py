"""What a result must be, in float64, from the raw data and the output file alone.

Numbers in parentheses are the formulas of server/engine/README.md. Nothing of the server's
own arithmetic is used: W, X are what was sent, Q and the grid what came back.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from safetensors_file import Tensor
from scale_rules import Levels
from stubs import certificate_pb2, spec_pb2

# The contract's promise for relative_error; squares have twice that.
RELATIVE = 1e-4
SQUARED = 2e-4
# What follows from D, which feels the sums' own 1e-6 a little more.
FROM_FACTOR = 1e-4
# Rounding of the report's own sums, far below what is promised.
EXACT = 1e-9
# The sweep works in float32: an error that small beside |X W^T| is its noise, not a number.
NOISE = 1e-6


@dataclass
class Calibration:
    """Activations X [m, N] and what follows from them; factors are kept by lambda."""

    x: Tensor
    _factors: dict[tuple[float, bool], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @cached_property
    def X(self) -> np.ndarray:
        return self.x.float64()

    @cached_property
    def gram(self) -> np.ndarray:
        return self.X.T @ self.X

    @cached_property
    def live(self) -> np.ndarray:
        """Which features are not dead (D3)."""
        return np.diag(self.gram) > 0

    def damped(self, damping: float) -> np.ndarray:
        return self.gram + damping * np.eye(self.gram.shape[0])

    def working(self, by_norm: bool) -> np.ndarray:
        """Live features in the order in which they are worked on (O1)."""
        order = np.flatnonzero(self.live)
        if by_norm:
            order = order[np.argsort(-np.diag(self.gram)[order], kind="stable")]
        return order

    def factor(self, damping: float, by_norm: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(M1): H = U D U^T, by the Cholesky factor of H reversed. Over working features."""
        key = (damping, by_norm)
        if key not in self._factors:
            order = self.working(by_norm)
            H = self.damped(damping)[np.ix_(order, order)]
            lower = np.linalg.cholesky(H[::-1, ::-1])
            upper = lower[::-1, ::-1]
            pivots = np.diag(upper)
            self._factors[key] = (upper / pivots, pivots**2)
        return self._factors[key]


@dataclass
class Run:
    """One layer that went through the service."""

    weight: Tensor
    calibration: Calibration
    bits: int
    symmetric: bool
    group_size: int
    quantized: Tensor
    scales: Tensor
    zeros: Tensor | None
    g_idx: Tensor | None
    certificate: certificate_pb2.Certificate

    @cached_property
    def W(self) -> np.ndarray:
        return self.weight.float64()

    @cached_property
    def Q(self) -> np.ndarray:
        return self.quantized.float64()

    @property
    def spec(self) -> spec_pb2.QuantizationSpec:
        """Every setting as decided."""
        return self.certificate.spec

    @property
    def levels(self) -> Levels:
        return Levels(self.bits, self.symmetric, self.spec.signed_scales)

    @cached_property
    def working(self) -> np.ndarray:
        """Live features in working order."""
        return self.calibration.working(self.spec.order == spec_pb2.ORDER_DECREASING_NORM)

    @property
    def factor(self) -> tuple[np.ndarray, np.ndarray]:
        """U and D over working features, with the lambda that was used."""
        by_norm = self.spec.order == spec_pb2.ORDER_DECREASING_NORM
        return self.calibration.factor(self.certificate.lambda_used, by_norm)

    @property
    def groups(self) -> np.ndarray:
        """The group of each feature."""
        features = np.arange(self.W.shape[1])
        return features // self.group_size if self.group_size else np.zeros_like(features)

    @cached_property
    def group_step(self) -> np.ndarray:
        """delta [R, groups], positive."""
        return np.abs(self.scales.float64())

    @cached_property
    def group_zero(self) -> np.ndarray:
        """Zero points [R, groups] in unsigned codes, those of a negative scale read backwards."""
        if self.zeros is not None:
            return self.zeros.array.astype(np.int64)
        middle = 2 ** (self.bits - 1)
        return np.where(self.scales.float64() < 0, middle - 1, middle)

    @cached_property
    def step(self) -> np.ndarray:
        """delta [R, N]."""
        return self.group_step[:, self.groups]

    @cached_property
    def zero(self) -> np.ndarray:
        """Zero points [R, N]."""
        return self.group_zero[:, self.groups]

    @cached_property
    def codes(self) -> np.ndarray:
        """Unsigned codes [R, N], recovered from the dequantized weights."""
        return np.rint(self.Q / self.step).astype(np.int64) + self.zero

    @cached_property
    def residual(self) -> np.ndarray:
        """W - Q where it counts: a dead feature's weight becomes 0 and adds nothing."""
        return np.where(self.calibration.live, self.W - self.Q, 0.0)

    @cached_property
    def row_error(self) -> np.ndarray:
        return np.linalg.norm(self.calibration.X @ self.residual.T, axis=0)

    @cached_property
    def rounding_error(self) -> np.ndarray:
        """e = (W - Q) U over working features: (M2) solved for e, the same as (M3)."""
        U, _ = self.factor
        return self.residual[:, self.working] @ U

    @cached_property
    def nearest(self) -> np.ndarray:
        """Plain rounding on the same grid."""
        code = np.rint(self.W / self.step) + self.zero
        Q = self.step * (np.clip(code, 0, 2**self.bits - 1) - self.zero)
        return np.where(self.calibration.live, Q, 0.0)


def assert_close(
    found: object, expected: object, relative: float, what: str, noise: object = 0.0
) -> None:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, what
    allowed = relative * np.abs(expected) + np.asarray(noise)
    excess = np.abs(found - expected) - allowed
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 0, f"{what}{list(worst)}: {found[worst]}, not {expected[worst]}"


def check_identity(run: Run) -> None:
    """What went in, what was asked for, and how it went."""
    found = run.certificate
    rows, features = run.W.shape
    x = run.calibration.x
    groups = int(run.groups[-1]) + 1
    stored = run.bits * rows * features + 32 * rows * groups
    if not run.symmetric:
        stored += run.bits * rows * groups
    assert found.schema_version == 1
    assert found.engine_version
    assert found.isa in {"x86-64-v2", "x86-64-v3", "x86-64-v4"}
    assert found.weights_sha256 == hashlib.sha256(run.weight.data).hexdigest()
    assert found.x_sha256 == hashlib.sha256(x.data).hexdigest()
    assert found.x_quantized_sha256 == ""
    assert (found.rows, found.features) == (rows, features)
    assert found.tokens == x.array.shape[0]
    assert found.held_out_tokens == 0
    assert found.method == spec_pb2.METHOD_OPTQ
    assert found.bits == run.bits
    assert found.symmetric == run.symmetric
    assert found.group_size == run.group_size
    assert found.outcome == certificate_pb2.OUTCOME_QUANTIZED
    assert found.dead_features == np.count_nonzero(~run.calibration.live)
    assert_close(found.bits_per_weight, stored / (rows * features), EXACT, "bits_per_weight")
    seconds = found.phase_seconds
    for phase in ("receive", "queue", "factor", "round", "certify", "reference", "pack"):
        assert getattr(seconds, phase) >= 0


def check_damping(run: Run) -> None:
    """The attempts tell a story that ends with the lambda used."""
    attempts = run.certificate.damping_attempts
    assert attempts
    assert attempts[-1].cause == certificate_pb2.STABILITY_CAUSE_NONE
    assert all(a.cause != certificate_pb2.STABILITY_CAUSE_NONE for a in attempts[:-1])
    assert getattr(attempts[0], "lambda") == run.certificate.lambda_requested
    assert getattr(attempts[-1], "lambda") == run.certificate.lambda_used
    live = run.calibration.live
    H = run.calibration.damped(run.certificate.lambda_used)[np.ix_(live, live)]
    condition = np.linalg.cond(H, 1)
    if condition < 1e6:
        # Above it the sums' own noise decides. Higham's estimate is a lower bound, rarely more
        # than threefold.
        assert condition / 10 < run.certificate.condition_estimate < condition * 1.1


def check_errors(run: Run) -> None:
    """True errors against a recomputation from the raw data."""
    found = run.certificate
    row_energy = np.sum((run.calibration.X @ run.W.T) ** 2, axis=0)
    energy = float(np.sum(row_energy))
    noise = NOISE**2 * energy
    squared = float(np.sum(run.row_error**2))
    damping = found.lambda_used
    damped = squared + damping * float(np.sum(run.residual**2))
    assert_close(found.reference_energy, energy, SQUARED, "reference_energy")
    assert_close(found.squared_error, squared, SQUARED, "squared_error", noise)
    relative = np.sqrt(squared / energy)
    assert_close(found.relative_error, relative, RELATIVE, "relative_error", NOISE)
    row_noise = NOISE * np.sqrt(row_energy)
    assert_close(found.row_error, run.row_error, RELATIVE, "row_error", row_noise)
    assert_close(found.damped_squared_error, damped, SQUARED, "damped_squared_error", noise)
    # (M3) in the oracle's own factor: the identity itself.
    _, D = run.factor
    assert_close(np.sum(run.rounding_error**2 * D), damped, SQUARED, "(M3)", noise)
    assert 0 <= found.identity_residual < 1e-3
    if found.HasField("nearest_relative_error"):
        E = np.where(run.calibration.live, run.W - run.nearest, 0.0)
        nearest = float(np.linalg.norm(run.calibration.X @ E.T)) / np.sqrt(energy)
        # The largest weight of a group lies on a tie (S1), decided by the last bit of w / delta.
        assert_close(found.nearest_relative_error, nearest, 5e-3, "nearest_relative_error", NOISE)


def check_bounds(run: Run) -> None:
    """(B1) holds for every row and the layer, and is what its formula says."""
    found = run.certificate
    live = run.working
    _, D = run.factor
    half = run.step[:, live] / 2
    e = np.abs(run.rounding_error)
    row_bound = np.sqrt(np.sum(np.maximum(half, e) ** 2 * D, axis=1))
    assert_close(found.c2, np.sqrt(np.mean(D)), FROM_FACTOR, "c2")
    assert_close(found.c_inf, np.sqrt(np.max(D)), FROM_FACTOR, "c_inf")
    assert_close(found.row_bound, row_bound, RELATIVE, "row_bound")
    assert_close(found.l2_bound, np.linalg.norm(row_bound), RELATIVE, "l2_bound")
    assert_close(found.l2_bound, np.linalg.norm(found.row_bound), 1e-6, "l2_bound of rows")
    # Against the truth, not against the certificate's word.
    assert (run.row_error <= np.asarray(found.row_bound)).all()
    assert np.linalg.norm(run.row_error) <= found.l2_bound
    assert (np.asarray(found.row_error) <= np.asarray(found.row_bound)).all()
    assert np.sqrt(found.squared_error) <= found.l2_bound
    assert np.sqrt(found.damped_squared_error) <= found.l2_bound * (1 + 1e-6)

    # Weights that sit on the edge of their cell may be counted either way: the sweep's float32
    # carries so much of a step, and the sums determine the factor so well.
    edge = max(1e-4, 4e-6 * 2**run.bits, 3e-10 * found.condition_estimate)
    # A code that polish chose may be far from its target inside the grid: that is not clipped.
    codes = run.codes[:, live]
    outermost = np.where(run.rounding_error > 0, codes == 2**run.bits - 1, codes == 0)
    surely = outermost & (e > half * (1 + edge))
    maybe = outermost & (e > half * (1 - edge))
    assert np.count_nonzero(surely) <= found.clipped_weights <= np.count_nonzero(maybe)
    rows_surely = np.count_nonzero(surely.any(axis=1))
    assert rows_surely <= found.clipped_rows <= np.count_nonzero(maybe.any(axis=1))
    overshoot = float(np.max((e / run.step[:, live] - 0.5)[outermost], initial=0))
    if found.clipped_weights:
        assert_close(found.worst_overshoot, overshoot, 1e-2, "worst_overshoot")
    else:
        assert found.worst_overshoot == 0
    if found.HasField("predicted_squared_error"):
        predicted = float(np.sum(run.step[:, live] ** 2 * D)) / 12
        assert_close(found.predicted_squared_error, predicted, FROM_FACTOR, "(P1)")
    if found.HasField("rate_gap_bits"):
        gap = (np.log2(np.mean(D)) - np.mean(np.log2(D))) / 2
        # The smallest D feel the noise of the sums as much as H is ill-conditioned.
        rtol = max(FROM_FACTOR, 3e-10 * found.condition_estimate)
        np.testing.assert_allclose(found.rate_gap_bits, gap, rtol=rtol, atol=1e-6)
