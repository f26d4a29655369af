"""Strangers without a token attack the edge while a tenant is at work behind it.

Whatever they do: the tenant's open stream goes on, its calls on the same connection and on new ones
have the right results, during and after, and neither process takes much memory.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import certiq
import grpc
import numpy as np
import pytest
from exposed import (
    MIB,
    TOKEN,
    Keys,
    Memory,
    Site,
    Tenant,
    limit_files,
    may_open,
    open_files,
)
from http2 import (
    BAD_HEADERS,
    END_HEADERS,
    Connection,
    Kind,
    call_headers,
    frame,
    grpc_message,
    length,
    literal,
)
from programs import PATIENCE_SECONDS, wait_until
from proxy import Config
from raw import refusal
from stubs import job_pb2
from work import calibrated, made_up

GET_JOB = "/certiq.v1.JobService/GetJob"
FINALIZE = "/certiq.v1.CalibrationService/FinalizeCalibration"
CREATE = "/certiq.v1.CalibrationService/CreateCalibration"
QUANTIZE = "/certiq.v1.QuantizationService/Quantize"
# One more than gRPC reads.
LARGEST = 16 * MIB


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys.make(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def site(keys: Keys, tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path, keys)
    yield made
    made.close()


class Attackers:
    """Threads that attack until told to stop; their errors are the test's."""

    def __init__(self, number: int, attack: Callable[[Callable[[], bool]], object]) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(number)
        self._running = [self._pool.submit(attack, self._stop.is_set) for _ in range(number)]

    def __enter__(self) -> "Attackers":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for one in self._running:
            one.result()
        self._pool.shutdown()


def survives(
    site: Site,
    connections: int,
    attack: Callable[[Callable[[], bool]], object],
    server_bytes: int = 0,
) -> None:
    """The tenant works during the attack of so many, and after; memory is bounded."""
    tenant = Tenant(site)
    tenant.works()
    memory = Memory(site)
    with Attackers(connections, attack):
        for _ in range(5):
            tenant.works()
    tenant.works()
    memory.assert_bounded(connections, server_bytes)
    tenant.finish()


# Connections.


def test_a_flood_of_connections(site: Site) -> None:
    """More than there are places, each with a call that reaches the server: the server keeps the
    files that it may open, and accepts again when they have gone (CVE-2023-4785)."""
    places = site.edge.limit("max_active_downstream_connections")
    may_open(4 * places)
    limit_files(site.server.process.pid, 1024)
    tenant = Tenant(site)
    memory = Memory(site)
    flood: list[Connection] = []
    refused = 0
    block = call_headers(QUANTIZE)
    in_vain = 0
    # Those that come too fast are let in when they try again; then there are no places left.
    while in_vain < 60:
        try:
            connection = site.stranger()
        except OSError:
            refused, in_vain = refused + 1, in_vain + 1
            time.sleep(0.02)
            continue
        in_vain = 0
        connection.open(1, block, end=True)
        connection.wait(lambda c=connection: 1 in c.ended)
        flood.append(connection)
        if len(flood) % 100 == 0:
            tenant.works(anew=False)
    held = [connection for connection in flood if connection.alive()]
    print("held", len(held), "refused", refused, "files", open_files(site.server.process.pid))
    assert places - 10 <= len(held) <= places
    assert open_files(site.server.process.pid) < 900
    tenant.works(anew=False)
    memory.assert_bounded(len(held))
    for connection in flood:
        connection.close()
    wait_until(
        lambda: site.edge.stats("downstream_cx_active")["http.edge.downstream_cx_active"] < 10,
        "places are free again",
    )
    server = site.server.process.pid
    wait_until(lambda: open_files(server) < 100, "the server's connections went with their clients")
    tenant.works()
    tenant.finish()


def few_places(config: Config) -> None:
    """An eighth of them."""
    _, connections = config["overload_manager"]["resource_monitors"]
    connections["typed_config"]["max_active_downstream_connections"] = 64
    (listener,) = config["static_resources"]["listeners"]
    (rate,) = listener["listener_filters"]
    rate["typed_config"]["token_bucket"] |= {"max_tokens": 32, "tokens_per_fill": 4}


