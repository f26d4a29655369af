"""Kill -9 at any moment takes back nothing that was promised."""

import hashlib
import os
import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import certiq
import numpy as np
from certiq._proto.calibration_service_pb2 import StreamProgress
from raw import Pipe, StoredResult, job_frames, read_result, timeless
from server_under_test import STUBBORN_SECONDS, ServerUnderTest, persist
from stubs import calibration_pb2, job_pb2
from sums import Source, Sums, made_up, split_sums
from work import create, stream_of

# The more the better: each kill meets the server at a moment of its own.
KILLS = int(os.environ.get("CERTIQ_FAULT_KILLS", "20"))
FLAGS = ["--workers", "2", "--commit_seconds", "0.2"]
SEED = 20240229
IMPORTED = "imported"


@dataclass
class StoredJob:
    """A job as the client that made it knows it."""

    calibration_id: str
    weight: np.ndarray
    spec: certiq.Spec
    request_id: str
    ids: set[str] = field(default_factory=set)
    last: job_pb2.Job | None = None
    # The digest is that of the result; it stays empty without one.
    digest: str = ""
    deleted: bool = False

    @property
    def id(self) -> str:
        (only,) = self.ids
        return only

    def submit(self, client: certiq.Client, suffix: str = "") -> certiq.Job:
        return client.submit(
            self.weight,
            calibration=self.calibration_id,
            spec=self.spec,
            request_id=self.request_id + suffix,
        )


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


def digest(result: StoredResult) -> str:
    """SHA-256 of the bytes and the certificate without its times."""
    return hashlib.sha256(result.data + timeless(result.certificate)).hexdigest()


