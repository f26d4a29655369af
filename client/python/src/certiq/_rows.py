"""A stream of rows behind the blocking and the asynchronous client's streams."""

from certiq import tensors
from certiq._core import Core
from certiq._proto import calibration_service_pb2 as c
from certiq._proto import tensor_pb2
from certiq._proto.tensor_pb2 import DATA_TYPE_UNSPECIFIED, DataType
from certiq._sender import StreamSender
from certiq.errors import FailedPrecondition, invalid
from certiq.tensors import Tensor, TensorLike

_OTHERWISE = tensor_pb2.DATA_TYPE_F32


class RowStream:
    """Opens when the first rows say what their type is."""

    def __init__(
        self,
        core: Core,
        calibration: c.Calibration,
        stream_id: str,
        chunk_rows: int,
        window_bytes: int,
        timeout: float | None,
    ) -> None:
        if not 1 <= len(stream_id.encode()) <= 128:
            raise invalid("stream_id", f"expected 1 to 128 bytes, got {stream_id!r}")
        self._core = core
        self._calibration = calibration
        self.stream_id = stream_id
        self._chunk_rows = chunk_rows
        self._window_bytes = window_bytes
        self._timeout = timeout
        self._sender: StreamSender | None = None
        self._closed: c.StreamProgress | None = None
        self._given_up = False

    @property
    def mismatched(self) -> bool:
        return self._calibration.kind == c.CALIBRATION_KIND_MISMATCHED

    @property
    def progress(self) -> c.StreamProgress:
        if self._closed is not None:
            return self._closed
        if self._sender is None:
            return c.StreamProgress(stream_id=self.stream_id)
        return self._sender.progress

    async def send(self, x: TensorLike, x_quantized: TensorLike | None) -> None:
        rows = tensors.matrix("x", x, least_rows=0)
        quantized = None
        if x_quantized is not None:
            quantized = tensors.matrix("x_quantized", x_quantized, least_rows=0)
        if self.mismatched and quantized is None:
            raise invalid("x_quantized", "expected the same rows of X~: inputs are mismatched")
        if not self.mismatched and quantized is not None:
            raise invalid("x_quantized", "expected none: this calibration holds sums of X alone")
        if rows.shape[1] != self._calibration.features:
            raise invalid(
                "x.shape", f"expected [tokens, {self._calibration.features}], got x {rows}"
            )
        tensors.check_activations(rows, quantized)
        sender = await self._open(rows, quantized)
        if rows.shape[0] > 0:
            await sender.write(rows, quantized)

    async def close(self) -> c.StreamProgress:
        """May be repeated."""
        if self._closed is None:
            sender = await self._open(None, None)
            self._closed = await sender.close()
        return self._closed

    def abort(self) -> None:
        self._given_up = self._closed is None
        if self._sender is not None and self._given_up:
            self._sender.abort()

    async def _open(self, x: Tensor | None, x_quantized: Tensor | None) -> StreamSender:
        if self._given_up or (self._closed is not None):
            raise FailedPrecondition(f'stream "{self.stream_id}" has ended')
        if self._sender is None:
            kind: DataType = _OTHERWISE if x is None else x.dtype
            quantized: DataType = DATA_TYPE_UNSPECIFIED
            if self.mismatched:
                quantized = _OTHERWISE if x_quantized is None else x_quantized.dtype
            self._sender = self._core.sender(
                self._calibration,
                self.stream_id,
                kind,
                quantized,
                self._chunk_rows,
                self._window_bytes,
                self._timeout,
            )
            # An error that keeps it from opening ends the stream.
            await self._sender.open()
        return self._sender
