"""A resumable sender of rows into a calibration: each counts once, whatever breaks meanwhile."""

import time
from collections import deque
from collections.abc import Awaitable

from certiq._accumulate import AccumulateCall, unexpected_end
from certiq._frames import Piece, accumulate_frame
from certiq._proto.calibration_service_pb2 import (
    AccumulateHeader,
    AccumulateRequest,
    StreamProgress,
)
from certiq._proto.tensor_pb2 import DATA_TYPE_UNSPECIFIED, DataType
from certiq._transport import Transport
from certiq._tries import Failed, Tries
from certiq.errors import DataLoss, Error, FailedPrecondition, broken, invalid
from certiq.tensors import NUMPY, Tensor, check_activations, dtype_name

# The size of chunks where the caller does not say. Runs of a program must agree on it, so it does
# not depend on a client's settings.
CHUNK_BYTES = 1 << 20
WINDOW_BYTES = 256 << 20


class ChunkWindow:
    """Rows cut into chunks, and the chunks that may have to be sent again.

    Chunk k holds rows [k * chunk_rows, (k + 1) * chunk_rows); the last one may hold fewer.
    """

    def __init__(self, chunk_rows: int) -> None:
        self._chunk_rows = chunk_rows
        self._rows = 0
        self._pending_rows = 0
        self._x: list[Piece] = []
        self._x_quantized: list[Piece] = []
        self._kept: deque[bytes] = deque()
        self.next = 0
        """The number of chunks completed."""
        self.bytes = 0
        """The size of the chunks that are kept."""

    @property
    def room(self) -> int:
        """Rows that the chunk in the making still takes; at least 1."""
        return self._chunk_rows - self._pending_rows

    @property
    def first(self) -> int:
        """The oldest chunk that is kept, or `next`."""
        return self.next - len(self._kept)

    def append(self, rows: int, x: Piece, x_quantized: Piece | None) -> bool:
        """Adds at most `room` rows; True: that completed a chunk."""
        self._x.append(x)
        if x_quantized is not None:
            self._x_quantized.append(x_quantized)
        self._pending_rows += rows
        if self._pending_rows < self._chunk_rows:
            return False
        self.flush()
        return True

    def own(self) -> None:
        """Copies what is not part of a chunk yet: the caller's memory may go."""
        self._x = [bytes(piece) for piece in self._x]
        self._x_quantized = [bytes(piece) for piece in self._x_quantized]

    def flush(self) -> None:
        """Completes a chunk of the rows that are left, if any."""
        if self._pending_rows == 0:
            return
        frame = accumulate_frame(self.next, self._x, self._x_quantized)
        self._x, self._x_quantized = [], []
        self._rows += self._pending_rows
        self._pending_rows = 0
        self.next += 1
        self.bytes += len(frame)
        self._kept.append(frame)

    def drop_before(self, sequence: int) -> None:
        while self._kept and self.first < sequence:
            self.bytes -= len(self._kept.popleft())

    def chunk(self, sequence: int) -> bytes:
        return self._kept[sequence - self.first]

    def rows_before(self, sequence: int) -> int:
        return min(sequence * self._chunk_rows, self._rows)


