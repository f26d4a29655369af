"""The retry policy: which failed calls are tried again, and the waits before that."""

import math
import random
from dataclasses import dataclass

from certiq.errors import Error, ResourceExhausted, Unavailable, invalid


@dataclass(frozen=True)
class Retry:
    """UNAVAILABLE is tried again, and RESOURCE_EXHAUSTED where the server says when.

    All times are seconds. The wait after try k = 1, 2, ... is drawn from [1/2, 1] of
    min(max_backoff, initial_backoff * multiplier**(k - 1)), so that clients that failed together
    do not come back together; it is never shorter than what the server asks for.
    """

    max_attempts: int = 4
    """Tries in all; 1 never repeats."""
    initial_backoff: float = 0.4
    max_backoff: float = 10.0
    multiplier: float = 2.0
    max_server_delay: float = 60.0
    """A server that asks for a longer wait than this is not waited for."""
    unreachable_budget: float = 2.0
    """The time for which a server out of reach is tried: attempts and waits together."""
    resume_budget: float = 120.0
    """The time for which a stream that was open once is tried without getting further: attempts and
    waits together. A server that restarts needs more time than a wrong address deserves."""

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise invalid("retry.max_attempts", f"expected at least 1, got {self.max_attempts}")
        for name in ("initial_backoff", "max_backoff", "max_server_delay"):
            self._check(name, 0.0)
        for name in ("unreachable_budget", "resume_budget"):
            self._check(name, 0.0)
        self._check("multiplier", 1.0)

    def _check(self, name: str, least: float) -> None:
        value: float = getattr(self, name)
        if math.isnan(value) or value < least:
            raise invalid(f"retry.{name}", f"expected at least {least:g}, got {value}")


@dataclass
class Outcome:
    """The end of one try."""

    error: Error | None = None
    reached_server: bool = False
    """Something was sent to or came from a server."""
    result_started: bool = False
    """A part of the result came: the work was done; doing it again is the caller's choice."""
    local: bool = False
    """The error was found here, in what the server sent: it would do so again."""
    resumable: bool = False
    """It goes on from where it broke: resume_budget holds instead of the other limits."""
    progressed: bool = False
    """It got further than every try before: the counts begin anew."""
    elapsed: float = 0.0


class Backoff:
    """The decisions of one call."""

    def __init__(self, policy: Retry) -> None:
        self._policy = policy
        self._random = random.Random()
        self._unreachable = 0.0
        self._stuck = 0.0
        self.attempts = 0

    def next_delay(self, outcome: Outcome) -> float | None:
        """Seconds before the next try; None: give up."""
        if outcome.progressed:
            self.attempts = 0
            self._unreachable = self._stuck = 0.0
        self.attempts += 1
        error = outcome.error
        if error is None or outcome.local or outcome.result_started:
            return None
        asked = error.retry_delay
        exhausted = isinstance(error, ResourceExhausted) and asked is not None
        if not exhausted and not isinstance(error, Unavailable):
            return None
        policy = self._policy
        if asked is not None and asked > policy.max_server_delay:
            return None
        step = policy.initial_backoff * policy.multiplier ** min(self.attempts - 1, 64)
        delay = min(step, policy.max_backoff) * self._random.uniform(0.5, 1.0)
        if asked is not None:
            # The jitter comes on top: earlier than asked would only be refused again.
            delay = asked + min(delay, asked / 4)
        return delay if self._may_repeat(outcome, delay) else None

    def _may_repeat(self, outcome: Outcome, delay: float) -> bool:
        """Within the budgets, which the delay uses up."""
        if outcome.resumable:
            # The time of a try that got further counts as no waste.
            self._stuck += delay + (0.0 if outcome.progressed else outcome.elapsed)
            return self._stuck <= self._policy.resume_budget
        if self.attempts >= self._policy.max_attempts:
            return False
        if outcome.reached_server:
            return True
        self._unreachable += outcome.elapsed + delay
        return self._unreachable <= self._policy.unreachable_budget
