"""Clients that keep a server busy with everything there is to see, until they are told to stop."""

import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

import grpc
import numpy as np
from cluster import Client, JobRequest
from programs import Server
from raw import Layer, collect, connect, quantize
from stubs import spec_pb2
from sums import made_up
from work import calibrated

OPTQ, QRONOS, NEAREST = spec_pb2.METHOD_OPTQ, spec_pb2.METHOD_QRONOS, spec_pb2.METHOD_NEAREST


def layer(method: int, bits: int, seed: int, rows: int = 384, features: int = 512) -> Layer:
    """Features resemble each other, as those of real layers do; one is dead, two are twins."""
    random = np.random.default_rng(seed)
    made = Layer.made_up(rows, features, 2 * features, seed)
    made.X = (made.X @ np.diag(random.lognormal(0, 1, features))).astype("<f4")
    made.X += made.X.mean(axis=1, keepdims=True)
    made.X[:, 0] = 0
    made.X[:, 2] = made.X[:, 1]
    made.header.spec.method = method
    made.header.spec.bits = bits
    return made


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

    def _quantize(self, made: Layer) -> None:
        with connect(self._server) as channel:
            collect(quantize(channel, made.frames()))

    def _layers(self, number: int, turn: int) -> None:
        method = (OPTQ, OPTQ, QRONOS, NEAREST)[turn % 4]
        bits = (4, 3, 4, 8)[turn % 4]
        self._quantize(layer(method, bits, seed=number))

    def _jobs(self, number: int, turn: int) -> None:
        """Jobs that share a calibration, and so its factor."""
        client = Client.of(self._server)
        random = np.random.default_rng(turn)
        calibration = calibrated(client, made_up(random, f"rank-{number}", 1024, 256))
        jobs = [
            client.create_job(
                JobRequest(calibration, random.standard_normal((256, 256)).astype("<f4"), ttl=5)
            ).id
            for _ in range(4)
        ]
        for job in jobs:
            client.wait_job(job)
        client.delete(calibration)

    def _troubles(self, number: int, _turn: int) -> None:
        """What is refused, and what λ fails on."""
        refused = layer(OPTQ, 9, number, rows=8, features=32)
        with suppress(grpc.RpcError):
            self._quantize(refused)
        # λ has to be raised several times, or cannot be raised at all.
        for attempts in (5, 1):
            made = layer(OPTQ, 4, number, rows=64, features=64)
            made.header.spec.damping.relative_trace = 1e-18
            made.header.spec.damping.factor = 1000
            made.header.spec.damping.max_attempts = attempts
            made.header.spec.damping.on_failure = spec_pb2.ON_FAILURE_NEAREST
            self._quantize(made)
        self._stop.wait(0.2)
