"""A thousand streams at a time."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from cluster import Client
from conftest import StartServer
from programs import PATIENCE_SECONDS, Server
from raw import OPTIONS, unpack
from stubs import calibration_pb2_grpc
from sums import Source, Sums, made_up

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


class Crowd:
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
        stubs = [calibration_pb2_grpc.CalibrationServiceStub(channel) for channel in channels]
        self._calls = [
            stubs[number % CHANNELS].Accumulate(timeout=PATIENCE_SECONDS)
            for number in range(len(self._sources))
        ]
        await asyncio.gather(*map(self._open, self._calls, self._sources))

    async def _open(self, call: grpc.aio.StreamStreamCall, source: Source) -> None:
        await call.write(source.header(self._calibration))
        answer = await call.read()
        assert answer.progress.received == 0
        assert answer.progress.live

    async def send(self) -> None:
        await asyncio.gather(*map(self._send, self._calls, self._sources))

    @staticmethod
    async def _send(call: grpc.aio.StreamStreamCall, source: Source) -> None:
        for sequence in range(source.chunks):
            await call.write(source.chunk(sequence))
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
    client = Client.of(server)
    # So that what the first call alone costs is no part of the growth.
    client.accumulate(client.create(N).id, sources[0])
    calibration = client.create(N).id
    before = server.memory_bytes()

    async def all_of_them() -> int:
        crowd = Crowd(server, calibration, sources)
        await crowd.open()
        idle = server.memory_bytes()
        now = await asyncio.to_thread(client.get, calibration)
        assert sum(stream.live for stream in now.streams) == STREAMS
        await crowd.send()
        return idle

    idle = asyncio.run(all_of_them())
    print(
        f"{STREAMS} idle streams: {(idle - before) >> 20} MiB; "
        f"at the end {(server.memory_bytes() - before) >> 20} MiB"
    )
    assert idle - before < 200 << 20
    assert server.memory_bytes() < BUDGET
    X = np.concatenate([source.x for source in sources])
    client.export(calibration).assert_equals(Sums.of(X))
    done = client.finalize(calibration, len(X), [source.stream_id for source in sources])
    assert len(done.streams) == STREAMS
    assert not any(stream.live for stream in done.streams)


def test_streams_beyond_the_budget_are_told(start_server: StartServer) -> None:
    """What does not fit is refused, and the rest is none the worse for it."""
    client = Client.of(start_server("--memory_budget_bytes", str(2 << 20)))
    random = np.random.default_rng(1)
    sources = [made_up(random, f"rank-{rank}", 32, N) for rank in range(64)]
    calibration = client.create(N).id
    live = []
    refused = None
    for source in sources:
        call = client.open(calibration, source)
        try:
            call.next()
        except grpc.RpcError as error:
            refused = unpack(error)
            break
        live.append(call)
    assert 4 <= len(live) < len(sources)
    assert refused is not None
    assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.retry is not None
    for call, source in zip(live, sources, strict=False):
        call.send(source.chunk(0))
        call.finish()
    for source in sources[len(live) :]:
        client.accumulate(calibration, source)
    client.export(calibration).assert_equals(Sums.of(np.concatenate([s.x for s in sources])))
