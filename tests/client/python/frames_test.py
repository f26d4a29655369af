"""Frames encoded beside protobuf are what protobuf would have made."""

import certiq
import numpy as np
import pytest
from certiq import _frames, tensors
from certiq._proto.calibration_service_pb2 import (
    AccumulateChunk,
    AccumulateRequest,
    ImportStatisticsRequest,
)
from certiq._proto.job_service_pb2 import CreateJobRequest
from certiq._proto.quantization_service_pb2 import QuantizeRequest


@pytest.mark.parametrize("rows", [1, 2, 40, 3000])
@pytest.mark.parametrize("kind", [QuantizeRequest, CreateJobRequest])
def test_weights(
    random: np.random.Generator, kind: type[QuantizeRequest] | type[CreateJobRequest], rows: int
) -> None:
    W = random.standard_normal((rows, 17))
    view = tensors.matrix("weight", W)
    found = b""
    for frame, size in _frames.weight_frames(kind, view, 1 << 14):
        message = kind.FromString(frame)
        assert message.SerializeToString(deterministic=True) == frame or found == b""
        assert message.WhichOneof("payload") == "weight"
        assert message.weight.row_offset * view.row_bytes == len(found)
        assert size == len(message.weight.data) <= 1 << 14
        found += message.weight.data
    assert found == W.tobytes()


def test_activations(random: np.random.Generator) -> None:
    X = random.standard_normal((1000, 8))
    seen = X.astype("<f2")
    pair = tensors.matrix("x", X), tensors.matrix("x_quantized", seen)
    parts = [QuantizeRequest.FromString(f) for f, _ in _frames.activation_frames(*pair, 1000)]
    assert len(parts) == 84
    assert b"".join(part.activation.x for part in parts) == X.tobytes()
    assert b"".join(part.activation.x_quantized for part in parts) == seen.tobytes()
    assert [part.activation.row_offset for part in parts] == list(range(0, 1000, 12))
    alone = [QuantizeRequest.FromString(f) for f, _ in _frames.activation_frames(pair[0], None, 64)]
    assert len(alone) == 1000
    assert not any(part.activation.x_quantized for part in alone)


def test_chunks_and_sums(random: np.random.Generator) -> None:
    for sequence in (0, 1, 127, 128, 1 << 40):
        frame = _frames.accumulate_frame(sequence, [b"ab", memoryview(b"cd")], [b"e"])
        chunk = AccumulateChunk(sequence=sequence, x=b"abcd", x_quantized=b"e")
        assert AccumulateRequest.FromString(frame) == AccumulateRequest(chunk=chunk)
    gram = random.standard_normal((9, 9))
    sums = [tensors.view_of("gram", gram), tensors.view_of("cross", gram[0])]
    parts = [ImportStatisticsRequest.FromString(f) for f, _ in _frames.statistics_frames(sums, 100)]
    assert b"".join(part.data for part in parts) == gram.tobytes() + gram[0].tobytes()


def test_memory_is_not_copied_before_it_is_sent(random: np.random.Generator) -> None:
    X = random.standard_normal((64, 64), dtype="<f4")
    view = tensors.matrix("x", X)
    rows = np.frombuffer(view.rows(3, 9), "<f4")
    assert np.shares_memory(rows, X)
    assert tensors.matrix("x", X.reshape(2, 32, 64)).rows(0, 64).obj is not None
    assert np.shares_memory(
        np.frombuffer(tensors.matrix("x", X.reshape(2, 32, 64)).rows(0, 64), "<f4"), X
    )
    with pytest.raises(TypeError):
        view.rows(0, 1)[0] = 1


@pytest.mark.parametrize("value", [3.0, "text", [["a"]], None, np.zeros(3, "M8[s]"), object()])
def test_what_is_no_tensor(value: object) -> None:
    with pytest.raises(certiq.InvalidArgument) as caught:
        tensors.view_of("x", value)
    assert caught.value.field == "x"