def test_connections_that_come_and_go(keys: Keys, tmp_path: Path) -> None:
    """Each with a call, and gone: what is left of them at the server is bounded too."""
    site = Site(tmp_path, keys, change=few_places)
    block = call_headers(QUANTIZE)
    seen: list[int] = []
    refused: list[OSError] = []

    def attack(stopped: Callable[[], bool]) -> None:
        while not stopped():
            try:
                with site.stranger() as connection:
                    connection.open(1, block, end=True)
                    connection.wait(lambda c=connection: 1 in c.ended)
                seen.append(open_files(server))
            except OSError as error:
                refused.append(error)
                time.sleep(0.001)

    try:
        server = site.server.process.pid
        limit_files(server, 128)
        tenant = Tenant(site)
        with Attackers(4, attack):
            wait_until(lambda: len(seen) > 400, "many have come and gone")
            # Who is not connected has to wait.
            tenant.works(anew=False)
        print("files at most", max(seen), "refused", len(refused))
        assert max(seen) < 120
        assert refused
        tenant.works()
        tenant.finish()
        wait_until(lambda: open_files(server) < 30, "those that are left go by themselves")
    finally:
        site.close()


def test_connections_that_say_nothing(site: Site) -> None:
    """Some before the handshake, some after it, some after half a header."""
    tenant = Tenant(site)
    memory = Memory(site)
    may_open(2048)
    mute = [socket.create_connection(("127.0.0.1", site.edge.port)) for _ in range(50)]
    idle = [site.stranger() for _ in range(100)]
    halves = [site.stranger() for _ in range(30)]
    for connection in halves:
        # Settings come first: nothing else may follow half a header.
        assert connection.alive()
        connection.send(frame(Kind.HEADERS, 0, 1, call_headers(GET_JOB)[:20]))
    tenant.works()
    memory.assert_bounded(len(mute) + len(idle) + len(halves))
    # Handshakes and headers that do not end give their places back; who is let in may wait.
    assert all(one.wait(lambda o=one: 1 in o.ended or o.closed) for one in halves[:5])
    for plain in mute[:5]:
        # Less than a connection may be without a call.
        plain.settimeout(60)
        assert plain.recv(100) == b""
    assert all(one.alive() for one in idle[:5])
    tenant.works()
    for connection in (*mute, *idle, *halves):
        connection.close()
    tenant.finish()


# Messages.


