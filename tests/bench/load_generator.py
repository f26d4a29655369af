"""A load generator: clients as processes of their own, and what they and the server took meanwhile.

The process that measures never speaks gRPC, which does not survive a fork: it forks the clients,
who share what was built before, and looks on.
"""

import multiprocessing
import os
import resource
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path

import grpc
from programs import PATIENCE_SECONDS, Server
from raw import Calls
from work import client_of

MEMORY_GAUGE = "certiq_memory_reserved_bytes"
SAMPLE_SECONDS = 1.0

Samples = dict[str, list[float]]


class ClientsFailedError(Exception):
    """Some clients of a measurement failed, so there is none."""


class Turn:
    """One client's part of a measurement."""

    def __init__(
        self, address: str, number: int, seconds: float, at_least: int, barrier: object
    ) -> None:
        self.address = address
        self.client = client_of(self)
        self.calls = Calls(self)
        grpc.channel_ready_future(self.calls.channel).result(PATIENCE_SECONDS)
        self.number = number
        self.samples: Samples = defaultdict(list)
        self.started = 0.0
        self._seconds = seconds
        self._at_least = at_least
        self._barrier = barrier
        self._cpu = 0.0

    def begin(self) -> None:
        """Once everything is prepared: waits for the others, then the time counts."""
        self._barrier.wait(PATIENCE_SECONDS)
        self._cpu = cpu_seconds()
        self.started = time.perf_counter()

    def more(self, done: int) -> bool:
        return done < self._at_least or time.perf_counter() - self.started < self._seconds

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.samples[kind].append(time.perf_counter() - start)

    def report(self, count: int) -> "Report":
        ended = time.perf_counter()
        assert self.started > 0
        return Report(count, self.started, ended, cpu_seconds() - self._cpu, dict(self.samples))


@dataclass(frozen=True)
class Report:
    """What a client did between its begin and its end."""

    count: int
    started: float
    ended: float
    cpu_seconds: float
    samples: Samples


# Prepares, calls Turn.begin, works while there is Turn.more; how much it did.
Act = Callable[[Turn], int]


@dataclass(frozen=True)
class Measurement:
    """All clients from the first begin to the last end, and the server meanwhile.

    Memory is the server's highest since it started, so each measurement wants a server of its own.
    """

    clients: int
    count: int
    seconds: float
    client_cpu_seconds: float
    server_cpu_seconds: float
    # Everything else that ran on the machine, this program and the kernel included.
    other_cpu_seconds: float
    peak_rss_bytes: int
    # The highest of one sample a second.
    peak_reserved_bytes: int
    samples: Samples = field(repr=False)

    @property
    def rate(self) -> float:
        return self.count / self.seconds

    def percentile(self, kind: str, percent: float) -> float:
        ordered = sorted(self.samples[kind])
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]

    def median(self, kind: str) -> float:
        return self.percentile(kind, 50)

    def as_json(self) -> dict[str, object]:
        plain = {key: value for key, value in vars(self).items() if key != "samples"}
        latencies = {
            kind: {
                "count": len(self.samples[kind]),
                "p50": self.median(kind),
                "p99": self.percentile(kind, 99),
                "max": max(self.samples[kind]),
            }
            for kind in self.samples
        }
        return plain | {"rate": self.rate, "latency_seconds": latencies}


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def server_cpu_seconds(server: Server) -> float:
    stat = Path(f"/proc/{server.process.pid}/stat").read_text()
    # What follows the name in parentheses begins with field 3; 14 and 15 are user and system.
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def machine_cpu_seconds() -> float:
    """CPU seconds of all processes and the kernel; neither idle ones nor stolen ones."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()
    return sum(int(fields[i]) for i in (1, 2, 3, 6, 7)) / os.sysconf("SC_CLK_TCK")


def be_client(act: Act, pipe: connection.Connection, *turn: object) -> None:
    """A client's whole process."""
    try:
        mine = Turn(*turn)
        pipe.send(mine.report(act(mine)))
    except BaseException:
        # Whoever waits for this client to begin need not.
        turn[-1].abort()
        pipe.send(traceback.format_exc())
    # Without waiting for threads of calls that failed.
    os._exit(0)


def watch(server: Server, pipes: list[connection.Connection]) -> tuple[list[Report], int]:
    """What the clients report, and the highest gauge of memory until then."""
    reports: list[Report] = []
    failures: list[str] = []
    waiting = set(pipes)
    highest = 0.0
    pause = SAMPLE_SECONDS / 4
    while waiting:
        ready = connection.wait(waiting, pause)
        if not ready:
            highest = max(highest, server.metrics().sum(MEMORY_GAUGE))
            pause = SAMPLE_SECONDS
        for pipe in ready:
            waiting.remove(pipe)
            try:
                said = pipe.recv()
            except EOFError:
                said = "a client died"
            if isinstance(said, Report):
                reports.append(said)
            else:
                failures.append(said)
    if failures:
        # Others fail because one did: the first may only be a broken barrier.
        telling = [text for text in failures if "BrokenBarrierError" not in text] or failures
        raise ClientsFailedError(f"{len(failures)} clients failed; one of them:\n{telling[0]}")
    return reports, int(highest)


def measure(
    server: Server, clients: int, act: Act, seconds: float, at_least: int = 1
) -> Measurement:
    """Lets so many clients act at once, each for so long and at least so often."""
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(clients + 1)
    pipes: list[connection.Connection] = []
    processes: list[multiprocessing.Process] = []
    try:
        for number in range(clients):
            receiver, sender = fork.Pipe(duplex=False)
            turn = (server.address, number, seconds, at_least, barrier)
            process = fork.Process(target=be_client, args=(act, sender, *turn), daemon=True)
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        try:
            barrier.wait(PATIENCE_SECONDS)
        except threading.BrokenBarrierError:
            # One of them says why.
            watch(server, pipes)
            raise
        machine, of_server = machine_cpu_seconds(), server_cpu_seconds(server)
        reports, reserved = watch(server, pipes)
        machine, of_server = machine_cpu_seconds() - machine, server_cpu_seconds(server) - of_server
    finally:
        for process in processes:
            process.kill()
            process.join()
    status = server.process.poll()
    assert status is None, f"the server ended with {status}:\n{server.log()}"
    samples: Samples = defaultdict(list)
    for report in reports:
        for kind, values in report.samples.items():
            samples[kind] += values
    of_clients = sum(report.cpu_seconds for report in reports)
    return Measurement(
        clients=clients,
        count=sum(report.count for report in reports),
        seconds=max(r.ended for r in reports) - min(r.started for r in reports),
        client_cpu_seconds=of_clients,
        server_cpu_seconds=of_server,
        other_cpu_seconds=max(0.0, machine - of_server - of_clients),
        peak_rss_bytes=server.memory_bytes("VmHWM"),
        peak_reserved_bytes=reserved,
        samples=dict(samples),
    )
