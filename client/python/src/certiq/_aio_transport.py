"""One try of a call for asyncio, over the blocking gRPC.

gRPC's own asyncio loses the status of a server that ends a call while the client is writing: the
write that fails is reported as INTERNAL and what the server said, when to try again for example,
never comes (seen with grpcio 1.85.1). Its blocking side does not, and it encodes and sends rows in
threads of its own, so that the event loop is not held up by large tensors. What would block here
waits in a thread.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import grpc

from certiq._accumulate import BlockingAccumulateCall
from certiq._methods import Method, Request, Response
from certiq._proto.calibration_service_pb2 import StreamProgress
from certiq._transport import BlockingAnswers, BlockingTransport, Frames, run, settle
from certiq.retry import Outcome

T = TypeVar("T")

# Threads are made when they are needed, one for each stream that waits.
_MAX_THREADS = 1024


class AioTransport:
    def __init__(self, channel: grpc.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        self._blocking = BlockingTransport(channel, metadata)
        self._threads = ThreadPoolExecutor(_MAX_THREADS, "certiq")

    async def unary(
        self, method: Method[Request, Response], request: Request, timeout: float | None
    ) -> Response:
        response: Response = await _ended(self._blocking.start_unary(method, request, timeout))
        return response

    async def upload(
        self, method: Method[Request, Response], frames: Frames, timeout: float | None
    ) -> Response:
        future = self._blocking.start_upload(method, frames, timeout)
        response: Response = await _ended(future, frames)
        return response

    def download(
        self, method: Method[Request, Response], request: Request, timeout: float | None
    ) -> "AioAnswers[Response]":
        return AioAnswers(self._threads, self._blocking.download(method, request, timeout))

    def duplex(
        self, method: Method[Request, Response], frames: Frames, timeout: float | None
    ) -> "AioAnswers[Response]":
        return AioAnswers(self._threads, self._blocking.duplex(method, frames, timeout))

    def accumulate(
        self, header: bytes, stream_id: str, timeout: float | None
    ) -> "AioAccumulateCall":
        return AioAccumulateCall(
            self._threads, self._blocking.accumulate(header, stream_id, timeout)
        )

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        await self._blocking.close()
        self._threads.shutdown(wait=False)


async def _ended(future: Any, frames: Frames | None = None) -> Any:
    """The result or the error of a call with one answer."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def tell(_: object) -> None:
        with suppress(RuntimeError):  # The loop is gone, and nobody waits.
            loop.call_soon_threadsafe(ended.set)

    future.add_done_callback(tell)
    try:
        await ended.wait()
    except asyncio.CancelledError:
        future.cancel()
        raise
    return settle(future, frames)


async def _in_thread(threads: ThreadPoolExecutor, block: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, block)


class AioAnswers(AsyncIterator[Response]):
    def __init__(self, threads: ThreadPoolExecutor, answers: BlockingAnswers[Response]) -> None:
        self._threads = threads
        self._answers = answers

    async def __anext__(self) -> Response:
        try:
            return await _in_thread(self._threads, lambda: run(self._answers.__anext__()))
        except asyncio.CancelledError:
            self._answers.cancel()
            raise

    def cancel(self) -> None:
        self._answers.cancel()


class AioAccumulateCall:
    """Whoever is cancelled while it waits calls abort(), which ends the wait in the thread too."""

    def __init__(self, threads: ThreadPoolExecutor, call: BlockingAccumulateCall) -> None:
        self._threads = threads
        self._call = call

    @property
    def latest(self) -> StreamProgress:
        return self._call.latest

    async def wait_for_first(self) -> StreamProgress | None:
        return await _in_thread(self._threads, lambda: run(self._call.wait_for_first()))

    async def send(self, frame: bytes) -> bool:
        return await _in_thread(self._threads, lambda: run(self._call.send(frame)))

    async def wait_for_durable_beyond(self, sequence: int) -> bool:
        return await _in_thread(
            self._threads, lambda: run(self._call.wait_for_durable_beyond(sequence))
        )

    async def close_and_wait(self) -> None:
        await _in_thread(self._threads, lambda: run(self._call.close_and_wait()))

    async def finish(self) -> Outcome:
        return await _in_thread(self._threads, lambda: run(self._call.finish()))

    def abort(self) -> None:
        self._call.abort()
