"""Retries: the attempts of one call, and the waits between them."""

import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from certiq.errors import Error, from_rpc_error, invalid
from certiq.progress import Retrying
from certiq.retry import Backoff, Outcome, Retry


class Failed(Exception):
    """A try ended with an error of gRPC."""

    def __init__(self, error: Error, reached_server: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.reached_server = reached_server

    def outcome(self, *, came: bool = False) -> Outcome:
        """`came`: something did."""
        return Outcome(error=self.error, reached_server=self.reached_server or came)


def failed(error: Any, exchanged: bool) -> Failed:
    """`exchanged`: a message was sent or came. A server that refuses before it reads anything
    leaves metadata behind, unless it has none to say."""
    reached = (
        exchanged
        or error.code() != grpc.StatusCode.UNAVAILABLE
        or bool(error.initial_metadata())
        or bool(error.trailing_metadata())
    )
    return Failed(from_rpc_error(error), reached)


class Deadline:
    """The point in time by which a call is over, its tries included."""

    def __init__(self, timeout: float | None) -> None:
        if timeout is not None and not timeout > 0:
            raise invalid("timeout", f"expected seconds above 0, got {timeout}")
        self.at = math.inf if timeout is None else time.monotonic() + timeout

    def remaining(self) -> float | None:
        """Seconds; None: as many as it takes."""
        # A call with hardly any time left still ends with DeadlineExceeded.
        return None if self.at == math.inf else max(1e-3, self.at - time.monotonic())


class Tries:
    """The loop over the tries of a call: it decides after each that failed, and waits."""

    def __init__(
        self,
        retry: Retry,
        sleep: Callable[[float], Awaitable[None]],
        timeout: float | None,
        report: Callable[[Retrying], None] | None,
    ) -> None:
        self._sleep = sleep
        self._report = report
        self._deadline = Deadline(timeout)
        self._backoff = Backoff(retry)

    def remaining(self) -> float | None:
        """Seconds for the next try."""
        return self._deadline.remaining()

    async def next(self, outcome: Outcome) -> None:
        """Returns when it is time for another try; raises what the call ends with otherwise."""
        error = outcome.error
        assert error is not None
        delay = self._backoff.next_delay(outcome)
        attempts = self._backoff.attempts
        if delay is None:
            raise error if attempts == 1 else error.with_suffix(f" ({attempts} tries)")
        if time.monotonic() + delay >= self._deadline.at:
            raise error.with_suffix(
                f" ({attempts} tries; the next one would come after the deadline)"
            )
        if self._report is not None:
            self._report(Retrying(error, attempts, delay))
        await self._sleep(delay)

    async def run(self, attempt: Callable[[float | None], Awaitable[Outcome]]) -> None:
        """Calls it with the seconds there are until it succeeds; it may raise Failed as well."""
        while True:
            outcome = await _timed(attempt, self.remaining())
            if outcome.error is None:
                return
            await self.next(outcome)


async def _timed(
    attempt: Callable[[float | None], Awaitable[Outcome]], timeout: float | None
) -> Outcome:
    start = time.monotonic()
    try:
        outcome = await attempt(timeout)
    except Failed as failed:
        outcome = failed.outcome()
    outcome.elapsed = time.monotonic() - start
    return outcome
