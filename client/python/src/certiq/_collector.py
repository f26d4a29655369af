"""A collector that puts a result together from frames, each checked before it is used."""

import math

import numpy as np

from certiq._proto.certificate_pb2 import Certificate
from certiq._proto.job_service_pb2 import ReadResultResponse, ResultBytes
from certiq._proto.quantization_service_pb2 import QuantizeResponse, ResultChunk, ResultHeader
from certiq.errors import DataLoss, broken
from certiq.layer import Layer
from certiq.tensors import FLOATING, NUMPY, Array, dtype_name, shape_text

_MAX_TENSORS = 64
_MAX_NAME_BYTES = 256
_MAX_DIMENSIONS = 8


def max_result_bytes(rows: int, features: int) -> int:
    """Dense float32: 4 bytes a weight; scales and zeros of groups of at least 8 features: 8 bytes
    for 8 weights, more where there are few features. Twice that leaves room for padding."""
    return 10 * rows * features + 64 * (rows + features)


class ResultCollector:
    """The result of weights [rows, features]: from a Quantize call, or from a job, where a call
    that broke goes on after resume()."""

    def __init__(self, rows: int, features: int) -> None:
        self._rows = rows
        self._features = features
        self._header: ResultHeader | None = None
        self._header_came = False
        self._arrays: list[Array] = []
        # Each view is one dimension of bytes that shares memory with its array.
        self._memory: list[Array] = []
        self._filled: list[int] = []
        self._certificate = Certificate()
        self._certificate_bytes = 0
        self._certificate_started = False
        self.received_bytes = 0

    @property
    def started(self) -> bool:
        return self._header is not None

    def resume(self) -> None:
        self._header_came = False
        self._certificate_started = False
        self._certificate_bytes = 0
        self._certificate = Certificate()

    def add(self, frame: QuantizeResponse | ReadResultResponse) -> None:
        """Internal where the frame breaks the contract."""
        kind = frame.WhichOneof("payload")
        if kind == "result":
            self._add_header(frame.result)
        elif kind == "certificate":
            self._add_certificate(frame.certificate)
        elif isinstance(frame, QuantizeResponse) and kind == "chunk":
            self._add_chunk(frame.chunk)
        elif isinstance(frame, ReadResultResponse) and kind == "data":
            self._add_bytes(frame.data)
        elif kind is None and frame.ByteSize() == 0:
            # One with something in it is a kind of frame of a newer contract and may be skipped:
            # what is required is checked at the end.
            raise broken("frame: expected a payload, got none")

    def _add_header(self, header: ResultHeader) -> None:
        if self._header_came:
            raise broken("result: expected one header, got a second one")
        self._header_came = True
        if self._header is not None:
            if header != self._header:
                raise broken("result: expected the header that came first, got another one")
            return
        self._header = header
        if not 1 <= len(header.tensors) <= _MAX_TENSORS:
            raise broken(f"result.tensors: expected 1 to {_MAX_TENSORS}, got {len(header.tensors)}")
        limit = max_result_bytes(self._rows, self._features)
        total = 0
        names = set()
        for tensor in header.tensors:
            shape = tuple(tensor.shape)
            at = f'result tensor "{tensor.name[:_MAX_NAME_BYTES]}": '
            if not 1 <= len(tensor.name.encode()) <= _MAX_NAME_BYTES or tensor.name in names:
                raise broken(
                    f"{at}expected a name of 1 to {_MAX_NAME_BYTES} bytes that occurs once"
                )
            names.add(tensor.name)
            if not 1 <= len(shape) <= _MAX_DIMENSIONS:
                raise broken(f"{at}expected 1 to {_MAX_DIMENSIONS} dimensions, got {len(shape)}")
            if min(shape) < 1:
                raise broken(f"{at}expected dimensions of at least 1, got {shape_text(shape)}")
            if tensor.dtype not in NUMPY:
                raise broken(f"{at}expected a dtype of the contract, got {tensor.dtype}")
            if tensor.name == "weight" and (
                shape != (self._rows, self._features) or tensor.dtype not in FLOATING
            ):
                raise broken(
                    f"{at}expected floating point [{self._rows}, {self._features}], got "
                    f"{dtype_name(tensor.dtype)} {shape_text(shape)}"
                )
            total += math.prod(shape) * NUMPY[tensor.dtype].itemsize
            if total > limit:
                raise broken(
                    f"result: expected at most {limit} bytes for weights [{self._rows}, "
                    f'{self._features}], got more with tensor "{tensor.name}" {shape_text(shape)}'
                )
        if header.total_bytes != total:
            raise broken(
                f"result.total_bytes: expected {total}, the sum of its tensors, got "
                f"{header.total_bytes}"
            )
        for tensor in header.tensors:
            array: Array = np.empty(tuple(tensor.shape), NUMPY[tensor.dtype])
            self._arrays.append(array)
            self._memory.append(array.reshape(-1).view(np.uint8))
            self._filled.append(0)

    def _copy(self, index: int, data: bytes | memoryview) -> None:
        at = self._filled[index]
        self._memory[index][at : at + len(data)] = np.frombuffer(data, np.uint8)
        self._filled[index] += len(data)
        self.received_bytes += len(data)

    def _add_chunk(self, chunk: ResultChunk) -> None:
        if not self._header_came or self._header is None:
            raise broken("chunk: expected the result header first")
        if self._certificate_started:
            raise broken("chunk: expected none after the certificate")
        index = chunk.tensor
        if not 0 <= index < len(self._arrays):
            raise broken(f"chunk.tensor: expected an index below {len(self._arrays)}, got {index}")
        array = self._arrays[index]
        row_bytes = array.nbytes // array.shape[0]
        at = f'chunk of "{self._header.tensors[index].name}": '
        rows_so_far = self._filled[index] // row_bytes
        if chunk.row_offset != rows_so_far:
            raise broken(f"{at}row_offset: expected {rows_so_far}, got {chunk.row_offset}")
        if not chunk.data or len(chunk.data) % row_bytes != 0:
            raise broken(
                f"{at}data: expected whole rows of {row_bytes} bytes, got {len(chunk.data)} bytes"
            )
        missing = array.nbytes - self._filled[index]
        if len(chunk.data) > missing:
            raise broken(
                f"{at}data: expected at most the {missing} bytes that are missing, got "
                f"{len(chunk.data)}"
            )
        self._copy(index, chunk.data)

    def _add_bytes(self, data: ResultBytes) -> None:
        if not self._header_came or self._header is None:
            raise broken("data: expected the result header first")
        if self._certificate_started:
            raise broken("data: expected none after the certificate")
        if data.byte_offset != self.received_bytes:
            raise broken(
                f"data.byte_offset: expected {self.received_bytes}, got {data.byte_offset}"
            )
        missing = self._header.total_bytes - self.received_bytes
        if not 1 <= len(data.data) <= missing:
            raise broken(f"data: expected 1 to {missing} bytes, got {len(data.data)}")
        rest = memoryview(data.data)
        while rest:
            index = self._first_incomplete()
            room = self._arrays[index].nbytes - self._filled[index]
            self._copy(index, rest[:room])
            rest = rest[room:]

    def _add_certificate(self, certificate: Certificate) -> None:
        if not self._header_came or self._header is None:
            raise broken("certificate: expected the result header first")
        index = self._first_incomplete()
        if index < len(self._arrays):
            name = self._header.tensors[index].name
            raise broken(f'certificate: expected every row of "{name}" first')
        self._certificate_started = True
        self._certificate_bytes += certificate.ByteSize()
        # A certificate has two numbers a row, and lists whose lengths the contract bounds.
        limit = (16 << 20) + 32 * self._rows
        if self._certificate_bytes > limit:
            raise broken(
                f"certificate: expected at most {limit} bytes, got {self._certificate_bytes}"
            )
        self._certificate.MergeFrom(certificate)

    def _first_incomplete(self) -> int:
        index = 0
        while index < len(self._arrays) and self._filled[index] == self._arrays[index].nbytes:
            index += 1
        return index

    def finish(self, name: str) -> Layer:
        """DataLoss where something is missing."""
        if not self._header_came or self._header is None:
            raise DataLoss("the server ended the call without a result")
        index = self._first_incomplete()
        if index < len(self._arrays):
            raise DataLoss(
                f'the server ended the call within tensor "{self._header.tensors[index].name}": '
                f"expected {self._arrays[index].nbytes} bytes, got {self._filled[index]}"
            )
        if not self._certificate_started:
            raise DataLoss("the server ended the call without a certificate")
        certificate = self._certificate
        if (certificate.rows, certificate.features) != (self._rows, self._features):
            raise broken(
                f"certificate: expected rows {self._rows} and features {self._features}, got "
                f"{certificate.rows} and {certificate.features}"
            )
        names = [tensor.name for tensor in self._header.tensors]
        return Layer(dict(zip(names, self._arrays, strict=True)), certificate, name)
