"""One try of an Accumulate call: rows go out while positions come back."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grpc

from certiq._proto.calibration_service_pb2 import StreamProgress
from certiq._tries import Failed, failed
from certiq.errors import Error, Internal, broken
from certiq.retry import Outcome

# So many frames wait for gRPC: one on its way, one ready.
_AHEAD = 2


class Positions:
    """The server's latest position, which never goes back."""

    def __init__(self, stream_id: str) -> None:
        self._stream_id = stream_id
        self.came = False
        self.latest = StreamProgress()

    def take(self, progress: StreamProgress) -> None:
        """Takes a position; raises Internal where it breaks the contract."""
        last = self.latest
        if (
            progress.stream_id != self._stream_id
            or progress.received < last.received
            or progress.durable < last.durable
            or progress.durable > progress.received
        ):
            raise broken(
                f'progress: expected stream "{self._stream_id}" with {last.durable} <= durable <= '
                f'received and received >= {last.received}, got "{progress.stream_id}", '
                f"{progress.durable} and {progress.received}"
            )
        self.came = True
        self.latest = progress


class AccumulateCall(Protocol):
    """An open call of a stream, for one user at a time."""

    @property
    def latest(self) -> StreamProgress: ...

    async def wait_for_first(self) -> StreamProgress | None:
        """The first answer; None: the call ended."""

    async def send(self, frame: bytes) -> bool:
        """False: the call ended."""

    async def wait_for_durable_beyond(self, sequence: int) -> bool:
        """False: the call ended before."""

    async def close_and_wait(self) -> None:
        """Half-closes, and waits for the end."""

    async def finish(self) -> Outcome:
        """Waits for the end and says how it was."""

    def abort(self) -> None:
        """Ends the call at once."""


def outcome_of(error: Failed | Internal | None, positions: Positions) -> Outcome:
    if isinstance(error, Failed):
        return error.outcome(came=positions.came)
    return Outcome(error=error, reached_server=True, local=error is not None)


class BlockingAccumulateCall:
    """gRPC's thread takes frames from a queue, a thread of this object reads positions."""

    def __init__(
        self, start: Callable[[Iterator[bytes]], Any], header: bytes, stream_id: str
    ) -> None:
        self._changed = threading.Condition()
        self._outgoing = deque([header])
        self._wrote = 0
        self._closed = False
        self._ended = False
        self._positions = Positions(stream_id)
        self._error: Failed | Internal | None = None
        self._call = start(self._frames())
        self._reader = threading.Thread(
            target=self._read_all, name=f"certiq stream {stream_id}", daemon=True
        )
        self._reader.start()

    def _frames(self) -> Iterator[bytes]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._outgoing or self._closed or self._ended)
                if self._ended or not self._outgoing:
                    return
                frame = self._outgoing.popleft()
                self._wrote += 1
                self._changed.notify_all()
            yield frame

    def _read_all(self) -> None:
        error: Failed | Internal | None = None
        try:
            for response in self._call:
                with self._changed:
                    self._positions.take(response.progress)
                    self._changed.notify_all()
        except Internal as contract:
            error = contract
            self._call.cancel()
        except grpc.RpcError as status:
            error = failed(status, self._wrote > 1 or self._positions.came)
        with self._changed:
            self._error = error
            self._ended = True
            self._changed.notify_all()

    @property
    def latest(self) -> StreamProgress:
        with self._changed:
            return self._positions.latest

    async def wait_for_first(self) -> StreamProgress | None:
        with self._changed:
            self._changed.wait_for(lambda: self._positions.came or self._ended)
            return None if self._ended else self._positions.latest

    async def send(self, frame: bytes) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: len(self._outgoing) < _AHEAD or self._ended)
            if self._ended:
                return False
            self._outgoing.append(frame)
            self._changed.notify_all()
            return True

    async def wait_for_durable_beyond(self, sequence: int) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._positions.latest.durable > sequence)
            return self._positions.latest.durable > sequence

    async def close_and_wait(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended)

    async def finish(self) -> Outcome:
        self._reader.join()
        return outcome_of(self._error, self._positions)

    def abort(self) -> None:
        self._call.cancel()
        self._reader.join()


def unexpected_end(durable: int, chunks: int) -> Error:
    return broken(f"the call ended with {durable} of {chunks} chunks durable")
