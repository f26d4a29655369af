"""A server that is killed again and again, and clients that keep at it."""

import hashlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc
import numpy as np
from cluster import FINAL, Client, JobRequest, Pipe, Result
from programs import Server, spawn_server
from stubs import calibration_pb2, job_pb2, spec_pb2
from sums import HELD_OUT, MATCHED, MISMATCHED, Source, Sums, made_up, split_sums

T = TypeVar("T")
RETRIED = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
}
# No call that is tried again may take longer, with all its tries.
STUBBORN_SECONDS = 120.0
IMPORTED = "imported"


class Victim:
    """One data directory, and the server that has it just now."""

    def __init__(self, folder: Path, flags: list[str]) -> None:
        self._folder = folder
        self.data = folder / "data"
        self._flags = [*flags, "--data_dir", str(self.data)]
        self._lives = 0
        self.start()

    def _next_folder(self) -> Path:
        self._lives += 1
        return self._folder / f"life_{self._lives}"

    def start(self) -> None:
        self.server = Server(self._next_folder(), self._flags)
        # Older channels are left alone: calls may still be ending on them.
        self.client = Client.of(self.server)

    def kill(self) -> None:
        status = self.server.process.poll()
        assert status is None, f"ended by itself with {status}:\n{self.server.log()}"
        self.server.process.kill()
        self.server.wait()

    def kill_while_starting(self, after: float) -> None:
        """One more life, which may end before it has begun."""
        process = spawn_server(self._next_folder(), self._flags)
        time.sleep(after)
        assert process.poll() is None, "ended by itself while starting"
        process.kill()
        process.wait()

    def persist(self, call: Callable[[Client], T]) -> T:
        """Tries again as the contract allows."""
        end = time.monotonic() + STUBBORN_SECONDS
        while True:
            try:
                return call(self.client)
            except grpc.RpcError as error:
                if error.code() not in RETRIED or time.monotonic() > end:
                    raise
            time.sleep(0.02)


@dataclass
class StoredJob:
    """What a client knows of a job of its own."""

    request: JobRequest
    ids: set[str] = field(default_factory=set)
    last: job_pb2.Job | None = None
    # Of the result; empty without one.
    digest: str = ""
    deleted: bool = False

    @property
    def id(self) -> str:
        (only,) = self.ids
        return only


@dataclass
class Round:
    """One calibration from its creation to the results of its jobs."""

    name: str
    sources: list[Source]
    imported: Sums
    mismatched: bool
    fraction: float
    sequence_rows: int
    ids: set[str] = field(default_factory=set)
    finalized: calibration_pb2.Calibration | None = None
    jobs: list[StoredJob] = field(default_factory=list)

    @property
    def id(self) -> str:
        (only,) = self.ids
        return only

    def truth(self) -> tuple[Sums, Sums]:
        """Fitted to, held out."""
        fit, held_out = split_sums(self.sources, self.fraction, self.sequence_rows)
        return fit + self.imported, held_out


def digest(result: Result) -> str:
    """Of the bytes and the certificate, times aside."""
    return hashlib.sha256(result.data + result.timeless()).hexdigest()


