"""A thousand streams at a time."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import certiq
import grpc
import numpy as np
import pytest
from conftest import StartServer
from programs import PATIENCE_SECONDS, Server
from raw import OPTIONS, chunk_of, header
from stubs import CALIBRATIONS, stub
from sums import Source, Sums, made_up
from work import client_of, create, fill, stream_of

STREAMS = 1000
CHANNELS = 10
N = 64
BUDGET = 512 << 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    flags = [
        *("--data_dir", str(tmp_path / "data"), "--commit_seconds", "1"),
        *("--memory_budget_bytes", str(BUDGET), "--workers", "2"),
    ]
    started = Server(tmp_path, flags)
    yield started
    assert started.stop() == 0, started.log()


class OpenStreams:
    """All streams of a calibration, open at once."""

    def __init__(self, server: Server, calibration: str, sources: list[Source]) -> None:
        self._server = server
        self._calibration = calibration
        self._sources = sources
        self._calls: list[grpc.aio.StreamStreamCall] = []

    async def open(self) -> None:
        channels = [
            grpc.aio.insecure_channel(self._server.address, OPTIONS) for _ in range(CHANNELS)
        ]
        stubs = [stub(channel, CALIBRATIONS) for channel in channels]
        self._calls = [
            stubs[number % CHANNELS].Accumulate(timeout=PATIENCE_SECONDS)
            for number in range(len(self._sources))
        ]
        await asyncio.gather(*map(self._open, self._calls, self._sources))

    async def _open(self, call: grpc.aio.StreamStreamCall, source: Source) -> None:
        await call.write(header(self._calibration, source))
        answer = await call.read()
        assert answer.progress.received == 0
        assert answer.progress.live

    async def send(self) -> None:
        await asyncio.gather(*map(self._send, self._calls, self._sources))

    @staticmethod
    async def _send(call: grpc.aio.StreamStreamCall, source: Source) -> None:
        for sequence in range(source.chunks):
            await call.write(chunk_of(source, sequence))
        await call.done_writing()
        last = None
        while (answer := await call.read()) is not grpc.aio.EOF:
            last = answer.progress
        assert await call.code() == grpc.StatusCode.OK
        assert last is not None
        assert last.received == last.durable == source.chunks
        assert last.tokens == len(source.x)


def test_a_thousand_streams(server: Server) -> None:
    random = np.random.default_rng(1)
    sources = [
        made_up(random, f"rank-{rank}", 20 + rank % 13, N, chunk_rows=7) for rank in range(STREAMS)
    ]
    client = client_of(server)
    # So that what the first call alone costs is no part of the growth.
    fill(create(client, N), sources[0])
    calibration = create(client, N)
    before = server.memory_bytes()

    async def all_of_them() -> int:
        streams = OpenStreams(server, calibration.id, sources)
        await streams.open()
        idle = server.memory_bytes()
        now = await asyncio.to_thread(calibration.refresh)
        assert sum(stream.live for stream in now.info.streams) == STREAMS
        await streams.send()
        return idle

    idle = asyncio.run(all_of_them())
    print(
        f"{STREAMS} idle streams: {(idle - before) >> 20} MiB; "
        f"at the end {(server.memory_bytes() - before) >> 20} MiB"
    )
    assert idle - before < 200 << 20
    assert server.memory_bytes() < BUDGET
    X = np.concatenate([source.x for source in sources])
    Sums.exported(calibration).assert_equals(Sums.of(X))
    names = [source.stream_id for source in sources]
    done = calibration.finalize(expected_tokens=len(X), expected_streams=names).info
    assert len(done.streams) == STREAMS
    assert not any(stream.live for stream in done.streams)


def test_streams_beyond_the_budget_are_told(start_server: StartServer) -> None:
    """What does not fit is refused, and the rest is none the worse for it."""
    client = client_of(start_server("--memory_budget_bytes", str(2 << 20)))
    random = np.random.default_rng(1)
    sources = [made_up(random, f"rank-{rank}", 32, N) for rank in range(64)]
    calibration = create(client, N)
    live = []
    refused = None
    for source in sources:
        try:
            live.append(stream_of(calibration, source))
        except certiq.Error as error:
            refused = error
            break
    assert 4 <= len(live) < len(sources)
    assert refused is not None
    assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.retry_delay is not None
    for stream, source in zip(live, sources, strict=False):
        stream.send(source.x)
        stream.close()
    for source in sources[len(live) :]:
        fill(calibration, source)
    X = np.concatenate([source.x for source in sources])
    Sums.exported(calibration).assert_equals(Sums.of(X))
