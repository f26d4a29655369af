"""One try of a call, as the core sees it, and the blocking way to make it.

The core is written once, as coroutines. In asyncio they wait in an event loop
(_aio_transport.py). With the transport of this file nothing in them ever suspends, so that
run() takes them from beginning to end in the caller's thread; no event loop is involved.
"""

import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Protocol, TypeVar

import grpc

from certiq._accumulate import AccumulateCall, BlockingAccumulateCall
from certiq._methods import ACCUMULATE, Method, Request, Response, serialize
from certiq._tries import Failed, failed
from certiq.errors import Cancelled

T = TypeVar("T")
Answer = TypeVar("Answer", covariant=True)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The value of a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        value: T = stop.value
        return value
    coroutine.close()
    raise RuntimeError("a call of the blocking client waited for an event loop")


def iterate(items: AsyncIterator[T]) -> Iterator[T]:
    """The same for asynchronous generators."""
    try:
        while True:
            try:
                yield run(items.__anext__())  # type: ignore[arg-type]
            except StopAsyncIteration:
                return
    finally:
        close = getattr(items, "aclose", None)
        if close is not None:
            run(close())


class Frames(Iterator[bytes]):
    """Encoded messages of an upload; remembers how far it came."""

    def __init__(
        self, first: bytes, chunks: Iterator[tuple[bytes, int]], on_sent: Callable[[int], None]
    ) -> None:
        self._first: bytes | None = first
        self._chunks = chunks
        self._on_sent = on_sent
        self._sent_bytes = 0
        self._on_the_way = 0
        self.taken = 0
        self.exhausted = False
        # The error that kept rows from being read, such as a device that is out of memory.
        self.error: Exception | None = None

    def __next__(self) -> bytes:
        self.taken += 1
        if self._first is not None:
            first, self._first = self._first, None
            return first
        try:
            # gRPC asks for another one when the one before has gone.
            if self._on_the_way > 0:
                self._sent_bytes += self._on_the_way
                self._on_the_way = 0
                self._on_sent(self._sent_bytes)
            frame, self._on_the_way = next(self._chunks)
        except StopIteration:
            self.exhausted = True
            raise
        except Exception as error:
            # gRPC would say that something went wrong; this ends the call, and fails() says what.
            self.error = error
            raise StopIteration from None
        return frame

    def fails(self) -> None:
        """Raises why the rows could not be read, if they could not."""
        if self.error is not None:
            raise self.error

    @property
    def wrote(self) -> bool:
        """The first message went out."""
        return self.taken > 1


class Answers(Protocol[Answer]):
    """Responses of a call. After cancel() nothing may be read."""

    def __aiter__(self) -> AsyncIterator[Answer]: ...
    def cancel(self) -> None: ...


class Transport(Protocol):
    """Raises Failed where a try ends with an error."""

    async def unary(
        self, method: Method[Request, Response], request: Request, timeout: float | None
    ) -> Response: ...

    async def upload(
        self, method: Method[Request, Response], frames: Frames, timeout: float | None
    ) -> Response: ...

    def download(
        self, method: Method[Request, Response], request: Request, timeout: float | None
    ) -> Answers[Response]: ...

    def duplex(
        self, method: Method[Request, Response], frames: Frames, timeout: float | None
    ) -> Answers[Response]: ...

    def accumulate(
        self, header: bytes, stream_id: str, timeout: float | None
    ) -> AccumulateCall: ...

    async def sleep(self, seconds: float) -> None: ...

    async def close(self) -> None: ...


class BlockingAnswers(AsyncIterator[Response]):
    def __init__(self, call: Any, frames: Frames | None) -> None:
        self._call = call
        self._frames = frames

    async def __anext__(self) -> Response:
        try:
            response: Response = next(self._call)
        except StopIteration:
            if self._frames is not None:
                self._frames.fails()
            raise StopAsyncIteration from None
        except grpc.RpcError as error:
            raise _failed(error, self._frames) from error
        except BaseException:  # Ctrl-C, for example: the server need not go on.
            self._call.cancel()
            raise
        return response

    def cancel(self) -> None:
        self._call.cancel()


def _failed(error: grpc.RpcError, frames: Frames | None) -> Exception:
    if frames is None:
        return failed(error, False)
    return frames.error or failed(error, frames.wrote)


class BlockingTransport:
    """gRPC's own threads send; the caller's thread waits."""

    def __init__(self, channel: grpc.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        self._channel = channel
        self._metadata = metadata

    def _start(self, call: Any, request: object, timeout: float | None) -> Any:
        try:
            return call(request, timeout=timeout, metadata=self._metadata)
        except ValueError as error:
            # gRPC raises ValueError where the channel was closed.
            raise Failed(Cancelled("the client was closed"), reached_server=True) from error

    def start_unary(
        self, method: Method[Request, Response], request: Request, timeout: float | None
    ) -> Any:
        """A future of gRPC."""
        call = self._channel.unary_unary(method.path, serialize, method.response.FromString)
        return self._start(call.future, request, timeout)

    def start_upload(
        self, method: Method[Request, Response], frames: Frames, timeout: float | None
    ) -> Any:
        """A future of gRPC."""
        call = self._channel.stream_unary(method.path, serialize, method.response.FromString)
        return self._start(call.future, frames, timeout)

    async def unary(
        self, method: Method[Request, Response], request: Request, timeout: float | None
    ) -> Response:
        response: Response = settle(self.start_unary(method, request, timeout), None)
        return response

    async def upload(
        self, method: Method[Request, Response], frames: Frames, timeout: float | None
    ) -> Response:
        response: Response = settle(self.start_upload(method, frames, timeout), frames)
        return response

    def download(
        self, method: Method[Request, Response], request: Request, timeout: float | None
    ) -> BlockingAnswers[Response]:
        call = self._channel.unary_stream(method.path, serialize, method.response.FromString)
        return BlockingAnswers(self._start(call, request, timeout), None)

    def duplex(
        self, method: Method[Request, Response], frames: Frames, timeout: float | None
    ) -> BlockingAnswers[Response]:
        call = self._channel.stream_stream(method.path, serialize, method.response.FromString)
        return BlockingAnswers(self._start(call, frames, timeout), frames)

    def accumulate(
        self, header: bytes, stream_id: str, timeout: float | None
    ) -> BlockingAccumulateCall:
        call = self._channel.stream_stream(
            ACCUMULATE.path, serialize, ACCUMULATE.response.FromString
        )
        return BlockingAccumulateCall(
            lambda frames: self._start(call, frames, timeout), header, stream_id
        )

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def close(self) -> None:
        self._channel.close()


def settle(future: Any, frames: Frames | None) -> Any:
    """Waits for a future of gRPC; Failed with the status, or why the rows could not be read."""
    try:
        response = future.result()
    except grpc.RpcError as error:
        raise _failed(error, frames) from error
    except grpc.FutureCancelledError as error:
        # close() in another thread has cancelled it.
        raise Failed(Cancelled("the client was closed"), reached_server=True) from error
    except BaseException:
        future.cancel()
        raise
    if frames is not None:
        frames.fails()
    return response