class Clients:
    """One thread's rounds, until the storm is over."""

    def __init__(self, victim: Victim, seed: int) -> None:
        self._victim = victim
        self._seed = seed
        self._random = random.Random(seed)
        self._numpy = np.random.default_rng(seed)
        self.rounds: list[Round] = []
        self.given_up = 0

    def run(self, over: threading.Event) -> None:
        while not over.is_set():
            made = self._make(len(self.rounds))
            self.rounds.append(made)
            self._fill(made)
            self._use(made)

    def _make(self, number: int) -> Round:
        # Each kind of calibration in turn.
        mismatched, holds_out = number % 2 == 1, number // 2 % 2 == 1
        features = self._random.choice([24, 40, 64, 200])
        dtype = self._random.choice(["<f4", "<f2"])
        sources = [
            made_up(
                self._numpy,
                f"rank-{rank}",
                self._random.randrange(300, 1500),
                features,
                mismatched=mismatched,
                dtype=dtype,
                chunk_rows=self._random.choice([1, 7, 32]),
            )
            for rank in range(3)
        ]
        extra = made_up(self._numpy, IMPORTED, 50, features, mismatched=mismatched)
        name = f"{self._seed}-{number}"
        imported = Sums.of(extra.x, extra.x_quantized)
        return Round(name, sources, imported, mismatched, 0.25 if holds_out else 0, 16)

    def _fill(self, made: Round) -> None:
        persist = self._victim.persist

        def create(client: Client) -> None:
            answer = client.create(
                made.sources[0].x.shape[1],
                kind=MISMATCHED if made.mismatched else MATCHED,
                request_id=made.name,
                fraction=made.fraction,
                sequence_rows=made.sequence_rows,
                labels=["storm"],
            )
            made.ids.add(answer.id)

        persist(create)
        errors: list[BaseException] = []

        def send(source: Source, seed: int) -> None:
            try:
                self._send(made, source, random.Random(seed))
            except BaseException as error:
                errors.append(error)

        threads = [
            threading.Thread(target=send, args=(source, self._random.getrandbits(32)))
            for source in made.sources
        ]
        for thread in threads:
            thread.start()
        persist(lambda client: client.import_sums(made.id, IMPORTED, made.imported))
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        persist(create)
        again = persist(lambda client: client.import_sums(made.id, IMPORTED, made.imported))
        assert again.already_committed
        tokens = sum(len(source.x) for source in made.sources) + made.imported.tokens
        names = [source.stream_id for source in made.sources] + [IMPORTED]
        made.finalized = persist(lambda client: client.finalize(made.id, tokens, names))

    def _send(self, made: Round, source: Source, chance: random.Random) -> None:
        """Until all of it is durable; breaks the call off on purpose now and then."""
        while True:
            most = max(1, source.chunks // 2)
            give_up = chance.randrange(most) if chance.random() < 0.7 else None
            attempt = self._victim.persist(
                lambda client, after=give_up: client.accumulate(made.id, source, after)
            )
            if attempt is None:
                self.given_up += 1
                continue
            assert attempt.received == attempt.durable == source.chunks
            assert attempt.tokens == len(source.x)
            return

    def _use(self, made: Round) -> None:
        features = made.sources[0].x.shape[1]
        # Large enough for some to be running when a kill comes.
        rows = self._random.choice([8, 300, 4000])
        W = self._numpy.standard_normal((rows, features)).astype(np.float32)
        specs = [
            spec_pb2.QuantizationSpec(bits=4),
            spec_pb2.QuantizationSpec(bits=3, symmetric=False, group_size=16),
            spec_pb2.QuantizationSpec(bits=4),
        ]
        if made.mismatched:
            specs[1].method = spec_pb2.METHOD_QRONOS
        if made.fraction:
            specs[2].damping.held_out.ladder[:] = [0.01 * step for step in range(1, 5)]
        for number, spec in enumerate(specs):
            request = JobRequest(made.id, W, spec, f"{made.name}-{number}", chunk_rows=64)
            self._abandon(request)
            job = StoredJob(request)
            made.jobs.append(job)
            self._create(job)
        if self._random.random() < 0.3:
            self._victim.persist(lambda client: client.cancel_job(made.jobs[2].id))
        for job in made.jobs:
            self._victim.persist(lambda client, job=job: self._watch(client, job))
            assert job.last is not None
            if job.last.state == job_pb2.JOB_STATE_SUCCEEDED:
                self._read(job)
            # The same again, now that it has ended.
            self._create(job)
        if self._random.random() < 0.3:
            self._victim.persist(lambda client: self._delete(client, made.jobs[1]))

    def _create(self, job: StoredJob) -> None:
        job.ids.add(self._victim.persist(lambda client: client.create_job(job.request)).id)

    def _abandon(self, request: JobRequest) -> None:
        """Uploads half of it, and never comes back."""
        pipe = Pipe()
        for number, frame in enumerate(request.frames()):
            if number == 0:
                frame.header.request_id = f"abandoned-{frame.header.request_id}"
            if number < 2:
                pipe.send(frame)
        call = self._victim.client.jobs.CreateJob.future(iter(pipe), timeout=STUBBORN_SECONDS)
        time.sleep(self._random.uniform(0, 0.02))
        call.cancel()
        pipe.close()

    @staticmethod
    def _delete(client: Client, job: StoredJob) -> None:
        try:
            client.delete_job(job.id)
        except grpc.RpcError as error:
            # An earlier try may have done it.
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise
        job.deleted = True

    @staticmethod
    def _watch(client: Client, job: StoredJob) -> None:
        last = job.last
        for now in client.watch(job.id):
            if last is not None and last.state in FINAL:
                assert now.state == last.state, "a final state changed"
            job.last = last = now
        assert job.last is not None
        assert job.last.state in FINAL

    def _read(self, job: StoredJob) -> None:
        """From odd offsets, as calls break and because it may."""
        assert job.last is not None
        whole = Result(0)

        def go_on(client: Client) -> None:
            part = Result(len(whole.data))
            try:
                part.take(client.read_frames(job.id, part.offset))
            finally:
                whole.data += part.data
            whole.certificate = part.certificate

        self._victim.persist(go_on)
        assert len(whole.data) == job.last.result_bytes
        job.digest = digest(whole)
        offset = self._random.randrange(len(whole.data) + 1)
        rest = self._victim.persist(lambda client: client.read(job.id, offset))
        assert rest.data == whole.data[offset:]
        assert rest.timeless() == whole.timeless()


def run(victim: Victim, clients: list[Clients], kills: int, seed: int) -> None:
    """Kills while the clients work; returns when they are done with a server that lives."""
    chance = random.Random(seed)
    over = threading.Event()
    errors: list[BaseException] = []

    def work(one: Clients) -> None:
        try:
            one.run(over)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(one,)) for one in clients]
    for thread in threads:
        thread.start()
    try:
        done = 0
        while done < kills and not errors:
            # The storm itself, no wait for anything.
            time.sleep(0.1 + chance.expovariate(1.8) if chance.random() < 0.9 else 2.5)
            victim.kill()
            done += 1
            if chance.random() < 0.1 and done < kills:
                victim.kill_while_starting(chance.uniform(0, 0.06))
                done += 1
            victim.start()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def expect(client: Client, made: Round) -> None:
    """The calibration is as it was when it was finalized, and holds each token once."""
    assert made.finalized is not None
    now = client.get(made.id)
    for field_name in ("id", "state", "tokens", "held_out_tokens", "sums_sha256", "streams"):
        assert getattr(now, field_name) == getattr(made.finalized, field_name), made.name
    fit, held_out = made.truth()
    assert (now.tokens, now.held_out_tokens) == (fit.tokens, held_out.tokens), made.name
    client.export(made.id).assert_equals(fit, made.name)
    if made.fraction:
        client.export(made.id, HELD_OUT).assert_equals(held_out, made.name)
