"""Headers that every way refuses with one answer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from answers import (
    CALIBRATED,
    EVERY,
    FEATURES,
    JOBS,
    ON_THE_WIRE,
    RAW,
    ROWS,
    TOKENS,
    WITH_X,
    Request,
    activations,
)
from stubs import spec_pb2, tensor_pb2

INVALID = "INVALID_ARGUMENT"
UNIMPLEMENTED = "UNIMPLEMENTED"
PRECONDITION = "FAILED_PRECONDITION"
NOT_FOUND = "NOT_FOUND"
EXHAUSTED = "RESOURCE_EXHAUSTED"
UNAVAILABLE = "UNAVAILABLE"

Change = Callable[[Request], object]


@dataclass(frozen=True)
class Bad:
    """A change that makes a request a bad one, and the field it is bad in."""

    change: Change
    field: str
    ways: tuple[str, ...] = EVERY
    code: str = INVALID
    # False where the package says it in words of its own, before it sends anything.
    text: bool = True


def spec_with(**fields: object) -> Change:
    return lambda request: request.spec.MergeFrom(spec_pb2.QuantizationSpec(**fields))


def damping_with(**fields: object) -> Change:
    return lambda request: request.spec.damping.MergeFrom(spec_pb2.Damping(**fields))


def ladder(*steps: float, climb: bool = False) -> Change:
    return damping_with(held_out=spec_pb2.HeldOutDamping(ladder=steps, climb=climb))


def unknown(name: str) -> Change:
    """An enum's value that no contract has."""
    return lambda request: setattr(request.spec, name, 99)


def grid_with(
    scales: Iterable[float] | None = None, symmetric: bool = True, bits: int = 4, **fields: object
) -> Change:
    """A scale a row, unless given; zero points in the middle for asymmetric grids."""

    def change(request: Request) -> None:
        request.spec.bits = bits
        request.spec.symmetric = symmetric
        grid = request.spec.grid
        if not symmetric:
            grid.zero_points[:] = [1 << (bits - 1)] * ROWS
        grid.MergeFrom(spec_pb2.ExplicitGrid(scales=[1.0] * ROWS if scales is None else scales))
        for name, value in fields.items():
            if isinstance(value, list):
                getattr(grid, name)[:] = value
            else:
                setattr(grid, name, value)

    return change


def both(*changes: Change) -> Change:
    return lambda request: [change(request) for change in changes]


def set_weight(**fields: object) -> Change:
    def change(request: Request) -> None:
        for name, value in fields.items():
            if name == "shape":
                request.weight.shape[:] = value
            else:
                setattr(request.weight, name, value)

    return change


def set_field(name: str, value: object) -> Change:
    return lambda request: setattr(request, name, value)


S = spec_pb2
NEAREST = spec_with(method=S.METHOD_NEAREST)
PISO = spec_with(scale=S.SCALE_RULE_PISO)
STOCHASTIC = spec_with(rounding=S.ROUNDING_STOCHASTIC)
GPTQ = spec_with(format=S.FORMAT_GPTQ)
PACKED = spec_with(format=S.FORMAT_COMPRESSED_TENSORS)
HALF = spec_with(scale_dtype=tensor_pb2.DATA_TYPE_F16)

