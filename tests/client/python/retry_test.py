"""When a call is tried again, and how long it waits."""

import certiq
import pytest
from certiq.progress import Event, Retrying
from certiq.retry import Backoff, Outcome
from conftest import StartServer
from work import busy, small, weight


def outcome(error: certiq.Error, **more: bool | float) -> Outcome:
    return Outcome(error=error, **{"reached_server": True, **more})  # type: ignore[arg-type]


UNAVAILABLE = certiq.Unavailable("it drains")


def test_waits_grow_and_are_drawn() -> None:
    policy = certiq.Retry(max_attempts=8, initial_backoff=1, max_backoff=5, multiplier=2)
    for _ in range(50):
        backoff = Backoff(policy)
        for expected in (1, 2, 4, 5, 5, 5, 5):
            delay = backoff.next_delay(outcome(UNAVAILABLE))
            assert delay is not None
            assert expected / 2 <= delay <= expected
        assert backoff.next_delay(outcome(UNAVAILABLE)) is None
    drawn = {Backoff(policy).next_delay(outcome(UNAVAILABLE)) for _ in range(20)}
    assert len(drawn) > 10


def test_never_earlier_than_the_server_says() -> None:
    full = certiq.ResourceExhausted("the queue is full", retry_delay=7.0)
    for _ in range(50):
        delay = Backoff(certiq.Retry()).next_delay(outcome(full))
        assert delay is not None
        assert 7.0 <= delay <= 7.0 * 1.25
    assert Backoff(certiq.Retry()).next_delay(
        outcome(certiq.Unavailable("", retry_delay=0.0))
    ) == pytest.approx(0.0)


def test_what_is_never_repeated() -> None:
    for given_up in (
        # A message that is too large always will be.
        outcome(certiq.ResourceExhausted("too large")),
        outcome(certiq.ResourceExhausted("come back tomorrow", retry_delay=61.0)),
        outcome(certiq.Unavailable("come back tomorrow", retry_delay=61.0)),
        outcome(certiq.InvalidArgument("no")),
        outcome(certiq.Internal("no")),
        outcome(certiq.Aborted("no")),
        outcome(certiq.DeadlineExceeded("no")),
        outcome(UNAVAILABLE, local=True),
        outcome(UNAVAILABLE, result_started=True),
    ):
        assert Backoff(certiq.Retry()).next_delay(given_up) is None
    assert Backoff(certiq.Retry(max_attempts=1)).next_delay(outcome(UNAVAILABLE)) is None


def test_a_server_nobody_reaches_is_given_up_early() -> None:
    away = outcome(UNAVAILABLE, reached_server=False, elapsed=0.9)
    backoff = Backoff(certiq.Retry(max_attempts=100, initial_backoff=0.1))
    delays = [backoff.next_delay(away) for _ in range(3)]
    assert delays[0] is not None
    # 2.7 s of trying are more than the 2 s there are.
    assert delays[2] is None


def test_streams_have_a_budget_of_time() -> None:
    policy = certiq.Retry(max_attempts=1, initial_backoff=1, max_backoff=1, resume_budget=10)
    broken = outcome(UNAVAILABLE, resumable=True, elapsed=1.0)
    backoff = Backoff(policy)
    waits = 0
    while backoff.next_delay(broken) is not None:
        waits += 1
    assert 5 <= waits <= 6
    # Whoever gets further begins anew.
    assert backoff.next_delay(outcome(UNAVAILABLE, resumable=True, progressed=True)) is not None
    assert backoff.attempts == 1


def test_a_full_queue_is_waited_for(start_server: StartServer) -> None:
    """As long as the server says, and not longer than the call may take."""
    server = start_server("--workers", "1", "--queue_limit", "1")
    W, X = weight(), weight(300)
    with certiq.Client(server.address) as client, busy(client) as running:
        queued = client.submit(W, calibration=small(client))
        with (
            certiq.Client(server.address, retry=certiq.Retry(max_attempts=1)) as impatient,
            pytest.raises(certiq.ResourceExhausted) as refused,
        ):
            impatient.quantize(W, X)
        asked = refused.value.retry_delay
        assert asked is not None
        assert asked > 0
        with pytest.raises(certiq.ResourceExhausted, match="after the deadline"):
            client.quantize(W, X, timeout=asked / 2)

        events: list[Retrying] = []

        def make_room(event: Event) -> None:
            if isinstance(event, Retrying):
                events.append(event)
                running.cancel()

        layer = client.quantize(W, X, progress=make_room)
        assert layer.shape == W.shape
        assert events
        for event in events:
            assert isinstance(event.error, certiq.ResourceExhausted)
            assert event.error.retry_delay is not None
            assert event.delay >= event.error.retry_delay
        assert queued.result().shape == W.shape
