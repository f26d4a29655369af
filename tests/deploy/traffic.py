"""Clients that keep a server busy with everything there is to see, until they are told to stop."""

import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

import certiq
import numpy as np
from programs import Server
from sums import made_up
from work import calibrated, client_of


def layer(seed: int, rows: int = 384, features: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and activations whose features resemble each other, as those of real layers do; one
    is dead, two are twins."""
    random = np.random.default_rng(seed)
    W = random.standard_normal((rows, features), dtype="<f4")
    X = random.standard_normal((2 * features, features), dtype="<f4")
    X = (X @ np.diag(random.lognormal(0, 1, features))).astype("<f4")
    X += X.mean(axis=1, keepdims=True)
    X[:, 0] = 0
    X[:, 2] = X[:, 1]
    return W, X


class Traffic:
    """Threads; a call that fails as it should is part of it, any other ends the test."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        acts = [self._layers, self._layers, self._jobs, self._troubles]
        self._threads = [
            threading.Thread(target=self._run, args=(act, number), daemon=True)
            for number, act in enumerate(acts)
        ]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if error is None and self._failures:
            raise self._failures[0]

    def _run(self, act: Callable[[int, int], None], number: int) -> None:
        try:
            turn = 0
            while not self._stop.is_set():
                act(number, turn)
                turn += 1
        except BaseException as error:
            self._failures.append(error)

    def _layers(self, number: int, turn: int) -> None:
        method = ("optq", "optq", "qronos", "nearest")[turn % 4]
        bits = (4, 3, 4, 8)[turn % 4]
        with client_of(self._server) as client:
            client.quantize(*layer(number), certiq.Spec(method=method, bits=bits))

    def _jobs(self, number: int, turn: int) -> None:
        """Jobs that share a calibration, and so its factor."""
        client = client_of(self._server)
        random = np.random.default_rng(turn)
        calibration = calibrated(client, made_up(random, f"rank-{number}", 1024, 256))
        jobs = [
            client.submit(
                random.standard_normal((256, 256)).astype("<f4"), calibration=calibration, ttl=5
            )
            for _ in range(4)
        ]
        for job in jobs:
            job.wait()
        calibration.delete()

    def _troubles(self, number: int, _turn: int) -> None:
        """What is refused, and what λ fails on."""
        with client_of(self._server) as client:
            with suppress(certiq.Error):
                client.quantize(*layer(number, rows=8, features=32), certiq.Spec(bits=9))
            # λ has to be raised several times, or cannot be raised at all.
            for attempts in (5, 1):
                spec = certiq.Spec(
                    method="optq",
                    bits=4,
                    damping="relative_trace:1e-18",
                    damping_factor=1000,
                    max_attempts=attempts,
                    on_failure="nearest",
                )
                client.quantize(*layer(number, rows=64, features=64), spec)
        self._stop.wait(0.2)
