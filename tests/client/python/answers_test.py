"""Answers that break the contract are never taken for a result."""

from collections.abc import Callable

import certiq
import numpy as np
import pytest
from certiq._accumulate import Positions
from certiq._collector import ResultCollector, max_result_bytes
from certiq._proto import calibration_service_pb2 as c
from certiq._proto import tensor_pb2
from certiq._proto.certificate_pb2 import Certificate
from certiq._proto.job_service_pb2 import ReadResultResponse, ResultBytes
from certiq._proto.quantization_service_pb2 import QuantizeResponse, ResultChunk, ResultHeader
from certiq.statistics import StatisticsCollector
from google.protobuf.message import Message

ROWS, FEATURES = 4, 6
F32, I32 = tensor_pb2.DATA_TYPE_F32, tensor_pb2.DATA_TYPE_I32
WEIGHT = np.arange(ROWS * FEATURES, dtype="<f4").reshape(ROWS, FEATURES)
SCALES = np.arange(ROWS, dtype="<f4").reshape(ROWS, 1)
DATA = WEIGHT.tobytes() + SCALES.tobytes()


def tensor(name: str = "weight", dtype: int = F32, *shape: int) -> tensor_pb2.TensorHeader:
    return tensor_pb2.TensorHeader(name=name, dtype=dtype, shape=shape or (ROWS, FEATURES))  # type: ignore[arg-type]


def header(*tensors: tensor_pb2.TensorHeader, total: int = len(DATA)) -> ResultHeader:
    return ResultHeader(
        tensors=tensors or (tensor(), tensor("scales", F32, ROWS, 1)), total_bytes=total
    )


CERTIFICATE = Certificate(rows=ROWS, features=FEATURES)


def chunk(index: int, row: int, data: bytes) -> QuantizeResponse:
    return QuantizeResponse(chunk=ResultChunk(tensor=index, row_offset=row, data=data))


def read(offset: int, data: bytes) -> ReadResultResponse:
    return ReadResultResponse(data=ResultBytes(byte_offset=offset, data=data))


def collect(*frames: QuantizeResponse | ReadResultResponse) -> certiq.Layer:
    collector = ResultCollector(ROWS, FEATURES)
    for frame in frames:
        collector.add(frame)
    return collector.finish("layer")


HEADER = QuantizeResponse(result=header())
ALL = (HEADER, chunk(0, 0, WEIGHT[:2].tobytes()), chunk(0, 2, WEIGHT[2:].tobytes()))
ALL = (*ALL, chunk(1, 0, SCALES.tobytes()))
END = QuantizeResponse(certificate=CERTIFICATE)


def test_a_whole_answer() -> None:
    layer = collect(*ALL, QuantizeResponse(certificate=Certificate(row_error=[1, 2])), END)
    np.testing.assert_array_equal(layer.tensors["weight"], WEIGHT)
    np.testing.assert_array_equal(layer.tensors["scales"], SCALES)
    assert list(layer.certificate.row_error) == [1, 2]
    # A kind of frame of a newer contract.
    newer = QuantizeResponse.FromString(b"\x7a\x02hi")
    assert collect(*ALL, newer, END).shape == (ROWS, FEATURES)


@pytest.mark.parametrize("size", [1, 7, 24, 1000])
def test_bytes_from_any_offset(size: int) -> None:
    collector = ResultCollector(ROWS, FEATURES)
    first = ReadResultResponse(result=header())
    collector.add(first)
    at = 0
    while at < len(DATA):
        collector.add(read(at, DATA[at : at + size]))
        at = collector.received_bytes
        collector.resume()
        collector.add(first)
    collector.add(ReadResultResponse(certificate=CERTIFICATE))
    layer = collector.finish("")
    np.testing.assert_array_equal(layer.tensors["weight"], WEIGHT)
    np.testing.assert_array_equal(layer.tensors["scales"], SCALES)


@pytest.mark.parametrize(
    "frames",
    [
        (QuantizeResponse(),),
        (HEADER, HEADER),
        (END,),
        (chunk(0, 0, DATA),),
        (HEADER, END),
        (*ALL[:2], END),
        (*ALL, END, ALL[-1]),
        (*ALL, QuantizeResponse(certificate=Certificate(rows=ROWS, features=7))),
        (HEADER, chunk(2, 0, DATA[:24])),
        (HEADER, chunk(-1, 0, DATA[:24])),
        (HEADER, chunk(0, 1, DATA[:24])),
        (HEADER, chunk(0, 0, DATA[:23])),
        (HEADER, chunk(0, 0, b"")),
        (HEADER, chunk(0, 0, bytes(24 * 5))),
        (ReadResultResponse(result=header()), read(1, DATA)),
        (ReadResultResponse(result=header()), read(0, DATA + b"x")),
        (ReadResultResponse(result=header()), read(0, b"")),
        (read(0, DATA),),
    ],
)
def test_frames_that_do_not_follow(frames: tuple[QuantizeResponse, ...]) -> None:
    with pytest.raises(certiq.Internal, match="breaks the contract"):
        collect(*frames)


