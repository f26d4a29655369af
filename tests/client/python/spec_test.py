"""Settings in Python's words."""

from typing import Any

import certiq
import numpy as np
import pytest
from certiq._proto import spec_pb2, tensor_pb2
from certiq.spec import spec_of


def test_nothing_is_set_that_was_not_given() -> None:
    assert spec_of(None).ByteSize() == 0
    assert certiq.Spec().to_proto().ByteSize() == 0
    assert not certiq.Spec(bits=3).to_proto().HasField("damping")
    assert not certiq.Spec(bits=3).to_proto().HasField("certificate")


def test_every_field_of_the_contract() -> None:
    spec = certiq.Spec(
        method="qronos",
        bits=3,
        symmetric=False,
        group_size=128,
        scale_dtype="bf16",
        grid=certiq.Grid(np.array([[0.5, 1]]), np.array([[3, 4]]), 0, 7),
        group_scales="dynamic",
        scale="compensated",
        scale_objective="data_free",
        scale_passes=4,
        scale_trials=0,
        signed_scales=False,
        polish=2,
        rounding="stochastic",
        seed=2**63,
        order="decreasing_norm",
        damping="relative_sigma_max:1e-6",
        max_attempts=7,
        damping_factor=3.0,
        on_failure="nearest",
        format="compressed_tensors",
        quality="best",
        per_row=False,
        failure_probability=0.01,
        compare_nearest=True,
        min_tokens=100,
    )
    expected = spec_pb2.QuantizationSpec(
        method=spec_pb2.METHOD_QRONOS,
        bits=3,
        symmetric=False,
        group_size=128,
        scale_dtype=tensor_pb2.DATA_TYPE_BF16,
        grid=spec_pb2.ExplicitGrid(
            scales=[0.5, 1], zero_points=[3, 4], lowest_code=0, highest_code=7
        ),
        group_scales=spec_pb2.GROUP_SCALES_DYNAMIC,
        scale=spec_pb2.SCALE_RULE_COMPENSATED,
        scale_objective=spec_pb2.SCALE_OBJECTIVE_DATA_FREE,
        scale_passes=4,
        scale_trials=0,
        signed_scales=False,
        polish=2,
        rounding=spec_pb2.ROUNDING_STOCHASTIC,
        seed=2**63,
        order=spec_pb2.ORDER_DECREASING_NORM,
        damping=spec_pb2.Damping(
            relative_sigma_max=1e-6,
            max_attempts=7,
            factor=3.0,
            on_failure=spec_pb2.ON_FAILURE_NEAREST,
        ),
        format=spec_pb2.FORMAT_COMPRESSED_TENSORS,
        quality=spec_pb2.QUALITY_BEST,
        certificate=spec_pb2.CertificateOptions(
            per_row=False, failure_probability=0.01, compare_nearest=True
        ),
        min_tokens=100,
    )
    assert spec.to_proto() == expected
    assert spec_of(expected) is expected
    # None was forgotten: all of the contract's fields are set.
    for message in (expected, expected.certificate, expected.grid):
        fields = {field.name for field in message.DESCRIPTOR.fields}
        assert {field.name for field, _ in message.ListFields()} == fields
    assert "method=qronos, bits=3" in str(spec)


def test_rules_of_damping() -> None:
    def damping(text: str) -> spec_pb2.Damping:
        return certiq.Spec(damping=text).to_proto().damping

    assert damping("relative_trace:0.01") == spec_pb2.Damping(relative_trace=0.01)
    assert damping("absolute:2") == spec_pb2.Damping(absolute=2)
    assert damping("held_out").WhichOneof("rule") == "held_out"
    ladder = damping("held_out:0.001,0.01,1").held_out.ladder
    assert list(ladder) == [0.001, 0.01, 1]
    climb = damping("held_out_climb").held_out
    assert climb == spec_pb2.HeldOutDamping(climb=True)
    climb = damping("held_out_climb:0.01,1").held_out
    assert climb == spec_pb2.HeldOutDamping(ladder=[0.01, 1], climb=True)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"method": "gptq"}, "spec.method"),
        ({"method": 2}, "spec.method"),
        ({"order": "unspecified"}, "spec.order"),
        ({"format": "gguf"}, "spec.format"),
        ({"scale_dtype": "fp8"}, "spec.scale_dtype"),
        ({"bits": "4"}, "spec.bits"),
        ({"bits": 4.5}, "spec.bits"),
        ({"bits": 1 << 40}, "spec.bits"),
        ({"seed": -1}, "spec.seed"),
        ({"per_row": "yes"}, "spec.per_row"),
        ({"damping": "0.01"}, "spec.damping"),
        ({"damping": "relative_trace:"}, "spec.damping"),
        ({"damping": "relative_trace"}, "spec.damping"),
        ({"damping": "held_out:"}, "spec.damping"),
        ({"damping": "held_out:1,,2"}, "spec.damping"),
        ({"damping": 0.01}, "spec.damping"),
        ({"on_failure": "ignore"}, "spec.damping.on_failure"),
        ({"grid": certiq.Grid([[0.5]], [[0.5]])}, "spec.grid.zero_points"),
        ({"grid": certiq.Grid([0.5])}, "spec.grid.scales.shape"),
    ],
)
def test_mistakes_name_the_field(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(certiq.InvalidArgument) as caught:
        certiq.Spec(**arguments).to_proto()
    assert caught.value.field == field


def test_names_may_be_spelled_as_elsewhere() -> None:
    spec = certiq.Spec(format="compressed-tensors", method="OPTQ")  # type: ignore[arg-type]
    assert spec.to_proto() == spec_pb2.QuantizationSpec(
        format=spec_pb2.FORMAT_COMPRESSED_TENSORS, method=spec_pb2.METHOD_OPTQ
    )
