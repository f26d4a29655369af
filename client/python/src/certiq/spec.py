"""Settings of a quantization in Python's words; those not given are left to the server."""

from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, cast

from certiq import tensors
from certiq._proto import spec_pb2
from certiq._proto.spec_pb2 import ExplicitGrid, QuantizationSpec
from certiq.errors import invalid

MethodName = Literal["nearest", "optq", "qronos"]
GroupScalesName = Literal["static", "dynamic"]
ScaleName = Literal["absmax", "mse", "piso", "compensated"]
ScaleObjectiveName = Literal["inputs", "quantized_inputs", "mixed", "data_free"]
RoundingName = Literal["nearest", "stochastic"]
OrderName = Literal["natural", "decreasing_norm"]
OnFailureName = Literal["fail", "nearest"]
FormatName = Literal[
    "dense_f32", "dense_f16", "dense_bf16", "gptq", "gptq_v2", "compressed_tensors"
]
QualityName = Literal["fast", "balanced", "best"]


@dataclass(frozen=True)
class Grid:
    """Scales and zero points that are given instead of searched for."""

    scales: tensors.TensorLike
    """[rows, groups], positive and finite."""
    zero_points: tensors.TensorLike | None = None
    """[rows, groups] in the units of codes; None for a symmetric grid."""
    lowest_code: int | None = None
    highest_code: int | None = None

    def to_proto(self) -> ExplicitGrid:
        grid = ExplicitGrid(lowest_code=self.lowest_code, highest_code=self.highest_code)
        grid.scales.extend(_flat("spec.grid.scales", self.scales, float))
        if self.zero_points is not None:
            grid.zero_points.extend(_flat("spec.grid.zero_points", self.zero_points, int))
        return grid


def _flat(field: str, values: tensors.TensorLike, kind: type) -> list[Any]:
    view = tensors.matrix(field, values)
    array = tensors.to_numpy(view)
    if kind is int and array.dtype.kind not in "iu":
        raise invalid(field, f"expected whole numbers, got {array.dtype.name}")
    return cast(list[Any], array.astype(kind).reshape(-1).tolist())


@dataclass(frozen=True, kw_only=True)
class Spec:
    """QuantizationSpec of proto/certiq/v1/spec.proto, where defaults and meanings are.

    Every field may stay None, and is then neither sent nor decided here: the preset of `quality`
    and the server's defaults fill it.
    """

    method: MethodName | None = None
    bits: int | None = None
    """2 to 8."""
    symmetric: bool | None = None
    group_size: int | None = None
    """Features that share a scale; 0: one scale a row."""
    scale_dtype: Literal["f16", "bf16", "f32"] | None = None
    grid: Grid | None = None
    group_scales: GroupScalesName | None = None
    scale: ScaleName | None = None
    scale_objective: ScaleObjectiveName | None = None
    """The error that piso scales minimise."""
    scale_passes: int | None = None
    """Passes of piso over the groups of a row; 0: each group by itself."""
    scale_trials: int | None = None
    """Sweeps, each with other scales around those found; each row keeps its best."""
    signed_scales: bool | None = None
    """True: a search may turn a symmetric grid over by a negative scale."""
    polish: int | None = None
    """Passes that refit scales and move codes, at most."""
    rounding: RoundingName | None = None
    seed: int | None = None
    order: OrderName | None = None
    damping: str | None = None
    """"relative_trace:0.01", "absolute:1", "relative_sigma_max:1e-6", "held_out", or
    "held_out:0.001,0.01,0.1" with candidates of your own, multiples of trace / N;
    "held_out_climb", alone or with candidates, tries only as many as it takes."""
    max_attempts: int | None = None
    """Damping attempts in all, 1 to 20."""
    damping_factor: float | None = None
    """Each attempt multiplies the damping by this."""
    on_failure: OnFailureName | None = None
    """The outcome where every damping attempt failed."""
    format: FormatName | None = None
    """help(certiq.loads_in) tells who loads which."""
    quality: QualityName | None = None
    per_row: bool | None = None
    """Errors and bounds of every row in the certificate."""
    failure_probability: float | None = None
    """The epsilon of the bound on single outputs with stochastic rounding (B5)."""
    compare_nearest: bool | None = None
    """Also measure plain rounding on the same grid."""
    min_tokens: int | None = None

    def to_proto(self) -> QuantizationSpec:
        """InvalidArgument, naming the field, for what is no value of the contract; ranges are the
        server's to judge."""
        spec = QuantizationSpec()
        for name in _PLAIN:
            self._set(spec, name, name)
        for name, enum in _ENUMS.items():
            value = getattr(self, name)
            if value is not None:
                setattr(spec, name, _number(f"spec.{name}", value, enum))
        if self.scale_dtype is not None:
            spec.scale_dtype = tensors.dtype_of(self.scale_dtype, "spec.scale_dtype")
        if self.grid is not None:
            spec.grid.CopyFrom(self.grid.to_proto())
        if self.damping is not None:
            _read_damping(self.damping, spec)
        self._set(spec.damping, "max_attempts", "max_attempts")
        self._set(spec.damping, "factor", "damping_factor")
        if self.on_failure is not None:
            number = _number("spec.damping.on_failure", self.on_failure, spec_pb2.OnFailure)
            spec.damping.on_failure = number
        for name in _REPORT:
            self._set(spec.certificate, name, name)
        return spec

    def _set(self, message: Any, name: str, own: str) -> None:
        value = getattr(self, own)
        if value is None:
            return
        try:
            setattr(message, name, value)
        except (TypeError, ValueError) as error:
            raise invalid(f"spec.{own}", f"{error}, got {value!r}") from None

    def __str__(self) -> str:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)


