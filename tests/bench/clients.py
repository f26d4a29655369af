"""The acts of a measurement's clients; whatever they receive is checked for being a success."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import certiq
import numpy as np
from load_generator import Turn
from raw import announce, chunk, collect, read_result
from stubs import (
    calibration_pb2,
    certificate_pb2,
    job_pb2,
    service_pb2,
    spec_pb2,
    tensor_pb2,
)
from sums import DTYPES
from work import create, small

F16 = "<f2"
# What the client library sends at a time.
STREAM_CHUNK_BYTES = 1 << 20
LAYER_CHUNK_BYTES = 2 << 20
# Chunks of a stream that were handed over and not yet answered.
UNANSWERED = 4
LONG_SECONDS = 3600.0


def activations(rows: int, features: int, seed: int = 1) -> np.ndarray:
    """A few directions that all features share, and noise."""
    random = np.random.default_rng(seed)
    rank = max(1, features // 64)
    shared = random.standard_normal((rank, features), np.float32)
    X = random.standard_normal((rows, rank), np.float32) @ shared / np.float32(rank) ** 0.5
    X += 0.1 * random.standard_normal((rows, features), np.float32)
    return X.astype(F16)


def weights(rows: int, features: int) -> np.ndarray:
    random = np.random.default_rng(2)
    return (random.standard_normal((rows, features), np.float32) / features**0.5).astype(F16)


def rows_of(chunk_bytes: int, features: int) -> int:
    return max(1, chunk_bytes // (2 * features))


def check(certificate: certificate_pb2.Certificate, shape: tuple[int, int], tokens: int) -> None:
    assert certificate.outcome == certificate_pb2.OUTCOME_QUANTIZED, certificate
    assert (certificate.rows, certificate.features) == shape, certificate
    assert certificate.tokens == tokens, certificate
    assert 0 < certificate.relative_error < 0.5, certificate
    assert len(certificate.row_bound) == shape[0]


def engine_seconds(certificate: certificate_pb2.Certificate) -> float:
    took = certificate.phase_seconds
    return took.factor + took.round + took.certify + took.reference + took.pack


def shared_calibration(turn: Turn, features: int) -> certiq.Calibration:
    """The same for all clients, who ask for it at the same time: then it takes another try."""
    patient = certiq.Retry(max_attempts=1000, initial_backoff=0.02, max_backoff=0.1)
    with certiq.Client(turn.address, retry=patient) as client:
        return create(client, features, request_id="load")


class StreamRows:
    """Each client fills a stream of one calibration, as ranks do; counts tokens."""

    def __init__(self, features: int, tokens_each: int | None = None) -> None:
        """With `tokens_each` a stream ends there, whatever the time."""
        self._features = features
        self._chunk_rows = rows_of(STREAM_CHUNK_BYTES, features)
        self._chunks = None if tokens_each is None else tokens_each // self._chunk_rows
        rows = activations(8 * self._chunk_rows, features)
        # The sequence number comes after these, in a message of its own: protobuf merges the two.
        self._bodies = [
            chunk(0, rows[at : at + self._chunk_rows].tobytes()).SerializeToString()
            for at in range(0, len(rows), self._chunk_rows)
        ]

    def __call__(self, turn: Turn) -> int:
        calibration = shared_calibration(turn, self._features)
        header = calibration_pb2.AccumulateHeader(
            calibration_id=calibration.id, stream_id=f"rank-{turn.number}", x=DTYPES[F16]
        )
        handed_over: list[float] = []
        places = threading.Semaphore(UNANSWERED)
        begun = threading.Event()

        def requests() -> Iterator[bytes]:
            yield calibration_pb2.AccumulateRequest(header=header).SerializeToString()
            begun.wait()
            for sequence in count():
                places.acquire()
                if sequence == self._chunks or (self._chunks is None and not turn.more(sequence)):
                    return
                handed_over.append(time.perf_counter())
                body = self._bodies[sequence % len(self._bodies)]
                yield body + chunk(sequence, b"").SerializeToString()

        answers = turn.calls.calibrations.Accumulate(requests(), timeout=LONG_SECONDS)
        progress = next(answers).progress
        assert progress.received == 0
        turn.begin()
        begun.set()
        for answer in answers:
            now = time.perf_counter()
            for sequence in range(progress.received, answer.progress.received):
                turn.samples["Accumulate: acknowledgement"].append(now - handed_over[sequence])
                places.release()
            progress = answer.progress
        assert progress.received == progress.durable == len(handed_over)
        assert progress.tokens == self._chunk_rows * len(handed_over)
        return progress.tokens


class Quantize:
    """Whole layers, their activations with them; counts layers."""

    def __init__(self, shape: tuple[int, int], tokens: int) -> None:
        self._shape = shape
        self._tokens = tokens
        features = shape[1]
        header = service_pb2.QuantizeHeader(
            layer_name="layer",
            spec=spec_pb2.QuantizationSpec(bits=4),
            weight=announce("weight", shape, DTYPES[F16]),
            x=announce("x", (tokens, features), DTYPES[F16]),
        )
        requests = [service_pb2.QuantizeRequest(header=header)]
        step = rows_of(LAYER_CHUNK_BYTES, features)
        W, X = weights(*shape), activations(tokens, features)
        for row in range(0, len(W), step):
            data = W[row : row + step].tobytes()
            piece = tensor_pb2.TensorChunk(row_offset=row, data=data)
            requests.append(service_pb2.QuantizeRequest(weight=piece))
        for row in range(0, len(X), step):
            data = X[row : row + step].tobytes()
            piece = tensor_pb2.ActivationChunk(row_offset=row, x=data)
            requests.append(service_pb2.QuantizeRequest(activation=piece))
        self._frames = [request.SerializeToString() for request in requests]

    def __call__(self, turn: Turn) -> int:
        call = turn.calls.quantization.Quantize
        turn.begin()
        done = 0
        while turn.more(done):
            with turn.timed("Quantize: whole call"):
                result = collect(call(iter(self._frames), timeout=LONG_SECONDS))
            check(result.certificate, self._shape, self._tokens)
            assert result.tensors["weight"].shape == self._shape
            took = result.certificate.phase_seconds
            for field_ in took.DESCRIPTOR.fields:
                turn.samples[f"certificate: {field_.name}"].append(getattr(took, field_.name))
            turn.samples["certificate: engine"].append(engine_seconds(result.certificate))
            done += 1
        return done


@dataclass
class Jobs:
    """A job after the other, each submitted, watched, read and deleted; counts layers.

    Each client has a calibration of its own. Jobs of one calibration share its factor where they
    have the same damping; `own_factor` lets each job's differ by a millionth, so that none does.
    """

    shape: tuple[int, int]
    tokens: int
    own_factor: bool
    _W: np.ndarray = field(init=False, repr=False)
    _X: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._W = weights(*self.shape)
        self._X = activations(self.tokens, self.shape[1])

    def __call__(self, turn: Turn) -> int:
        features = self.shape[1]
        calibration = create(turn.client, features)
        chunk_rows = rows_of(STREAM_CHUNK_BYTES, features)
        with calibration.stream("rank-0", chunk_rows=chunk_rows) as stream:
            stream.send(self._X)
        calibration.finalize(expected_tokens=self.tokens)
        turn.begin()
        done = 0
        while turn.more(done):
            share = 0.01 * (1 + 1e-6 * done) if self.own_factor else 0.01
            self._run(turn, calibration, certiq.Spec(bits=4, damping=f"relative_trace:{share!r}"))
            done += 1
        return done

    def _run(self, turn: Turn, calibration: certiq.Calibration, spec: certiq.Spec) -> None:
        with turn.timed("job: created to read"):
            with turn.timed("CreateJob"):
                job = turn.client.submit(self._W, calibration=calibration, spec=spec)
            with turn.timed("GetJob under load"):
                job.refresh()
            with turn.timed("WatchJob: to the end"):
                job.wait()
            assert job.state == "succeeded", job
            with turn.timed("ReadResult"):
                certificate = read_result(turn.calls, job).certificate
        with turn.timed("DeleteJob"):
            job.delete()
        check(certificate, self.shape, self.tokens)
        turn.samples["job: queued to ended"].append(job_seconds(job.info))
        turn.samples["certificate: queue"].append(certificate.phase_seconds.queue)
        turn.samples["certificate: engine"].append(engine_seconds(certificate))


def job_seconds(job: job_pb2.Job) -> float:
    return 1e-9 * (job.end_time.ToNanoseconds() - job.create_time.ToNanoseconds())


def get_job(turn: Turn) -> int:
    """A call after the other; counts calls."""
    job = turn.client.submit(**small(turn.client)).wait()
    assert job.state == "succeeded"
    turn.begin()
    done = 0
    while turn.more(done):
        with turn.timed("GetJob"):
            job.refresh()
        assert job.state == "succeeded"
        done += 1
    return done
