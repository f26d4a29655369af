"""Requests from arguments, checked before anything is sent."""

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from certiq import tensors
from certiq._frames import activation_frames, weight_frames
from certiq._proto import calibration_service_pb2 as c
from certiq._proto import job_service_pb2 as j
from certiq._proto import quantization_service_pb2 as q
from certiq.errors import invalid
from certiq.spec import SpecLike, spec_of
from certiq.tensors import Tensor, TensorLike


def duration(field: str, seconds: float | None) -> Duration | None:
    if seconds is None:
        return None
    try:
        value = Duration()
        value.FromNanoseconds(round(seconds * 1e9))
    except (ValueError, OverflowError) as error:
        raise invalid(field, f"expected seconds, got {seconds}: {error}") from None
    return value


@dataclass(frozen=True)
class LayerRequest:
    """One layer of a Quantize call, checked."""

    header: q.QuantizeHeader
    weight: Tensor
    x: Tensor | None
    x_quantized: Tensor | None

    def chunks(self, chunk_bytes: int) -> Iterator[tuple[bytes, int]]:
        yield from weight_frames(q.QuantizeRequest, self.weight, chunk_bytes)
        if self.x is not None:
            yield from activation_frames(self.x, self.x_quantized, chunk_bytes)

    @property
    def bytes(self) -> int:
        return sum(t.bytes for t in (self.weight, self.x, self.x_quantized) if t is not None)


def layer_request(
    weight: TensorLike,
    activations: TensorLike | None,
    spec: SpecLike,
    *,
    activations_quantized: TensorLike | None,
    calibration_id: str,
    held_out_fraction: float | None,
    sequence_rows: int,
    name: str,
    request_id: str,
) -> LayerRequest:
    w = tensors.matrix("weight", weight, name)
    tensors.check_weight(w)
    x = xq = None
    if activations is None:
        if activations_quantized is not None:
            raise invalid("x_quantized", "expected x beside it, got x_quantized alone")
        if not calibration_id:
            raise invalid("x", "expected activations or a calibration, got neither")
    else:
        x = tensors.matrix("x", activations)
        if activations_quantized is not None:
            xq = tensors.matrix("x_quantized", activations_quantized)
        tensors.check_activations(x, xq)
        if x.shape[1] != w.shape[1]:
            raise invalid(
                "x.shape",
                f"expected [tokens, {w.shape[1]}] to match the features of weight {w}, got x {x}",
            )
    header = q.QuantizeHeader(
        request_id=request_id,
        layer_name=name,
        spec=spec_of(spec),
        weight=w.header(),
        x=None if x is None else x.header(),
        x_quantized=None if xq is None else xq.header(),
        held_out_fraction=held_out_fraction,
        sequence_rows=sequence_rows,
        calibration_id=calibration_id,
    )
    return LayerRequest(header, w, x, xq)


def calibration_request(
    features: int,
    *,
    mismatched: bool,
    held_out_fraction: float,
    sequence_rows: int,
    labels: Iterable[str],
    ttl: float | None,
    request_id: str | None,
) -> c.CreateCalibrationRequest:
    if isinstance(labels, str):
        raise invalid("labels", f"expected a list of names, got {labels!r}")
    kind = c.CALIBRATION_KIND_MISMATCHED if mismatched else c.CALIBRATION_KIND_MATCHED
    return c.CreateCalibrationRequest(
        request_id=request_id or new_request_id(),
        features=features,
        kind=kind,
        held_out_fraction=held_out_fraction,
        sequence_rows=sequence_rows,
        labels=labels,
        ttl=duration("ttl", ttl),
    )


def job_request(
    weight: TensorLike,
    calibration_id: str,
    spec: SpecLike,
    *,
    name: str,
    priority: int,
    deadline: float | None,
    ttl: float | None,
    request_id: str | None,
) -> tuple[j.CreateJobHeader, Tensor]:
    w = tensors.matrix("weight", weight, name)
    tensors.check_weight(w)
    if not calibration_id:
        raise invalid("calibration_id", "expected a finalized calibration or its id, got none")
    header = j.CreateJobHeader(
        request_id=request_id or new_request_id(),
        layer_name=name,
        spec=spec_of(spec),
        weight=w.header(),
        calibration_id=calibration_id,
        priority=priority,
        deadline=duration("deadline", deadline),
        ttl=duration("ttl", ttl),
    )
    return header, w


def new_request_id() -> str:
    """An id for calls that make something: with it all their tries make one."""
    return str(uuid.uuid4())