SpecLike = Spec | QuantizationSpec | None


def spec_of(spec: SpecLike) -> QuantizationSpec:
    """Messages of the contract, from a certificate for example, serve as well."""
    if spec is None:
        return QuantizationSpec()
    if isinstance(spec, QuantizationSpec):
        return spec
    if isinstance(spec, Spec):
        return spec.to_proto()
    raise invalid("spec", f"expected a certiq.Spec, got {type(spec).__name__}")


class _Enum(Protocol):
    def keys(self) -> list[str]: ...
    def Value(self, name: str) -> Any: ...


_ENUMS: dict[str, Any] = {
    "method": spec_pb2.Method,
    "group_scales": spec_pb2.GroupScales,
    "scale": spec_pb2.ScaleRule,
    "scale_objective": spec_pb2.ScaleObjective,
    "rounding": spec_pb2.Rounding,
    "order": spec_pb2.Order,
    "format": spec_pb2.Format,
    "quality": spec_pb2.Quality,
}
_PLAIN = (
    *("bits", "symmetric", "group_size", "scale_passes", "scale_trials", "signed_scales"),
    *("polish", "seed", "min_tokens"),
)
_REPORT = ("per_row", "failure_probability", "compare_nearest")


def _number(field: str, value: object, enum: _Enum) -> Any:
    """The value of "decreasing_norm", for example, in Order, whose names begin alike."""
    names = list(enum.keys())
    prefix = names[0].removesuffix("UNSPECIFIED")
    choices = [name.removeprefix(prefix).lower() for name in names[1:]]
    if isinstance(value, str) and value.lower().replace("-", "_") in choices:
        return enum.Value(prefix + value.upper().replace("-", "_"))
    raise invalid(field, f"expected one of {', '.join(choices)}, got {value!r}")


def _read_damping(text: object, spec: QuantizationSpec) -> None:
    error = invalid(
        "spec.damping",
        "expected relative_trace:NUMBER, absolute:NUMBER, relative_sigma_max:NUMBER, held_out, "
        "held_out:NUMBER,NUMBER,..., held_out_climb or held_out_climb:NUMBER,NUMBER,..., "
        f"got {text!r}",
    )
    if not isinstance(text, str):
        raise error
    rule, colon, rest = text.partition(":")
    try:
        if rule in ("held_out", "held_out_climb"):
            if rule == "held_out_climb":
                spec.damping.held_out.climb = True
            spec.damping.held_out.ladder.extend(float(v) for v in rest.split(",") if colon)
            spec.damping.held_out.SetInParent()
            return
        if rule in ("relative_trace", "absolute", "relative_sigma_max"):
            setattr(spec.damping, rule, float(rest))
            return
    except ValueError:
        raise error from None
    raise error
