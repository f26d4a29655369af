"""Headers and frames at random, from a seed, against the edge: nobody dies, or even notices."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from exposed import Keys, Memory, Site, Tenant
from http2 import (
    BAD_HEADERS,
    END_HEADERS,
    END_STREAM,
    Connection,
    Field,
    Kind,
    call_headers,
    frame,
    headers_frames,
    length,
    literal,
)
from stubs import calibration_pb2, job_pb2, service_pb2

# At most; a slow machine gets through fewer.
CASES = 1500
SECONDS = 20.0
FEWEST = 150

PATHS = [
    *(
        f"/{service.full_name}/{method.name}"
        for file in (service_pb2, calibration_pb2, job_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ),
    *("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", "/", "*", "", "/certiq.v1./"),
    *("/certiq.v1.JobService/../JobService/GetJob", "/certiq.v1.JobService%2fGetJob", "//x", "/?"),
]
NAMES = [
    *(b":method", b":scheme", b":path", b":authority", b":status", b":protocol", b":"),
    *(b"te", b"content-type", b"content-length", b"transfer-encoding", b"host", b"connection"),
    *(b"authorization", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding", b"user-agent"),
    *(
        b"grpc-tags-bin",
        b"grpc-trace-bin",
        b"x-bin",
        b"x-envoy-retry-on",
        b"x-forwarded-client-cert",
    ),
    *(b"x-forwarded-for", b"grpc-previous-rpc-attempts", b"cookie", b"expect", b"upgrade", b"via"),
]


class Generator:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def _bytes(self, most: int) -> bytes:
        return self._random.randbytes(self._random.choice((0, 1, 2, 7, most // 4, most)))

    def field(self) -> Field:
        pick = self._random.random()
        if pick < 0.2:
            return self._random.choice(self._random.choice(list(BAD_HEADERS.values())))
        name = self._random.choice(NAMES) if pick < 0.8 else self._bytes(40)
        value = self._random.choice(
            (
                self._bytes(300),
                b"application/grpc",
                b"trailers",
                str(self._random.getrandbits(70) - 5).encode(),
                b"99999999H",
                b"chunked",
                b"A" * self._random.randrange(9000),
            )
        )
        return name, value

    def block(self) -> bytes:
        """A call with fields too many; or fields in any order; or bytes that are no HPACK."""
        fields = [self.field() for _ in range(self._random.randrange(12))]
        pick = self._random.random()
        if pick < 0.5:
            coded = call_headers(self._random.choice(PATHS), *fields)
        elif pick < 0.75:
            coded = b"".join(literal(*one) for one in fields)
        else:
            coded = b"".join(self._coded() for _ in range(self._random.randrange(20)))
        if self._random.random() < 0.2:
            # Cut, or with a bit that fell over.
            at = self._random.randrange(len(coded) + 1)
            coded = coded[:at] + self._bytes(8) + coded[at + self._random.randrange(2) :]
        return coded

    def _coded(self) -> bytes:
        """From the table, into it, its size, Huffman's code, lengths beyond anything."""
        return self._random.choice(
            (
                bytes([0x80 | self._random.randrange(128)]),
                bytes([0x40 | self._random.randrange(64)]) + length(3) + self._bytes(3),
                bytes([0x20 | self._random.randrange(32)]),
                b"\x00\x81" + self._bytes(1) + b"\x83" + self._bytes(4),
                b"\x10" + length(self._random.getrandbits(self._random.randrange(1, 40))),
                literal(*self.field()),
            )
        )

    def frames(self, stream: int) -> bytes:
        """The block in its frames, with flags, padding and company as it comes."""
        block = self.block()
        pick = self._random.random()
        if pick < 0.7:
            sent = headers_frames(stream, block, self._random.choice((0, END_STREAM)))
        else:
            flags = self._random.getrandbits(8)
            sent = frame(Kind.HEADERS, flags, stream, block[:16_000])
            if not flags & END_HEADERS and self._random.random() < 0.5:
                sent += frame(Kind.CONTINUATION, END_HEADERS, stream, block[16_000:32_000])
        if self._random.random() < 0.3:
            kind = self._random.randrange(12)
            where = self._random.choice((0, stream, stream + 1, max(stream - 2, 0), 1 << 31))
            sent += frame(kind, self._random.getrandbits(8), where, self._bytes(64))
        return sent


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path, Keys.make(tmp_path))
    yield made
    made.close()


@pytest.mark.parametrize("seed", [1, 2])
def test_random_headers_disturb_nobody(site: Site, seed: int) -> None:
    tenant = Tenant(site)
    memory = Memory(site)
    generator = Generator(seed)
    end = time.monotonic() + SECONDS
    cases = connections = 0
    stranger: Connection | None = None
    stream = 1
    while cases < CASES and (time.monotonic() < end or cases < FEWEST):
        # One that was told goodbye is not listened to any more.
        if stranger is None or stranger.closed or stranger.kinds[Kind.GOAWAY] or stream > 200:
            if stranger is not None:
                stranger.close()
            stranger, stream = site.stranger(patience=5.0), 1
            connections += 1
        stranger.send(generator.frames(stream))
        stranger.wait(lambda c=stranger, s=stream: s in c.ended, 0.01)
        cases, stream = cases + 1, stream + 2
        if cases % 50 == 0:
            tenant.send()
            assert site.edge.process.poll() is None
            assert site.server.process.poll() is None
    assert stranger is not None
    stranger.close()
    (calls,) = site.edge.stats("http.edge.downstream_rq_total").values()
    print("cases", cases, "connections", connections, "calls", calls)
    # Some ended their connection, some were calls.
    assert connections > cases // 50
    assert calls > cases // 10
    tenant.works()
    memory.assert_bounded(1)
    tenant.finish()
