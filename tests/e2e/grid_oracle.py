"""The grid of a result, and everything that is checked of one.

Numbers in parentheses are the formulas of server/engine/README.md.
"""

import numpy as np
from oracle import Run, assert_close, check_bounds, check_damping, check_errors, check_identity
from scale_rules import absmax_step, best_step, descend, shrunk_steps, step_error
from stubs import spec_pb2


def targets(run: Run, group: np.ndarray) -> np.ndarray:
    """What the steps of a group are found for, [R, group]: the weights, or, where scales are
    dynamic, v* = w_g + P U_gg^-1 of (S5). `group` are positions in working order."""
    w = run.W[:, run.working]
    if run.spec.group_scales != spec_pb2.GROUP_SCALES_DYNAMIC or not group.any():
        return w[:, group]
    U, _ = run.factor
    before = np.arange(group[0])
    P = run.residual[:, run.working][:, before] @ U[np.ix_(before, group)]
    return w[:, group] + P @ np.linalg.inv(U[np.ix_(group, group)])


def check_steps_of_weights(run: Run, groups: list[np.ndarray]) -> None:
    """(S1), (S2)."""
    scales, zeros = run.group_step, run.group_zero
    different = 0
    for g, group in enumerate(groups):
        for r, w in enumerate(targets(run, group)):
            scale, zero = absmax_step(run.levels, w)
            if run.spec.scale == spec_pb2.SCALE_RULE_MSE:
                candidates = shrunk_steps(run.levels, w)
                least, scale, zero = min(candidates)
                # Of equals float32 may prefer another.
                stored = scales[r, g], zeros[r, g]
                taken = min(candidates, key=lambda c: (abs(c[1] - stored[0]), c[2] != stored[1]))
                if taken[0] <= least * (1 + 1e-4):
                    _, scale, zero = taken
            assert_close(scales[r, g], scale, 1e-6, f"scale {r}, {g}")
            different += zeros[r, g] != zero
            assert abs(zeros[r, g] - zero) <= 1
    # One may sit on a tie that float32 sees the other way.
    assert different <= max(1, zeros.size // 1000)


def metric_of(run: Run) -> np.ndarray:
    """What (S3) to (S5) weigh errors by, in working order. The inputs are not mismatched."""
    if run.spec.scale == spec_pb2.SCALE_RULE_COMPENSATED:
        return np.diag(run.factor[1])
    if run.spec.scale_objective == spec_pb2.SCALE_OBJECTIVE_DATA_FREE:
        return np.eye(len(run.working))
    return run.calibration.damped(run.certificate.lambda_used)[np.ix_(run.working, run.working)]


def check_steps(run: Run) -> None:
    """Scales and zero points are the best there are by the rule that was asked for."""
    if run.spec.polish > 0:
        # (S6) has moved them.
        return
    scales, zeros = run.group_step, run.group_zero
    # Positions in working order.
    groups = [np.flatnonzero(run.groups[run.working] == g) for g in range(scales.shape[1])]
    if run.spec.scale in (spec_pb2.SCALE_RULE_ABSMAX, spec_pb2.SCALE_RULE_MSE):
        check_steps_of_weights(run, groups)
        return

    metric = metric_of(run)
    dynamic = run.spec.group_scales == spec_pb2.GROUP_SCALES_DYNAMIC
    if run.spec.scale_passes > 0 and len(groups) > 1 and not dynamic:
        for r, w in enumerate(run.W[:, run.working]):
            found = descend(run.levels, w, metric, groups, run.spec.scale_passes)
            assert_close(scales[r], [step.scale for step in found], 1e-6, f"scales of row {r} (S4)")
            np.testing.assert_array_equal(zeros[r], [step.zero for step in found])
        return
    # Trials are 1.02^k times the best, the powers 0, -1, 1, -2, ...
    trial = np.arange(max(run.spec.scale_trials, 1))
    factors = 1.02 ** ((trial + 1) // 2 * np.where(trial % 2 == 1, -1.0, 1.0))
    if dynamic:
        # Targets that moved are float32 in the sweep: what is next to a tie there may be on its
        # other side here.
        factors = np.outer(factors, (1, 1 - 1e-6, 1 + 1e-6)).ravel()
    for g, group in enumerate(groups):
        within = metric[np.ix_(group, group)]
        nothing = np.zeros(len(group))
        for r, w in enumerate(targets(run, group)):
            best = best_step(run.levels, w, within, nothing)
            found = [
                step_error(run.levels, w, within, nothing, scales[r, g] / factor, zeros[r, g])
                for factor in factors
            ]
            assert min(found) <= best.error * (1 + 1e-5), f"step {r}, {g}: {found}, not {best}"


def check_grid(run: Run) -> None:
    """Every weight is a level, and the levels are those of the rule that was asked for."""
    rows, features = run.W.shape
    groups = int(run.groups[-1]) + 1
    live = run.calibration.live
    top = 2**run.bits - 1
    assert run.quantized.dtype == "F32"
    assert run.Q.shape == (rows, features)
    assert run.scales.dtype == "F32"
    assert run.scales.array.shape == (rows, groups)
    scales = run.scales.float64()
    assert np.isfinite(scales).all()
    assert (run.group_step > 0).all()
    assert run.spec.signed_scales or (scales > 0).all()
    if run.g_idx is not None:
        np.testing.assert_array_equal(run.g_idx.array, run.groups)
    assert (run.g_idx is not None) == (run.group_size != 0)

    if run.symmetric:
        assert run.zeros is None
    else:
        assert run.zeros is not None
        assert run.zeros.dtype == "I32"
        assert run.zeros.array.shape == scales.shape
        assert run.zeros.array.min() >= 0
        assert run.zeros.array.max() <= top
    check_steps(run)

    assert (run.Q[:, ~live] == 0).all()
    codes = run.codes[:, live]
    assert codes.min() >= 0
    assert codes.max() <= top
    step = run.step.astype(np.float32)
    level = step * (run.codes - run.zero).astype(np.float32)
    np.testing.assert_array_equal(run.quantized.array[:, live], level[:, live])


def check_everything(run: Run) -> None:
    check_identity(run)
    check_grid(run)
    check_damping(run)
    check_errors(run)
    check_bounds(run)
