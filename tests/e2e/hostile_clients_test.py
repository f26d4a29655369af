"""Clients that mean harm, at the server's own port: what others feel of them, and what they cost.

The same through the edge, and what only the edge stops, is in tests/deploy.
"""

import resource
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import certiq
import grpc
import numpy as np
import pytest
from certiq._proto import calibration_service_pb2 as calibration_pb2
from certiq._proto import job_service_pb2 as job_pb2
from certiq._proto import quantization_service_pb2 as service_pb2
from conftest import StartServer
from http2 import Connection, call_headers, grpc_message
from programs import BINARIES, Server, http_get, wait_until
from raw import Calls, Layer, bearer, job_frames, refusal
from sums import made_up
from work import calibrated, client_of, create, small

ALICE, BOB, READER = "alice-token-0123456789", "bob-token-0123456789", "reader-token-0123456789"
MIB = 1 << 20
# What a server may take beyond its budget, and what a connection may.
BESIDE_THE_BUDGET, A_CONNECTION = 64 * MIB, MIB

FINALIZE = "/certiq.v1.CalibrationService/FinalizeCalibration"
GET_JOB = "/certiq.v1.JobService/GetJob"
QUANTIZE = "/certiq.v1.QuantizationService/Quantize"
READ_RESULT = "/certiq.v1.JobService/ReadResult"


def token_file(folder: Path, *lines: str) -> Path:
    path = folder / "tokens"
    path.touch(mode=0o600)
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return token_file(
        tmp_path,
        f"{ALICE} alice read,write",
        f"{BOB} bob read,write",
        f"{READER} alice read",
    )


def works(server: Server, token: str | None = BOB) -> None:
    """A layer of somebody who means no harm."""
    random = np.random.default_rng(5)
    X = random.standard_normal((64, 32), dtype=np.float32)
    W = random.standard_normal((8, 32), dtype=np.float32)
    layer = client_of(server, token).quantize(W, X, certiq.Spec(bits=4))
    assert 0 < layer.relative_error < 1


@contextmanager
def grows_at_most(server: Server, bytes_more: int) -> Iterator[None]:
    before = server.memory_bytes()
    yield
    assert server.memory_bytes() - before <= bytes_more


def raw_call(server: Server, path: str, message: bytes, token: str | None = None) -> certiq.Error:
    """What a call of one message, made of any bytes, is refused with."""
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.address, options) as channel:
        call = channel.unary_unary(path, lambda data: data, lambda data: data)
        return refusal(lambda: call(message, timeout=60, metadata=bearer(token) if token else None))


def authorization(token: str) -> tuple[bytes, bytes]:
    return b"authorization", b"Bearer " + token.encode()


# Many fields of no bytes: small on the wire, large once parsed.
BOMBS = {
    "texts": b"\x1a\x00" * (8 * MIB - 100),
    "unknown groups": b"\xa3\x06\xa4\x06" * (4 * MIB - 100),
    "unknown numbers": b"\xa0\x06\x01" * (5 * MIB),
    "one long text": b"\x0a" + b"\xf0\xff\xff\x07" + b"\x01" * (16 * MIB - 16),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_a_stranger_sends_is_not_read(
    start_server: StartServer, tokens: Path, bomb: str
) -> None:
    server = start_server("--token_file", str(tokens))
    works(server)
    with grows_at_most(server, 8 * A_CONNECTION):
        for _ in range(8):
            failed = raw_call(server, FINALIZE, BOMBS[bomb])
            assert failed.code == grpc.StatusCode.UNAUTHENTICATED, failed
    works(server)


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_request_has_a_size(start_server: StartServer, tokens: Path, bomb: str) -> None:
    server = start_server("--token_file", str(tokens))
    works(server)
    before = server.log_file.stat().st_size
    with grows_at_most(server, BESIDE_THE_BUDGET):
        for path in (FINALIZE, GET_JOB, READ_RESULT):
            failed = raw_call(server, path, BOMBS[bomb], ALICE)
            assert isinstance(failed, certiq.InvalidArgument), failed
            assert "expected at most" in failed.message
    assert server.log_file.stat().st_size - before < 16_384
    works(server)


@pytest.mark.parametrize("text", ["\x01" * 60_000, "x" * 2_000, "job-1\nfake=line", "\x1b[2J", "é"])
@pytest.mark.parametrize("form", ["text", "json"])
def test_names_do_not_fill_the_log(start_server: StartServer, form: str, text: str) -> None:
    server = start_server("--log_format", form)
    calls = Calls(server)
    before = len(server.log().splitlines())
    failed = refusal(lambda: calls.jobs.GetJob(job_pb2.GetJobRequest(job_id=text), timeout=60))
    assert isinstance(failed, (certiq.NotFound, certiq.InvalidArgument)), failed
    wait_until(lambda: len(server.log().splitlines()) > before, "the call is in the log")
    lines = server.log().splitlines()[before:]
    assert len(lines) == 1
    assert len(lines[0]) < 8_192
    assert lines[0].isprintable()


def test_descriptors_that_run_out(start_server: StartServer, tokens: Path) -> None:
    server = start_server("--token_file", str(tokens))
    works(server)
    pid = server.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    open_now = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_now + 20, limits[1]))
    idle = [socket.create_connection(("127.0.0.1", server.port), 60) for _ in range(100)]
    # The server takes all of them, and keeps those for which there is room.
    wait_until(lambda: "file descriptors have run out" in server.log(), "it says so")
    for connection in idle:
        connection.close()
    works(server)
    assert http_get(server.metrics_port, "/healthz").status == 200


