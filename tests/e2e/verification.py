"""Layers in files, what certiq made of them, and whether that is true.

`certiq verify` recomputes all that a report certifies; the textbook recomputes codes and errors
once more, without any code of certiq's.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import certiq
import ml_dtypes
import numpy as np
import textbook
from google.protobuf import json_format
from programs import certiq as command
from safetensors.numpy import load_file, save_file
from stubs import certificate_pb2, spec_pb2

# The contract's promise for relative_error; squares have twice that.
RELATIVE = 1e-4
SQUARED = 2e-4
# The sweep works in float32: an error that small beside |X W^T| is its noise, not a number.
NOISE = 1e-6
# One value at a tie that is rounded the other way takes the rest of its row along.
LEAST_AGREEMENT = 0.998
SAME_ERROR = 1e-3
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}


@dataclass(frozen=True)
class Layer:
    """A layer in safetensors files."""

    weights_file: Path
    weight: str
    activations_file: Path
    x: str
    x_quantized: str = ""

    def flags(self) -> list[str]:
        return [
            *("--weights", str(self.weights_file), "--weight", self.weight),
            *("--activations", str(self.activations_file), "--x", self.x),
            *(("--x_quantized", self.x_quantized) if self.x_quantized else ()),
        ]


@dataclass
class Run:
    """A layer that went through the service, dense, and the files that came of it."""

    layer: Layer
    output: Path
    report: Path

    @cached_property
    def stored_weight(self) -> np.ndarray:
        return load_file(self.layer.weights_file)[self.layer.weight]

    @cached_property
    def activations(self) -> dict[str, np.ndarray]:
        return load_file(self.layer.activations_file)

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """By role: "weight", "scales", "zeros", "g_idx"."""
        prefix = self.layer.weight.removesuffix(".weight") + "."
        found = load_file(self.output)
        weight = found.pop(self.layer.weight)
        return {"weight": weight} | {name.removeprefix(prefix): t for name, t in found.items()}

    @cached_property
    def certificate(self) -> certificate_pb2.Certificate:
        return json_format.Parse(self.report.read_text(), certificate_pb2.Certificate())

    @cached_property
    def grid(self) -> textbook.Grid:
        return textbook.Grid.of(self.tensors, self.certificate.bits)

    @cached_property
    def Q(self) -> np.ndarray:
        return self.tensors["weight"].astype(np.float64)

    @cached_property
    def codes(self) -> np.ndarray:
        return self.grid.codes(self.Q)

    @cached_property
    def problem(self) -> textbook.Problem:
        """With lambda and the order that were used."""
        seen = self.activations.get(self.layer.x_quantized)
        return textbook.Problem(
            self.stored_weight.astype(np.float64),
            self.activations[self.layer.x].astype(np.float64),
            self.certificate.lambda_used,
            self.certificate.spec.order == spec_pb2.ORDER_DECREASING_NORM,
            None if seen is None else seen.astype(np.float64),
        )


def store(
    folder: Path,
    weight: np.ndarray,
    x: np.ndarray,
    result: certiq.Layer,
    x_quantized: np.ndarray | None = None,
) -> Run:
    """A run of the package, in files."""
    layer = Layer(
        *(folder / "layer.safetensors", "w.weight", folder / "layer.safetensors", "x"),
        x_quantized="" if x_quantized is None else "x_quantized",
    )
    stored = {"w.weight": weight, "x": x, "x_quantized": x_quantized}
    save_file(
        {k: np.ascontiguousarray(v) for k, v in stored.items() if v is not None}, layer.weights_file
    )
    run = Run(layer, folder / "result.safetensors", folder / "report.json")
    save_file({f"w.{role}": tensor for role, tensor in result.tensors.items()}, run.output)
    run.report.write_text(
        json_format.MessageToJson(result.certificate, preserving_proto_field_name=True)
    )
    return run


def verify(run: Run) -> None:
    """`certiq verify` finds nothing wrong: digests, lambda, condition, errors, bounds, clipping,
    rounding."""
    done = command(
        *("verify", *run.layer.flags()),
        *("--result", str(run.output), "--report", str(run.report)),
    )
    assert done.returncode == 0, done.stdout + done.stderr


def check_report(run: Run) -> None:
    """The part of a report that `certiq verify` cannot know."""
    found = run.certificate
    assert found.engine_version
    assert found.isa in {"x86-64-v2", "x86-64-v3", "x86-64-v4"}
    assert found.outcome == certificate_pb2.OUTCOME_QUANTIZED
    assert 0 <= found.identity_residual < 1e-3
    for phase in found.phase_seconds.DESCRIPTOR.fields:
        assert getattr(found.phase_seconds, phase.name) >= 0


def check_grid(run: Run) -> None:
    """Tensors are there, of their types and shapes, and every weight is a level exactly."""
    found, spec = run.tensors, run.certificate.spec
    rows, features = run.stored_weight.shape
    size = spec.group_size or features
    shape = (rows, -(-features // size))
    expected = {"weight": ("<f4", (rows, features)), "scales": ("<f4", shape)}
    if not spec.symmetric:
        expected["zeros"] = ("<i4", shape)
    if spec.group_size:
        expected["g_idx"] = ("<i4", (features,))
    assert {name: (t.dtype.str, t.shape) for name, t in found.items()} == expected
    if spec.group_size:
        group_of = np.empty(features, int)
        dynamic = spec.group_scales == spec_pb2.GROUP_SCALES_DYNAMIC
        group_of[run.problem.order if dynamic else np.arange(features)] = (
            np.arange(features) // size
        )
        np.testing.assert_array_equal(found["g_idx"], group_of)
    scales = found["scales"]
    assert np.isfinite(scales).all()
    assert (scales != 0).all() if spec.signed_scales else (scales > 0).all()
    live, grid = run.problem.live, run.grid
    assert (found["weight"][:, ~live] == 0).all()
    codes = run.codes
    assert codes[:, live].min() >= 0
    assert codes[:, live].max() <= grid.top
    steps = (codes - grid.zero[:, grid.group_of]).astype(np.float32)
    levels = grid.scale.astype(np.float32)[:, grid.group_of] * steps
    np.testing.assert_array_equal(found["weight"][:, live], levels[:, live])
    if spec.polish == 0 and spec.scale in (spec_pb2.SCALE_RULE_ABSMAX, spec_pb2.SCALE_RULE_MSE):
        check_scales(run)


def check_scales(run: Run) -> None:
    """(S1), (S2). The rules that weigh errors by the inputs are held against every scale there is
    in tests/engine."""
    spec, grid, problem = run.certificate.spec, run.grid, run.problem
    different = 0
    for g in range(grid.scale.shape[1]):
        group = np.flatnonzero(grid.group_of[problem.order] == g)
        targets = problem.W[:, problem.order][:, group]
        if spec.group_scales == spec_pb2.GROUP_SCALES_DYNAMIC and len(group):
            targets = problem.free_weights(run.Q, group)
        for r, w in enumerate(targets):
            stored = grid.scale[r, g], grid.zero[r, g]
            scale, zero = textbook.absmax_scale(w, spec.bits, spec.symmetric)
            if spec.scale == spec_pb2.SCALE_RULE_MSE:
                candidates = textbook.shrunk_scales(w, spec.bits, spec.symmetric)
                if spec.signed_scales:
                    # A row turned over has the codes of its negative.
                    candidates += [
                        (loss, s, 2**spec.bits - 1 - z)
                        for loss, s, z in textbook.shrunk_scales(-w, spec.bits, True)
                    ]
                least = min(candidates)[0]
                # Among equal losses float32 may prefer another candidate.
                taken = min(candidates, key=lambda c: (abs(c[1] - stored[0]), c[2] != stored[1]))
                _, scale, zero = taken if taken[0] <= least * (1 + 1e-4) else min(candidates)
            np.testing.assert_allclose(stored[0], scale, rtol=1e-6, err_msg=f"scale {r}, {g}")
            different += stored[1] != zero
            assert abs(stored[1] - zero) <= 1
    # One may sit on a tie that float32 sees the other way.
    assert different <= max(1, grid.zero.size // 1000)


def check_errors(run: Run) -> None:
    """Errors from the raw data, and (M3) in the textbook's own factor."""
    found, problem = run.certificate, run.problem
    row_error, energy = problem.row_error(run.Q), problem.energy
    squared, total = float(np.sum(row_error**2)), float(np.sum(energy))
    noise = NOISE**2 * total
    live = problem.live
    damped = squared + problem.damping * float(np.sum((problem.W - run.Q)[:, live] ** 2))
    for value, expected, rtol, atol in (
        (found.reference_energy, total, SQUARED, 0),
        (found.squared_error, squared, SQUARED, noise),
        (found.relative_error, np.sqrt(squared / total), RELATIVE, NOISE),
        (found.damped_squared_error, damped, SQUARED, noise),
    ):
        np.testing.assert_allclose(value, expected, rtol, atol)
    excess = np.abs(found.row_error - row_error) - RELATIVE * row_error - NOISE * np.sqrt(energy)
    assert excess.max() <= 0
    if problem.X_quantized is None:
        _, D = problem.factor
        identity = np.sum(problem.rounding_error(run.Q) ** 2 * D)
        np.testing.assert_allclose(identity, damped, SQUARED, noise)


def check_codes(run: Run) -> None:
    """The textbook's codes on the same grid, but for ties."""
    qronos = run.certificate.method == spec_pb2.METHOD_QRONOS
    codes = run.problem.qronos(run.grid) if qronos else run.problem.optq(run.grid)
    live = run.problem.live
    # Small layers may have one row that differs.
    rows = np.any(codes[:, live] != run.codes[:, live], axis=1)
    agree = np.mean(codes[:, live] == run.codes[:, live])
    assert agree >= LEAST_AGREEMENT or np.count_nonzero(rows) <= 1, agree
    expected = run.problem.relative_error(run.grid.levels(codes))
    np.testing.assert_allclose(run.certificate.relative_error, expected, SAME_ERROR, NOISE)


def check_everything(run: Run) -> None:
    verify(run)
    check_report(run)
    check_grid(run)
    check_errors(run)
    if not run.certificate.HasField("polish"):
        check_codes(run)