class Clients:
    """One thread's rounds, until the kills are over."""

    def __init__(self, under_test: ServerUnderTest, seed: int) -> None:
        self._server = under_test
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
        imported = Sums.of(extra.x, extra.x_quantized)
        name = f"{self._seed}-{number}"
        return Round(name, sources, imported, mismatched, 0.25 if holds_out else 0, 16)

    def _create(self, made: Round) -> None:
        answer = create(
            self._server.client,
            made.sources[0].x.shape[1],
            mismatched=made.mismatched,
            request_id=made.name,
            held_out_fraction=made.fraction,
            sequence_rows=made.sequence_rows,
            labels=["crash"],
        )
        made.ids.add(answer.id)

    def _import(self, made: Round) -> bool:
        return made.imported.import_into(self._server.calibration(made.id), IMPORTED)

    def _fill(self, made: Round) -> None:
        persist(lambda: self._create(made))
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
        persist(lambda: self._import(made))
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        persist(lambda: self._create(made))
        assert not persist(lambda: self._import(made)), "imported twice"
        tokens = sum(len(source.x) for source in made.sources) + made.imported.tokens
        names = [source.stream_id for source in made.sources] + [IMPORTED]
        made.finalized = persist(
            lambda: self._server.calibration(made.id).finalize(
                expected_tokens=tokens, expected_streams=names
            )
        ).info

    def _send(self, made: Round, source: Source, chance: random.Random) -> None:
        """Until all of it is durable; breaks the call off on purpose now and then."""
        while True:
            most = max(1, source.chunks // 2)
            give_up = chance.randrange(most) if chance.random() < 0.7 else None
            pause = chance.uniform(0, 0.02)
            end = persist(lambda g=give_up, p=pause: self._attempt(made, source, g, p))
            if end is None:
                self.given_up += 1
                continue
            assert end.received == end.durable == source.chunks
            assert end.tokens == len(source.x)
            return

    def _attempt(
        self, made: Round, source: Source, chunks: int | None, pause: float
    ) -> StreamProgress | None:
        """Sends what is missing, or so many chunks of it; None where it gave up before the end."""
        stream = stream_of(self._server.calibration(made.id), source)
        stop = source.chunks if chunks is None else stream.progress.received + chunks
        rows = slice(stop * source.chunk_rows)
        stream.send(
            source.x[rows], None if source.x_quantized is None else source.x_quantized[rows]
        )
        if stop >= source.chunks:
            return stream.close()
        time.sleep(pause)
        stream.abort()
        return None

    def _use(self, made: Round) -> None:
        features = made.sources[0].x.shape[1]
        # Large enough for some to be running when a kill comes.
        rows = self._random.choice([8, 300, 4000])
        W = self._numpy.standard_normal((rows, features)).astype(np.float32)
        ladder = "held_out:0.01,0.02,0.03,0.04" if made.fraction else None
        specs = [
            certiq.Spec(bits=4),
            certiq.Spec(
                bits=3,
                symmetric=False,
                group_size=16,
                method="qronos" if made.mismatched else None,
            ),
            certiq.Spec(bits=4, damping=ladder),
        ]
        for number, spec in enumerate(specs):
            job = StoredJob(made.id, W, spec, f"{made.name}-{number}")
            self._abandon(job)
            made.jobs.append(job)
            self._submit(job)
        if self._random.random() < 0.3:
            persist(lambda: self._server.job(made.jobs[2].id).cancel())
        for job in made.jobs:
            persist(lambda job=job: self._watch(job))
            assert job.last is not None
            if job.last.state == job_pb2.JOB_STATE_SUCCEEDED:
                self._read(job)
            # The same again, now that it has ended.
            self._submit(job)
        if self._random.random() < 0.3:
            persist(lambda: self._delete(made.jobs[1]))

    def _submit(self, job: StoredJob) -> None:
        job.ids.add(persist(lambda: job.submit(self._server.client)).id)

    def _abandon(self, job: StoredJob) -> None:
        """Uploads half of it, and never comes back."""
        header = job_pb2.CreateJobHeader(
            request_id=f"abandoned-{job.request_id}",
            spec=job.spec.to_proto(),
            calibration_id=job.calibration_id,
        )
        pipe = Pipe()
        for number, frame in enumerate(job_frames(header, job.weight, 64)):
            if number < 2:
                pipe.send(frame)
        call = self._server.calls.jobs.CreateJob.future(iter(pipe), timeout=STUBBORN_SECONDS)
        time.sleep(self._random.uniform(0, 0.02))
        call.cancel()
        pipe.close()

    def _delete(self, job: StoredJob) -> None:
        # An earlier try may have done it.
        with suppress(certiq.NotFound):
            self._server.job(job.id).delete()
        job.deleted = True

    def _watch(self, job: StoredJob) -> None:
        for now in self._server.job(job.id).watch():
            if job.last is not None and job.last.state >= job_pb2.JOB_STATE_SUCCEEDED:
                assert now.info.state == job.last.state, "a final state changed"
            job.last = now.info
        assert job.last is not None
        assert job.last.state >= job_pb2.JOB_STATE_SUCCEEDED

    def _read(self, job: StoredJob) -> None:
        """From odd offsets, as calls break and because it may."""
        assert job.last is not None
        whole = StoredResult()

        def go_on() -> None:
            part = StoredResult(len(whole.data))
            request = job_pb2.ReadResultRequest(job_id=job.id, byte_offset=part.offset)
            try:
                part.take(self._server.calls.jobs.ReadResult(request, timeout=STUBBORN_SECONDS))
            finally:
                whole.data += part.data
            whole.certificate = part.certificate

        persist(go_on)
        assert len(whole.data) == job.last.result_bytes
        job.digest = digest(whole)
        offset = self._random.randrange(len(whole.data) + 1)
        rest = persist(lambda: read_result(self._server.calls, self._server.job(job.id), offset))
        assert rest.data == whole.data[offset:]
        assert timeless(rest.certificate) == timeless(whole.certificate)


def kill_often(under_test: ServerUnderTest, clients: list[Clients], kills: int, seed: int) -> None:
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
            # A moment for the kill, no wait for anything.
            time.sleep(0.1 + chance.expovariate(1.8) if chance.random() < 0.9 else 2.5)
            under_test.kill()
            done += 1
            if chance.random() < 0.1 and done < kills:
                under_test.kill_while_starting(chance.uniform(0, 0.06))
                done += 1
            under_test.start()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def check_calibration(under_test: ServerUnderTest, made: Round) -> None:
    """It is as it was when it was finalized, and holds each token once."""
    assert made.finalized is not None
    now = under_test.calibration(made.id)
    for field_name in ("id", "state", "tokens", "held_out_tokens", "sums_sha256", "streams"):
        assert getattr(now.info, field_name) == getattr(made.finalized, field_name), made.name
    fit, held_out = made.truth()
    assert (now.tokens, now.held_out_tokens) == (fit.tokens, held_out.tokens), made.name
    Sums.exported(now).assert_equals(fit, made.name)
    if made.fraction:
        Sums.exported(now, held_out=True).assert_equals(held_out, made.name)


def check_job(under_test: ServerUnderTest, job: StoredJob) -> certiq.Job:
    """The only excuse for a failure is that four crashes met it running."""
    now = under_test.job(job.id)
    assert job.last is not None
    assert now.info.state == job.last.state
    if now.state == "failed":
        assert now.info.starts == 4, now.info
        assert "went down" in now.error.message
    elif now.state == "succeeded":
        assert digest(read_result(under_test.calls, now)) == job.digest
    else:
        assert now.state == "cancelled", now
    return now


def check_again(under_test: ServerUnderTest, made: Round, job: StoredJob) -> None:
    """The same work without a crash gives the same bytes."""
    again = job.submit(under_test.client, "-again").wait()
    assert again.state == "succeeded", again.error
    assert digest(read_result(under_test.calls, again)) == job.digest, made.name
    again.delete()


def files(data: Path, folder: str) -> int:
    return len(list((data / folder).iterdir()))


def test_nothing_is_lost_or_counted_twice(tmp_path: Path) -> None:
    under_test = ServerUnderTest(tmp_path, FLAGS)
    clients = [Clients(under_test, SEED + number) for number in range(3)]
    try:
        kill_often(under_test, clients, KILLS, SEED)
        rounds = [made for one in clients for made in one.rounds]
        jobs = [job for made in rounds for job in made.jobs if not job.deleted]
        client = under_test.client
        # Nothing but what was answered, and all of it.
        found = {calibration.id for calibration in client.calibrations(page_size=7)}
        assert found == {made.id for made in rounds}
        assert {job.id for job in client.jobs(page_size=7)} == {job.id for job in jobs}
        assert len({job.id for job in jobs}) == len(jobs)
        ended = [check_job(under_test, job) for job in jobs]
        for made in rounds:
            check_calibration(under_test, made)
            for job in made.jobs:
                if job.digest:
                    check_again(under_test, made, job)
        states = [job.state for job in ended]
        failed = states.count("failed")
        given_up = sum(one.given_up for one in clients)
        print(
            f"{KILLS} kills, {len(rounds)} calibrations, {given_up} streams broken off, "
            f"{len(jobs)} jobs, {sum(job.info.starts > 1 for job in ended)} of them started "
            f"again, {failed} of them given up"
        )
        # Hardly any has such luck: else it would be the kills that are tested, not the jobs.
        assert failed <= max(1, KILLS // 20)

        under_test.kill()
        under_test.start()
        assert files(under_test.data, "incoming") == 0
        assert files(under_test.data, "tensors") == len(rounds) + states.count("succeeded")
        client = under_test.client
        for job in client.jobs():
            job.delete()
        for calibration in client.calibrations():
            calibration.delete()
        assert files(under_test.data, "tensors") == 0
        assert list(client.calibrations()) == list(client.jobs()) == []
    finally:
        assert under_test.server.stop() == 0, under_test.server.log()