def test_connections_have_a_limit(start_server: StartServer, tokens: Path) -> None:
    server = start_server("--token_file", str(tokens), "--max_connections", "16")
    held = [Connection(server.port) for _ in range(8)]
    assert all(connection.alive() for connection in held)
    for _ in range(4):
        with Connection(server.port) as more:
            assert more.wait_closed()
    assert all(connection.alive() for connection in held)
    for connection in held:
        connection.close()
    wait_until(lambda: Connection(server.port).alive(), "there is room again")
    works(server)


def test_unfinished_messages_of_strangers(start_server: StartServer, tokens: Path) -> None:
    server = start_server("--token_file", str(tokens), "--memory_budget_bytes", str(1 << 30))
    works(server)
    message = grpc_message(b"z" * MIB, announced=16 * MIB - 100)
    with grows_at_most(server, 8 * A_CONNECTION):
        connections = [Connection(server.port) for _ in range(8)]
        for connection in connections:
            for stream in range(1, 41, 2):
                connection.open(stream, call_headers(GET_JOB))
                connection.send_data(stream, message, patience=0.2)
            assert connection.wait(lambda held=connection: len(held.ended) == 20)
    works(server)
    for connection in connections:
        connection.close()


def test_answers_that_nobody_reads(start_server: StartServer, tokens: Path) -> None:
    budget = 256 * MIB
    server = start_server("--token_file", str(tokens), "--memory_budget_bytes", str(budget))
    alice = client_of(server, ALICE)
    job = alice.submit(**small(alice, features=512, rows=1024)).wait()
    request = job_pb2.ReadResultRequest(job_id=job.id).SerializeToString()
    headers = call_headers(READ_RESULT, authorization(READER))
    with grows_at_most(server, budget + BESIDE_THE_BUDGET):
        connections = []
        for _ in range(4):
            connection = Connection(server.port, credit=False)
            connections.append(connection)
            for stream in range(1, 401, 2):
                connection.open(stream, headers)
                connection.send_data(stream, grpc_message(request), end=True)
        # Some are refused, and say so.
        assert connections[-1].wait(lambda: len(connections[-1].ended) > 0)
        # Neither the others nor the tenant itself are locked out.
        works(server)
        assert alice.get_job(job.id).state == "succeeded"
    for connection in connections:
        connection.close()
    wait_until(lambda: server.metrics().sum("certiq_memory_reserved_bytes") < 16 * MIB, "released")


def test_half_open_uploads_leave_places_for_others(start_server: StartServer, tokens: Path) -> None:
    server = start_server("--token_file", str(tokens), "--queue_limit", "16")
    header = Layer.made_up(1, 1, 1).header_frame().SerializeToString()
    with Connection(server.port) as mallory:
        for stream in range(1, 101, 2):
            mallory.open(stream, call_headers(QUANTIZE, authorization(ALICE)))
            mallory.send_data(stream, grpc_message(header))
        # Three quarters of the queue are hers; the others of her calls are refused.
        assert mallory.wait(lambda: len(mallory.ended) == 50 - 12)
        works(server)
    wait_until(lambda: server.metrics().sum("certiq_memory_reserved_bytes") == 0, "released")


def test_a_job_that_waits_for_its_own_tenant(start_server: StartServer, tmp_path: Path) -> None:
    limit = 32 * MIB
    tokens = token_file(
        tmp_path, f"{ALICE} alice read,write memory_bytes={limit}", f"{BOB} bob read,write"
    )
    server = start_server(
        *("--token_file", str(tokens), "--data_dir", str(tmp_path / "data"), "--workers", "1")
    )
    alice, bob = client_of(server, ALICE), client_of(server, BOB)
    request = small(alice, features=512)
    theirs = small(bob)
    held = []
    with pytest.raises(certiq.ResourceExhausted):
        while True:
            held.append(create(alice, 256))
    waiting = alice.submit(**request | {"priority": 100})
    for _ in range(3):
        assert bob.submit(**theirs).wait().state == "succeeded"
        works(server)
    assert waiting.refresh().state == "queued"
    for calibration in held:
        calibration.delete()
    assert waiting.wait().state == "succeeded"