BAD: dict[str, Bad] = {
    # Names and sizes.
    "request_id too long": Bad(set_field("request_id", "r" * 129), "request_id"),
    "layer_name too long": Bad(set_field("layer_name", "n" * 257), "layer_name"),
    "weight name too long": Bad(set_weight(name="n" * 257), "weight.name", RAW),
    "no weight": Bad(set_field("weight", None), "weight", RAW),
    "no dtype": Bad(set_weight(dtype=0), "weight.dtype", RAW),
    "dtype unknown": Bad(set_weight(dtype=99), "weight.dtype", RAW),
    "dtype integer": Bad(set_weight(dtype=tensor_pb2.DATA_TYPE_I32), "weight.dtype", RAW),
    "no shape": Bad(set_weight(shape=[]), "weight.shape", RAW),
    "one dimension": Bad(set_weight(shape=[ROWS]), "weight.shape", RAW),
    "three dimensions": Bad(set_weight(shape=[ROWS, FEATURES, 1]), "weight.shape", RAW),
    "no rows": Bad(set_weight(shape=[0, FEATURES]), "weight.shape", RAW),
    "rows below 0": Bad(set_weight(shape=[-1, FEATURES]), "weight.shape", RAW),
    "too many rows": Bad(set_weight(shape=[(1 << 20) + 1, FEATURES]), "weight.shape", RAW),
    "no features": Bad(set_weight(shape=[ROWS, 0]), "weight.shape", RAW),
    "too many features": Bad(set_weight(shape=[ROWS, (1 << 16) + 1]), "weight.shape", RAW),
    "too many elements": Bad(set_weight(shape=[1 << 20, 1 << 16]), "weight.shape", RAW),
    "elements overflow": Bad(set_weight(shape=[1 << 62, 1 << 62]), "weight.shape", RAW),
    # The spec, field by field.
    "bits 1": Bad(spec_with(bits=1), "spec.bits"),
    "bits 9": Bad(spec_with(bits=9), "spec.bits"),
    "group_size 7": Bad(spec_with(group_size=7), "spec.group_size"),
    "group_size -1": Bad(spec_with(group_size=-1), "spec.group_size"),
    "scale_dtype I32": Bad(spec_with(scale_dtype=tensor_pb2.DATA_TYPE_I32), "spec.scale_dtype"),
    "objective without PiSO": Bad(
        spec_with(scale_objective=S.SCALE_OBJECTIVE_INPUTS), "spec.scale_objective"
    ),
    "passes without PiSO": Bad(spec_with(scale_passes=1), "spec.scale_passes"),
    "passes -1": Bad(both(PISO, spec_with(scale_passes=-1)), "spec.scale_passes"),
    "passes 65": Bad(both(PISO, spec_with(scale_passes=65, group_size=8)), "spec.scale_passes"),
    "passes without groups": Bad(both(PISO, spec_with(scale_passes=1)), "spec.scale_passes"),
    "passes without data": Bad(
        both(
            PISO,
            spec_with(scale_passes=1, group_size=8, scale_objective=S.SCALE_OBJECTIVE_DATA_FREE),
        ),
        "spec.scale_passes",
    ),
    "passes of dynamic groups": Bad(
        both(
            PISO,
            spec_with(scale_passes=1, group_size=8, group_scales=S.GROUP_SCALES_DYNAMIC),
        ),
        "spec.scale_passes",
    ),
    "compensated without feedback": Bad(
        both(NEAREST, spec_with(scale=S.SCALE_RULE_COMPENSATED)), "spec.scale"
    ),
    "signed scales, asymmetric": Bad(
        spec_with(signed_scales=True, symmetric=False, scale=S.SCALE_RULE_MSE),
        "spec.signed_scales",
    ),
    "signed scales without a search": Bad(spec_with(signed_scales=True), "spec.signed_scales"),
    "trials 0": Bad(spec_with(scale_trials=0), "spec.scale_trials"),
    "trials 33": Bad(spec_with(scale_trials=33), "spec.scale_trials"),
    "trials of nearest": Bad(both(NEAREST, spec_with(scale_trials=2)), "spec.scale_trials"),
    "trials of a grid": Bad(both(grid_with(), spec_with(scale_trials=2)), "spec.scale_trials"),
    "polish -1": Bad(spec_with(polish=-1), "spec.polish"),
    "polish 65": Bad(spec_with(polish=65), "spec.polish"),
    "polish, stochastic": Bad(both(STOCHASTIC, spec_with(polish=1)), "spec.polish"),
    "relative_trace -1": Bad(damping_with(relative_trace=-1), "spec.damping.relative_trace"),
    "relative_trace nan": Bad(
        damping_with(relative_trace=float("nan")), "spec.damping.relative_trace"
    ),
    "absolute -1": Bad(damping_with(absolute=-1), "spec.damping.absolute"),
    "sigma_max infinite": Bad(
        damping_with(relative_sigma_max=float("inf")), "spec.damping.relative_sigma_max"
    ),
    "ladder with 0": Bad(ladder(0.1, 0), "spec.damping.held_out.ladder"),
    "ladder of 33": Bad(ladder(*[0.1] * 33), "spec.damping.held_out.ladder"),
    "ladder that falls": Bad(ladder(0.1, 0.01, climb=True), "spec.damping.held_out.ladder"),
    "attempts 0": Bad(damping_with(max_attempts=0), "spec.damping.max_attempts"),
    "attempts 21": Bad(damping_with(max_attempts=21), "spec.damping.max_attempts"),
    "factor 1": Bad(damping_with(factor=1), "spec.damping.factor"),
    "failure_probability 0": Bad(
        spec_with(certificate=S.CertificateOptions(failure_probability=0)),
        "spec.certificate.failure_probability",
    ),
    "failure_probability 1": Bad(
        spec_with(certificate=S.CertificateOptions(failure_probability=1)),
        "spec.certificate.failure_probability",
    ),
    "min_tokens 0": Bad(spec_with(min_tokens=0), "spec.min_tokens"),
    # The explicit grid.
    "grid of dynamic groups": Bad(
        both(grid_with(), spec_with(group_scales=S.GROUP_SCALES_DYNAMIC)), "spec.group_scales"
    ),
    "grid: zeros, symmetric": Bad(grid_with(zero_points=[8] * ROWS), "spec.grid.zero_points"),
    "grid: no zeros, asymmetric": Bad(
        grid_with(symmetric=False, zero_points=[]), "spec.grid.zero_points"
    ),
    "grid: lowest_code -1": Bad(grid_with(lowest_code=-1), "spec.grid.lowest_code"),
    "grid: codes upside down": Bad(
        grid_with(lowest_code=9, highest_code=8), "spec.grid.lowest_code"
    ),
    "grid: highest_code 16": Bad(grid_with(highest_code=16), "spec.grid.highest_code"),
    "grid: no zero among the codes": Bad(grid_with(lowest_code=9), "spec.grid.lowest_code"),
    "grid: scale below 0": Bad(grid_with([-1.0] * ROWS), "spec.grid.scales"),
    "grid: scale nan": Bad(grid_with([float("nan")] * ROWS), "spec.grid.scales"),
    "grid: scale not in float16": Bad(
        both(grid_with([1 + 2.0**-20] * ROWS), HALF), "spec.grid.scales"
    ),
    "grid: zero outside the codes": Bad(
        grid_with(symmetric=False, zero_points=[16] * ROWS), "spec.grid.zero_points"
    ),
    "grid: too few scales": Bad(grid_with([1.0] * (ROWS - 1)), "spec.grid.scales"),
    "grid: too many scales": Bad(grid_with([1.0] * (ROWS + 1)), "spec.grid.scales"),
    "grid: no scales": Bad(grid_with([]), "spec.grid.scales"),
    "grid: too few scales for groups": Bad(
        both(grid_with(), spec_with(group_size=8)), "spec.grid.scales"
    ),
    "grid: too few zeros": Bad(
        grid_with(symmetric=False, zero_points=[8] * (ROWS - 1)), "spec.grid.zero_points"
    ),
    # Formats, alone and with the layer's sizes.
    "GPTQ with float32 scales": Bad(
        both(GPTQ, spec_with(scale_dtype=tensor_pb2.DATA_TYPE_F32)), "spec.scale_dtype"
    ),
    "GPTQ, asymmetric": Bad(both(GPTQ, spec_with(symmetric=False)), "spec.format"),
    "compressed-tensors, groups in another order": Bad(
        both(
            PACKED,
            spec_with(
                group_size=8,
                group_scales=S.GROUP_SCALES_DYNAMIC,
                order=S.ORDER_DECREASING_NORM,
            ),
        ),
        "spec.group_scales",
    ),
    "GPTQ: rows that fill no word": Bad(both(GPTQ, lambda r: r.resize(7, 32)), "spec.format"),
    "GPTQ: features that fill no word": Bad(
        both(GPTQ, lambda r: r.resize(8, 28)), "spec.format", WITH_X
    ),
    "packed groups that leave a rest": Bad(
        both(PACKED, spec_with(group_size=24)), "spec.group_size"
    ),
    # Two mistakes: the same one is named.
    "bits before shape": Bad(both(set_weight(shape=[ROWS]), spec_with(bits=9)), "spec.bits", RAW),
    "name before bits": Bad(
        both(set_field("layer_name", "n" * 257), spec_with(bits=9)), "layer_name"
    ),
    "bits before an unknown calibration": Bad(
        both(set_field("calibration_id", "cal-none"), spec_with(bits=9)), "spec.bits", CALIBRATED
    ),
    "rows before an unknown calibration": Bad(
        both(set_field("calibration_id", "cal-none"), set_weight(shape=[0, FEATURES])),
        "weight.shape",
        ON_THE_WIRE,
    ),
    # What jobs have.
    "priority -101": Bad(set_field("priority", -101), "priority", JOBS),
    "priority 101": Bad(set_field("priority", 101), "priority", JOBS),
    "deadline 0": Bad(set_field("deadline", 0), "deadline", JOBS),
    "deadline -1": Bad(set_field("deadline", -1), "deadline", JOBS),
    "ttl 0.5": Bad(set_field("ttl", 0.5), "ttl", JOBS),
    "ttl of 366 days": Bad(set_field("ttl", 366 * 24 * 3600), "ttl", JOBS),
    "no calibration": Bad(set_field("calibration_id", ""), "calibration_id", JOBS, text=False),
    # What Quantize has.
    "held_out_fraction 0.6": Bad(set_field("held_out_fraction", 0.6), "held_out_fraction", WITH_X),
    "sequence_rows -1": Bad(set_field("sequence_rows", -1), "sequence_rows", WITH_X),
    "x of other features": Bad(
        lambda r: (r.x.shape.__setitem__(1, 24), setattr(r, "X", activations(TOKENS, 24))),
        "x.shape",
        WITH_X,
        text=False,
    ),
}
for _name in (
    *("method", "scale_dtype", "group_scales", "scale", "scale_objective", "rounding", "order"),
    *("format", "quality"),
):
    BAD[f"{_name} unknown"] = Bad(unknown(_name), f"spec.{_name}", code="")
BAD["on_failure unknown"] = Bad(damping_with(on_failure=99), "spec.damping.on_failure", code="")