@pytest.mark.parametrize(
    ("path", "unit"),
    # Empty stream ids, empty labels, unknown groups: much memory once they are parsed.
    [(FINALIZE, b"\x1a\x00"), (CREATE, b"\x32\x00"), (GET_JOB, b"\xa3\x06\xa4\x06")],
    ids=["finalize", "create", "unknown_groups"],
)
def test_requests_that_grow_when_they_are_parsed(site: Site, path: str, unit: bytes) -> None:
    bomb = unit * ((LARGEST - 1000) // len(unit))

    def attack(stopped: Callable[[], bool]) -> None:
        while not stopped():
            with site.channel() as channel:
                failed = refusal(lambda: channel.unary_unary(path)(bomb, timeout=PATIENCE_SECONDS))
                assert failed.code == grpc.StatusCode.RESOURCE_EXHAUSTED

    survives(site, 8, attack)


def test_messages_that_never_end(site: Site) -> None:
    """Of 16 MiB less a little, on many streams of many connections, windows kept."""
    body = grpc_message(b"z" * (LARGEST - 100_000), announced=LARGEST - 1000)

    def attack(stopped: Callable[[], bool]) -> None:
        with site.stranger() as connection:
            for number in range(20):
                stream = 2 * number + 1
                path = (GET_JOB, QUANTIZE, "/grpc.health.v1.Health/Check")[number % 3]
                if stopped() or not connection.open(stream, call_headers(path)):
                    break
                connection.send_data(stream, body, patience=2.0)
            while not stopped():
                connection.wait(stopped, 0.2)

    survives(site, 8, attack)


def small_heap(config: Config) -> None:
    heap, _ = config["overload_manager"]["resource_monitors"]
    heap["typed_config"]["max_heap_size_bytes"] = 128 * MIB


def test_memory_of_the_edge_has_an_end(keys: Keys, tmp_path: Path) -> None:
    """The most that strangers can make it keep: requests of almost 1 MiB that never end, on as many
    streams as there may be. The largest go, and the tenant's stream is none of them."""
    site = Site(tmp_path, keys, change=small_heap)
    body = grpc_message(b"z" * (MIB - 100_000), announced=MIB - 50_000)

    def value(name: str) -> int:
        (found,) = site.edge.stats(name).values()
        return found

    def attack(stopped: Callable[[], bool]) -> None:
        while not stopped():
            with site.stranger() as connection:
                for number in range(100):
                    stream = 2 * number + 1
                    if stopped() or not connection.open(stream, call_headers(FINALIZE)):
                        break
                    connection.send_data(stream, body, patience=1.0)

    try:
        tenant = Tenant(site)
        with Attackers(4, attack):
            wait_until(lambda: value("reset_high_memory_stream.count") > 50, "streams are ended")
            for _ in range(10):
                tenant.send()
            peak = site.edge.memory_bytes("VmHWM")
        print("peak MiB", peak // MIB)
        # The program takes some 70 MiB, and strangers on the same machine are fast.
        assert peak < 320 * MIB
        wait_until(lambda: value("stop_accepting_requests.active") == 0, "new calls are taken")
        tenant.works()
        tenant.finish()
    finally:
        site.close()


@pytest.mark.parametrize("acknowledges", [True, False])
def test_more_streams_than_there_may_be(site: Site, acknowledges: bool) -> None:
    """The limit counts from the first frame on, whether or not its settings were acknowledged."""
    most = site.edge.limit("max_concurrent_streams")
    tenant = Tenant(site)
    memory = Memory(site)
    with site.stranger(acknowledges=acknowledges) as connection:
        if acknowledges:
            assert connection.alive()
        for number in range(2 * most):
            if not connection.open(2 * number + 1, call_headers(GET_JOB)):
                break
        connection.wait(lambda: len(connection.ended) >= most, 2.0)
        active = site.edge.stats("http.edge.downstream_rq_active")["http.edge.downstream_rq_active"]
        # The tenant's own is one of them.
        assert active <= most + 1
        tenant.works()
        memory.assert_bounded(1)
    tenant.works()
    tenant.finish()


# Headers.


@pytest.mark.parametrize("ended_first", [True, False], ids=["one_value", "many_values"])
def test_headers_that_never_end(site: Site, ended_first: bool) -> None:
    """A value that announces 2 GiB, or ever more values; CONTINUATIONs follow (CVE-2023-33953)."""
    sent: list[int] = []

    def attack(stopped: Callable[[], bool]) -> None:
        while not stopped():
            with site.stranger() as connection:
                begin = call_headers(GET_JOB)
                if ended_first:
                    begin += b"\x00\x01x" + length(1 << 31)
                filler = b"a" * 16_000 if ended_first else literal(b"x", b"a" * 16_000)
                total = 0
                going = connection.send(frame(Kind.HEADERS, 0, 1, begin))
                while going and not stopped() and total < 64 * MIB:
                    going = connection.send(frame(Kind.CONTINUATION, 0, 1, filler) * 4)
                    total += 4 * len(filler)
                sent.append(total)

    survives(site, 4, attack)
    # What is in the buffers of two sockets when the edge hangs up is sent, too.
    print("MiB sent at most before the end", max(sent) / MIB)
    assert max(sent) < 32 * MIB


def test_bad_headers_end_nobody_elses_stream(site: Site) -> None:
    """What ends a whole connection of gRPC 1.51 (CVE-2023-32732) is a stranger's own."""
    tenant = Tenant(site)
    for name, fields in BAD_HEADERS.items():
        for te in (b"trailers", b"x"):
            with site.stranger() as connection:
                connection.open(1, call_headers(GET_JOB, *fields, te=te), end=True)
                assert connection.wait(lambda c=connection: 1 in c.ended or c.closed), name
        tenant.send()
    tenant.works()
    tenant.finish()


# Frames.


def reset(number: int) -> bytes:
    stream = 2 * number + 1
    cancel = (8).to_bytes(4, "big")
    block = call_headers(QUANTIZE)
    return frame(Kind.HEADERS, END_HEADERS, stream, block) + frame(
        Kind.RST_STREAM, 0, stream, cancel
    )


# What is repeated, and the counter of the edge that says why it hung up.
FLOODS: dict[str, tuple[Callable[[int], bytes], str]] = {
    "reset": (reset, "http.edge.downstream_rq_too_many_premature_resets"),
    "ping": (lambda _: frame(Kind.PING, 0, 0, b"12345678"), "http2.outbound_control_flood"),
    "settings": (
        lambda _: frame(Kind.SETTINGS, 0, 0, b"\0\4\0\1\0\0"),
        # Of its control frames, or of all.
        "http2.outbound",
    ),
    "window_update": (
        lambda _: frame(Kind.WINDOW_UPDATE, 0, 0, b"\0\0\0\1"),
        "http2.inbound_window_update_frames_flood",
    ),
    "empty_data": (
        lambda number: (
            frame(Kind.DATA, 0, 1, b"")
            if number
            else frame(Kind.HEADERS, END_HEADERS, 1, call_headers(GET_JOB))
        ),
        "http2.inbound_empty_frames_flood",
    ),
    "priority": (
        lambda number: frame(Kind.PRIORITY, 0, 2 * number + 1, b"\0\0\0\0\1"),
        "http2.inbound_priority_frames_flood",
    ),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_floods_of_frames(site: Site, kind: str) -> None:
    """Frames that make work for others, whose answers nobody reads: the edge hangs up (rapid reset,
    CVE-2023-44487; CVE-2019-9512, CVE-2019-9513, CVE-2019-9515, CVE-2019-9518)."""
    make, counter = FLOODS[kind]
    connections = [0]

    def attack(stopped: Callable[[], bool]) -> None:
        while not stopped():
            with site.stranger(reads=kind == "reset", patience=10.0) as connection:
                connections[0] += 1
                for batch in range(4000):
                    frames = b"".join(make(50 * batch + number) for number in range(50))
                    if stopped() or not connection.send(frames):
                        break

    survives(site, 2, attack)
    assert sum(site.edge.stats(counter).values()) > 0
    # Calls of a connection before it is given up: most of those that it may begin and take back.
    (calls,) = site.edge.stats("http.edge.downstream_rq_total").values()
    print(kind, "connections", connections[0], "calls at the edge", calls)
    assert calls <= 500 * (connections[0] + 1)


# Those who do not read.


def test_readers_that_do_not_read(site: Site) -> None:
    """With a token, even: results wait where they are, as windows say."""
    client = site.client()
    random = np.random.default_rng(2)
    calibration = calibrated(client, made_up(random, "rank-0", 1024, 1024))
    weight = random.standard_normal((1024, 1024)).astype("<f4")
    job = client.submit(weight, calibration=calibration, spec=certiq.Spec(bits=4))
    job.result()
    request = job_pb2.ReadResultRequest(job_id=job.id).SerializeToString()
    token = (b"authorization", f"Bearer {TOKEN}".encode())
    block = call_headers("/certiq.v1.JobService/ReadResult", token)

    def attack(stopped: Callable[[], bool]) -> None:
        with site.stranger(credit=False) as connection:
            for number in range(20):
                stream = 2 * number + 1
                connection.open(stream, block)
                connection.send_data(stream, grpc_message(request), end=True)
            while not stopped():
                connection.wait(stopped, 0.2)
            assert connection.data_bytes > 0

    # The server has a frame of 1 MiB ready for each.
    survives(site, 8, attack, server_bytes=8 * 20 * MIB)