def test_finalized_calibrations_are_charged(start_server: StartServer, tmp_path: Path) -> None:
    disk = 200_000
    tokens = token_file(tmp_path, f"{ALICE} alice read,write disk_bytes={disk}")
    data = tmp_path / "data"
    server = start_server("--token_file", str(tokens), "--data_dir", str(data))
    alice = client_of(server, ALICE)
    labels = [f"{number:02}" + "l" * 200 for number in range(16)]
    random = np.random.default_rng(1)
    made = 0
    with pytest.raises(certiq.ResourceExhausted):
        while made < 200:
            calibrated(alice, made_up(random, "r", 16, 1), labels=labels)
            made += 1
    assert 3 <= made < 100
    blobs = sum(path.stat().st_blocks * 512 for path in (data / "tensors").iterdir())
    assert blobs <= disk


@pytest.mark.parametrize("way", ["Quantize", "CreateJob"])
@pytest.mark.parametrize("field", [100, 536_870_911])
def test_fields_of_a_newer_contract(server: Server, way: str, field: int) -> None:
    """What is asked for is done or refused."""
    calls = Calls(server)
    layer = Layer.made_up(4, 32, 64)
    header: service_pb2.QuantizeRequest | job_pb2.CreateJobRequest
    calibration = None
    if way == "Quantize":
        header = layer.header_frame()
    else:
        calibration = calibrated(client_of(server), made_up(np.random.default_rng(1), "r", 64, 32))
        asked = job_pb2.CreateJobHeader(calibration_id=calibration.id)
        header = next(job_frames(asked, np.zeros((4, 32), "<f4")))
    tag = field << 3
    coded = bytearray()
    while tag >= 128:
        coded.append(tag % 128 | 128)
        tag //= 128
    header.header.spec.MergeFromString(bytes([*coded, tag, 1]))
    call: Callable[..., object] = (
        (lambda: list(calls.quantization.Quantize(iter([header]), timeout=60)))
        if way == "Quantize"
        else (lambda: calls.jobs.CreateJob(iter([header]), timeout=60))
    )
    failed = refusal(call)
    assert isinstance(failed, certiq.InvalidArgument), failed
    assert f"spec.{field}" in failed.message
    if calibration is not None:
        calibration.delete()


def test_revoked_tokens_end_open_streams(start_server: StartServer, tokens: Path) -> None:
    server = start_server("--token_file", str(tokens))
    alice = client_of(server, ALICE)
    calibration = create(alice, 8)
    calls = Calls(server)
    opened = threading.Event()

    def frames() -> Iterator[calibration_pb2.AccumulateRequest]:
        yield calibration_pb2.AccumulateRequest(
            header=calibration_pb2.AccumulateHeader(
                calibration_id=calibration.id, stream_id="r", x=2
            )
        )
        opened.set()
        time.sleep(60)

    answer = calls.calibrations.Accumulate(frames(), timeout=60, metadata=bearer(ALICE))
    assert opened.wait(60)
    tokens.write_text(f"{BOB} bob read,write\n")
    failed = refusal(lambda: list(answer))
    assert failed.code == grpc.StatusCode.UNAUTHENTICATED, failed
    works(server)


def test_slow_clients_of_the_metrics_port(start_server: StartServer) -> None:
    """Health is answered while others dawdle over a request or do not read an answer."""
    server = start_server()
    slow = []
    for number in range(60):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.metrics_port))
        head = b"GET /metrics HTTP/1.1\r\nHost: x\r\n"
        connection.sendall(head + (b"\r\n" if number % 2 else b"X"))
        slow.append(connection)
    for _ in range(5):
        assert http_get(server.metrics_port, "/healthz").status == 200
        for connection in slow[::2]:
            connection.sendall(b"X")
    # Not for ever, however busy they are.
    ended = set()

    def all_ended() -> bool:
        for connection in slow[::2]:
            try:
                connection.sendall(b"X")
            except OSError:
                ended.add(connection)
        return len(ended) == len(slow[::2])

    wait_until(all_ended, "slow connections are cut")
    for connection in slow:
        connection.close()


@pytest.mark.parametrize("program", ["certiq-server", "certiq"])
def test_programs_load_nothing_of_the_current_folder(program: str) -> None:
    found = subprocess.run(
        ["readelf", "--dynamic", str(BINARIES / program)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = [
        element
        for line in found.splitlines()
        if "RUNPATH" in line or "RPATH" in line
        for element in line[line.index("[") + 1 : line.rindex("]")].split(":")
    ]
    assert all(path.startswith(("$ORIGIN/", "/")) for path in paths), paths