class StreamSender:
    """The sender of one stream, over as many calls as it takes.

    Three positions of the stream matter, in chunks: the server's `durable`, before which nothing
    is kept; its `received`, where a call goes on; and window.next, up to which the caller's rows
    were cut. `received` may lie before window.next (chunks to send again after a crash) or beyond
    it (a restarted process: chunks to skip).
    """

    def __init__(
        self,
        transport: Transport,
        tries: Tries,
        header: AccumulateHeader,
        features: int,
        chunk_rows: int,
        window_bytes: int,
    ) -> None:
        self._transport = transport
        self._tries = tries
        self._header = header
        self._features = features
        self._window_bytes = window_bytes
        self._window = ChunkWindow(chunk_rows)
        # The first error ends the stream and is raised from then on.
        self._error: Error | None = None
        self._call: AccumulateCall | None = None
        self._began = 0.0
        # The next chunk that this call sends.
        self._position = 0
        # The position at which this call began, until it was compared with the rows here.
        self._unchecked: StreamProgress | None = None
        self._last = StreamProgress()
        self._opened_once = False
        self._finished = False
        self._furthest = 0

    @property
    def progress(self) -> StreamProgress:
        """The server's position, as its last answer says."""
        return self._last if self._call is None else self._call.latest

    async def open(self) -> None:
        await self._remembering(self._ensure_open())

    async def write(self, x: Tensor, x_quantized: Tensor | None) -> None:
        self._raise_error()
        self._check_rows(x, x_quantized)
        await self._remembering(self._write(x, x_quantized))

    async def _write(self, x: Tensor, x_quantized: Tensor | None) -> None:
        row, rows = 0, x.shape[0]
        while row < rows:
            stop = min(row + self._window.room, rows)
            completed = self._window.append(
                stop - row,
                x.rows(row, stop),
                None if x_quantized is None else x_quantized.rows(row, stop),
            )
            row = stop
            if completed:
                await self._send_what_is_there()
        self._window.own()

    async def close(self) -> StreamProgress:
        self._raise_error()
        self._window.flush()
        await self._remembering(self._send_all_and_finish())
        self._error = FailedPrecondition("the stream was closed")
        return self._last

    def abort(self) -> None:
        """Gives the stream up; what the server received stays."""
        self._drop_call()
        if self._error is None:
            self._error = FailedPrecondition("the stream was given up")

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    async def _remembering(self, step: Awaitable[None]) -> None:
        try:
            await step
        except Error as error:
            self._error = error
            self._drop_call()
            raise
        except BaseException:
            # Rows may have been cut that were not sent; no others may follow them.
            self.abort()
            raise

    def _drop_call(self) -> None:
        if self._call is not None:
            self._last = self._call.latest
            self._call.abort()
            self._call = None

    def _check_rows(self, x: Tensor, x_quantized: Tensor | None) -> None:
        check_activations(x, x_quantized)
        quantized = DATA_TYPE_UNSPECIFIED if x_quantized is None else x_quantized.dtype
        wanted = (self._header.x, self._header.x_quantized, self._features)
        if (x.dtype, quantized, x.shape[1]) != wanted:
            raise invalid(
                "x",
                f"expected rows of {self._features} {dtype_name(self._header.x)} with x_quantized "
                f"{dtype_name(self._header.x_quantized)}, got {x.shape[1]} {dtype_name(x.dtype)} "
                f"with {dtype_name(quantized)}",
            )

    async def _ensure_open(self) -> None:
        """Returns when a call is open and has said where to go on."""
        header = AccumulateRequest(header=self._header).SerializeToString()
        while self._call is None:
            stream_id = self._header.stream_id
            self._began = time.monotonic()
            try:
                self._call = self._transport.accumulate(header, stream_id, self._tries.remaining())
            except Failed as failed:  # It fails at once only where the client was closed.
                raise failed.error from failed
            first = await self._call.wait_for_first()
            if first is None:
                await self._recover(everything_sent=False)
                continue
            # Chunks that were durable must stay there: they are not kept here any more.
            if first.received < self._window.first:
                raise DataLoss(
                    f'the server lost chunks of stream "{stream_id}" that it had called durable: '
                    f"it asks for {first.received}, and those before {self._window.first} are "
                    "gone here"
                )
            if not self._opened_once:
                self._furthest = first.received
            self._opened_once = True
            self._position = first.received
            self._unchecked = first

    async def _send_what_is_there(self) -> None:
        """Returns when everything in the window was sent and it is not full."""
        while True:
            await self._ensure_open()
            self._check_position()
            if await self._send_pending():
                assert self._call is not None
                self._drop_durable()
                if self._window.bytes <= self._window_bytes:
                    return
                if await self._call.wait_for_durable_beyond(self._window.first):
                    continue
            await self._recover(everything_sent=False)

    async def _send_all_and_finish(self) -> None:
        """Returns when the server has ended the call with everything durable."""
        while not self._finished:
            await self._send_what_is_there()
            assert self._call is not None
            if self._position > self._window.next:
                raise FailedPrecondition(
                    f'stream "{self._header.stream_id}": the server holds {self._position} chunks '
                    f"of it, but there were only {self._window.next} to write: these are other "
                    "rows"
                )
            await self._call.close_and_wait()
            await self._recover(everything_sent=True)

    def _check_position(self) -> None:
        """Checks that the server's chunks were cut as those here, as soon as that can be told."""
        unchecked = self._unchecked
        if unchecked is None or unchecked.received > self._window.next:
            return
        self._unchecked = None
        rows = self._window.rows_before(unchecked.received)
        if rows != unchecked.tokens:
            raise FailedPrecondition(
                f'stream "{self._header.stream_id}": the server holds {unchecked.tokens} tokens in '
                f"its first chunks, here these have {rows} rows: the stream was begun with other "
                "types, other rows or another chunk_rows"
            )

    async def _send_pending(self) -> bool:
        assert self._call is not None
        while self._position < self._window.next:
            if not await self._call.send(self._window.chunk(self._position)):
                return False
            self._position += 1
        return True

    def _drop_durable(self) -> None:
        assert self._call is not None
        progress = self._call.latest
        if progress.received > self._position:
            raise broken(
                f"progress.received: expected at most {self._position}, which is what was sent, "
                f"got {progress.received}"
            )
        self._window.drop_before(progress.durable)

    async def _recover(self, *, everything_sent: bool) -> None:
        """Takes a call's end: returns to open another one, or because all is done."""
        assert self._call is not None
        outcome = await self._call.finish()
        progress = self._call.latest
        self._call = None
        self._unchecked = None
        if outcome.error is None:
            if everything_sent and progress.durable == self._window.next:
                self._last = progress
                self._finished = True
                return
            outcome.error = unexpected_end(progress.durable, self._window.next)
            outcome.local = True
        outcome.resumable = self._opened_once
        if not progress.stream_id:
            # An open call may have had nothing to send: only the time of opening counts as waste.
            outcome.elapsed = time.monotonic() - self._began
        outcome.progressed = progress.received > self._furthest
        self._furthest = max(self._furthest, progress.received)
        await self._tries.next(outcome)


def row_bytes(features: int, x: DataType, x_quantized: DataType) -> int:
    quantized = NUMPY[x_quantized].itemsize if x_quantized != DATA_TYPE_UNSPECIFIED else 0
    return features * (NUMPY[x].itemsize + quantized)
