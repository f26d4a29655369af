"""The ways to send one request: a Quantize call, a job, and the Python package."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import certiq
import grpc
import numpy as np
from certiq.errors import from_rpc_error
from google.protobuf.duration_pb2 import Duration
from programs import PATIENCE_SECONDS, Server, wait_until
from raw import Calls, Pipe, announce, bearer
from stubs import job_pb2, service_pb2, spec_pb2, tensor_pb2
from sums import made_up
from work import client_of

ROWS, FEATURES, TOKENS = 8, 32, 64
# How long an answer to a header may take that needs nothing but the header.
HEADER_SECONDS = 15.0

# These are their names in tables and in test ids.
QUANTIZE = "Quantize"
QUANTIZE_X = "Quantize with X"
CREATE_JOB = "CreateJob"
PYTHON = "certiq quantize"
PYTHON_X = "certiq quantize with X"
SUBMIT = "certiq submit"

ON_THE_WIRE = (QUANTIZE, CREATE_JOB)
CALIBRATED = (QUANTIZE, CREATE_JOB, PYTHON, SUBMIT)
WITH_X = (QUANTIZE_X, PYTHON_X)
JOBS = (CREATE_JOB, SUBMIT)
EVERY = (*CALIBRATED, *WITH_X)
# The package cannot say everything: an array of numpy has a shape, for example.
RAW = (QUANTIZE, QUANTIZE_X, CREATE_JOB)


@dataclass(frozen=True)
class Answer:
    code: str
    message: str = ""
    # Each is (field, description), and (type, subject, description) below.
    violations: tuple[tuple[str, str], ...] = ()
    preconditions: tuple[tuple[str, str, str], ...] = ()
    retry: bool = False
    # SHA-256 of a result's tensors in the order of their names.
    result: str = ""

    @property
    def fields(self) -> list[str]:
        return [name for name, _ in self.violations]

    @property
    def subjects(self) -> list[tuple[str, str]]:
        return [(kind, subject) for kind, subject, _ in self.preconditions]

    @property
    def without_text(self) -> tuple[object, ...]:
        return self.code, self.fields, self.subjects, self.retry


def answered(call: Callable[[], object]) -> Answer:
    """How a call ended; a text that it returns is the digest of a result."""
    try:
        found = call()
        return Answer("OK", result=found if isinstance(found, str) else "")
    except grpc.RpcError as error:
        return refused(from_rpc_error(error))
    except certiq.Error as error:
        return refused(error)


def refused(error: certiq.Error) -> Answer:
    return Answer(
        error.code.name,
        error.message,
        tuple((v.field, v.description) for v in error.violations),
        tuple((v.type, v.subject, v.description) for v in error.preconditions),
        error.retry_delay is not None,
    )


ITEM_BYTES = {
    tensor_pb2.DATA_TYPE_F64: 8,
    tensor_pb2.DATA_TYPE_F32: 4,
    tensor_pb2.DATA_TYPE_F16: 2,
    tensor_pb2.DATA_TYPE_BF16: 2,
    tensor_pb2.DATA_TYPE_I64: 8,
    tensor_pb2.DATA_TYPE_I32: 4,
    tensor_pb2.DATA_TYPE_U8: 1,
}


def digest_of(parts: dict[str, bytes]) -> str:
    return hashlib.sha256(b"".join(parts[name] for name in sorted(parts))).hexdigest()


def digest_of_frames(call: Iterable[service_pb2.QuantizeResponse]) -> str:
    header, data = service_pb2.ResultHeader(), b""
    for frame in call:
        kind = frame.WhichOneof("payload")
        if kind == "result":
            header = frame.result
        elif kind == "chunk":
            data += frame.chunk.data
    parts = {}
    at = 0
    for tensor in header.tensors:
        end = at + ITEM_BYTES[tensor.dtype] * int(np.prod(tensor.shape))
        parts[tensor.name] = data[at:end]
        at = end
    assert at == len(data)
    return digest_of(parts)


def digest_of_layer(layer: certiq.Layer) -> str:
    return digest_of({name: tensor.tobytes() for name, tensor in layer.tensors.items()})


def duration(seconds: float | None) -> Duration | None:
    if seconds is None:
        return None
    found = Duration()
    found.FromNanoseconds(int(seconds * 1e9))
    return found


def weights(rows: int = ROWS, features: int = FEATURES) -> np.ndarray:
    place = np.arange(rows * features).reshape(rows, features)
    return ((place * 7919 % 257 - 128) / 64).astype("<f4")


def activations(tokens: int = TOKENS, features: int = FEATURES) -> np.ndarray:
    return made_up(np.random.default_rng(5), "", tokens, features).x


@dataclass
class Request:
    """The content of a call, whichever way it goes; some fields are of some ways only."""

    calibration_id: str
    spec: spec_pb2.QuantizationSpec = field(
        default_factory=lambda: spec_pb2.QuantizationSpec(bits=4)
    )
    request_id: str = ""
    layer_name: str = "layer"
    weight: tensor_pb2.TensorHeader = field(
        default_factory=lambda: announce("weight", (ROWS, FEATURES))
    )
    W: np.ndarray = field(default_factory=weights)
    # Only Quantize has these.
    x: tensor_pb2.TensorHeader = field(default_factory=lambda: announce("x", (TOKENS, FEATURES)))
    X: np.ndarray = field(default_factory=activations)
    held_out_fraction: float | None = None
    sequence_rows: int = 0
    # Only jobs have these.
    priority: int = 0
    deadline: float | None = None
    ttl: float | None = None

    def resize(self, rows: int, features: int) -> None:
        self.weight.shape[:] = [rows, features]
        self.W = weights(rows, features)
        self.x.shape[1] = features
        self.X = activations(TOKENS, features)

    def header(self, way: str) -> object:
        """The first message of a call on the wire."""
        fields = {
            "request_id": self.request_id,
            "layer_name": self.layer_name,
            "spec": self.spec,
            "weight": self.weight,
        }
        if way == CREATE_JOB:
            header = job_pb2.CreateJobHeader(
                **fields,
                calibration_id=self.calibration_id,
                priority=self.priority,
                deadline=duration(self.deadline),
                ttl=duration(self.ttl),
            )
            return job_pb2.CreateJobRequest(header=header)
        if way == QUANTIZE:
            fields["calibration_id"] = self.calibration_id
        else:
            fields |= {
                "x": self.x,
                "held_out_fraction": self.held_out_fraction,
                "sequence_rows": self.sequence_rows,
            }
        return service_pb2.QuantizeRequest(header=service_pb2.QuantizeHeader(**fields))

    def weight_chunk(self, way: str, row: int, data: bytes) -> object:
        kind = job_pb2.CreateJobRequest if way == CREATE_JOB else service_pb2.QuantizeRequest
        return kind(weight=tensor_pb2.TensorChunk(row_offset=row, data=data))

    def tensors(self, way: str) -> Iterator[object]:
        yield self.weight_chunk(way, 0, self.W.tobytes())
        if way == QUANTIZE_X:
            yield service_pb2.QuantizeRequest(
                activation=tensor_pb2.ActivationChunk(row_offset=0, x=self.X.tobytes())
            )

    def send(self, way: str, client: certiq.Client) -> certiq.Layer:
        """By the package."""
        common = {"spec": self.spec, "name": self.layer_name}
        if way == SUBMIT:
            job = client.submit(
                self.W,
                **common,
                calibration=self.calibration_id,
                request_id=self.request_id or None,
                priority=self.priority,
                deadline=self.deadline,
                ttl=self.ttl,
            )
            return job.result()
        common["request_id"] = self.request_id
        if way == PYTHON:
            return client.quantize(self.W, **common, calibration=self.calibration_id)
        return client.quantize(
            self.W,
            self.X,
            **common,
            held_out_fraction=self.held_out_fraction,
            sequence_rows=self.sequence_rows,
        )


class Caller:
    """Sends requests to one server as one tenant, in every way."""

    def __init__(self, server: Server, token: str = "") -> None:
        self.client = client_of(server, token or None)
        self.calls = Calls(server)
        self._server = server
        self._token = token

    def begin(
        self, way: str, messages: Iterable[object], limit: float = PATIENCE_SECONDS
    ) -> tuple[Pipe, grpc.Call]:
        """A call on the wire that is not half-closed."""
        pipe = Pipe()
        for message in messages:
            pipe.send(message)
        options = {"timeout": limit, "metadata": bearer(self._token)}
        if way == CREATE_JOB:
            return pipe, self.calls.jobs.CreateJob.future(iter(pipe), **options)
        return pipe, self.calls.quantization.Quantize(iter(pipe), **options)

    def finish(self, way: str, call: grpc.Call) -> Answer:
        """Waits for the end of a call, and of the job that it made."""
        if way != CREATE_JOB:
            return answered(lambda: digest_of_frames(call))

        def result() -> str:
            job = self.client.get_job(call.result().id).wait()
            assert job.state == "succeeded", job.info
            return digest_of_layer(job.result())

        return answered(result)

    def at_header(self, way: str, request: Request) -> Answer:
        """The answer to a header alone, with the stream left open: DEADLINE_EXCEEDED where the
        server waits for tensors."""
        if way not in RAW:
            return self.whole(way, request)
        pipe, call = self.begin(way, [request.header(way)], HEADER_SECONDS)
        try:
            return self.finish(way, call)
        finally:
            call.cancel()
            pipe.close()

    def messages(self, way: str, messages: Iterable[object]) -> Answer:
        """The answer to these messages and a half-close."""
        pipe, call = self.begin(way, messages)
        pipe.close()
        return self.finish(way, call)

    def whole(self, way: str, request: Request) -> Answer:
        if way in RAW:
            return self.messages(way, [request.header(way), *request.tensors(way)])
        # A connection of its own, as that of somebody who comes now.
        with client_of(self._server, self._token or None) as client:
            return answered(lambda: digest_of_layer(request.send(way, client)))


def begun(caller: Caller, way: str, request: Request) -> tuple[Pipe, grpc.Call]:
    """A call whose header was taken."""
    pipe, call = caller.begin(way, [request.header(way)])
    if way == QUANTIZE:
        assert next(call).WhichOneof("payload") == "progress"
    else:
        wait_until(
            lambda: caller.client.get_calibration(request.calibration_id).info.jobs == 1,
            "the header is taken",
        )
    return pipe, call


def check_same(answers: dict[str, Answer], *, text: bool = True) -> Answer:
    """The one answer, where it is one."""
    first = next(iter(answers.values()))
    same = (
        answer == first if text else answer.without_text == first.without_text
        for answer in answers.values()
    )
    assert all(same), "\n" + "\n".join(f"{way}: {answer}" for way, answer in answers.items())
    return first