@pytest.mark.parametrize(
    "wrong",
    [
        header(total=len(DATA) + 1),
        ResultHeader(),
        header(tensor(), tensor()),
        header(tensor("")),
        header(tensor("x" * 257)),
        header(tensor("weight", F32, ROWS, FEATURES + 1)),
        header(tensor("weight", I32)),
        header(tensor("scales", 0)),
        header(tensor("scales", 99)),
        header(tensor("scales", F32, ROWS, 0)),
        header(tensor("scales", F32, -1, -1)),
        header(tensor("scales", F32, *[1] * 9)),
        header(tensor("scales", F32, 1 << 40, 1 << 40)),
        header(*(tensor(str(i), F32, 1) for i in range(65)), total=260),
    ],
)
def test_headers_that_make_no_sense(wrong: ResultHeader) -> None:
    with pytest.raises(certiq.Internal, match="breaks the contract"):
        collect(QuantizeResponse(result=wrong))


def test_an_answer_that_stops_short() -> None:
    for frames in ((), ALL[:1], ALL[:3], ALL):
        with pytest.raises(certiq.DataLoss):
            collect(*frames)


def test_another_header_after_a_break() -> None:
    collector = ResultCollector(ROWS, FEATURES)
    collector.add(ReadResultResponse(result=header()))
    collector.resume()
    with pytest.raises(certiq.Internal, match="another one"):
        collector.add(ReadResultResponse(result=header(tensor(), total=96)))


def test_results_of_any_format_fit() -> None:
    """Of the smallest layers and groups too."""
    for rows, features in ((1, 1), (1, 8), (8, 1), (4096, 4096)):
        groups = -(-features // 8)
        dense = rows * features * 4 + rows * groups * 8 + 4 * features
        assert dense <= max_result_bytes(rows, features)


def position(received: int, durable: int, name: str = "a") -> c.StreamProgress:
    return c.StreamProgress(stream_id=name, received=received, durable=durable)


@pytest.mark.parametrize(
    "wrong", [position(4, 2), position(5, 1), position(5, 6), position(6, 3, "b")]
)
def test_positions_never_go_back(wrong: c.StreamProgress) -> None:
    positions = Positions("a")
    positions.take(position(5, 2))
    with pytest.raises(certiq.Internal, match="breaks the contract"):
        positions.take(wrong)
    positions.take(position(5, 5))


def statistics(*frames: Message) -> certiq.Statistics:
    collector = StatisticsCollector(c.PORTION_FIT)
    for frame in frames:
        assert isinstance(frame, c.ExportStatisticsResponse)
        collector.add(frame)
    return collector.finish()


def export(
    change: Callable[[c.StatisticsHeader], None] | None = None,
) -> c.ExportStatisticsResponse:
    made = c.StatisticsHeader(
        tokens=3,
        portion=c.PORTION_FIT,
        dtype=tensor_pb2.DATA_TYPE_F64,
        layout=c.MATRIX_LAYOUT_UPPER,
        features=2,
    )
    if change is not None:
        change(made)
    return c.ExportStatisticsResponse(header=made)


def sums(count: int = 3) -> c.ExportStatisticsResponse:
    return c.ExportStatisticsResponse(data=np.arange(1.0, count + 1).tobytes())


def test_exports() -> None:
    found = statistics(export(), sums())
    np.testing.assert_array_equal(found.gram, [[1, 2], [2, 3]])
    assert found.tokens == 3
    for frames in (
        (sums(),),
        (export(), export()),
        (export(), sums(4)),
        (c.ExportStatisticsResponse(),),
    ):
        with pytest.raises(certiq.Internal, match="breaks the contract"):
            statistics(*frames)
    for frames in ((), (export(),), (export(), sums(2))):
        with pytest.raises(certiq.DataLoss):
            statistics(*frames)
    for name, value in (
        ("features", 0),
        ("features", 1 << 20),
        ("tokens", -1),
        ("dtype", 2),
        ("layout", 1),
        ("portion", 2),
    ):
        with pytest.raises(certiq.Internal, match="header"):
            statistics(export(lambda made, name=name, value=value: setattr(made, name, value)))
