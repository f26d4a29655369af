"""The same in asyncio. What is shared with the blocking client is not asked again."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import certiq
import numpy as np
import pytest
from certiq import aio
from conftest import StartServer
from programs import PATIENCE_SECONDS, Server, wait_until
from relay import Relay
from streams_test import QUICK, rows
from sums import Sums
from work import BIG, weight

Body = Callable[[aio.Client], Awaitable[None]]


def within(address: str, body: Body, retry: certiq.Retry | None = None) -> None:
    async def main() -> None:
        async with aio.Client(address, retry=retry) as client:
            await body(client)

    asyncio.run(main())


def test_a_layer_a_calibration_a_job(server: Server, random: np.random.Generator) -> None:
    X, W = rows(random, 900), weight(16, 64)

    async def body(client: aio.Client) -> None:
        layer = await client.quantize(W, X, certiq.Spec(bits=3), name="a")
        async with client.calibration(64, labels=["aio"]) as calibration:
            async with calibration.stream("rank-0") as stream:
                for at in range(0, 900, 250):
                    await stream.send(X[at : at + 250])
            assert stream.progress.tokens == 900
            await calibration.import_statistics(stream_id="b", gram=np.eye(64), tokens=1)
            found = await calibration.export_statistics()
            gram = Sums.of(X).parts[0] + np.eye(64)
            np.testing.assert_allclose(found.gram, gram, rtol=1e-6)
            await calibration.finalize(expected_tokens=901, expected_streams=["rank-0"])
            assert calibration.finalized
            assert [c.id async for c in client.calibrations(label="aio")] == [calibration.id]
            assert (await client.get_calibration("aio")).id == calibration.id
            job = await client.submit(W, calibration=calibration, spec=certiq.Spec(bits=3))
            states = [seen.state async for seen in job.watch()]
            assert states[-1] == "succeeded"
            assert await job.done()
            again = await (await client.get_job(job.id)).result()
            assert again.relative_error == pytest.approx(layer.relative_error, rel=0.05)
            ids = [j.id async for j in client.jobs(calibration=calibration, page_size=1)]
            assert ids == [job.id]
            await job.delete()
        with pytest.raises(certiq.NotFound):
            await calibration.refresh()
        kept = await client.calibration(64, keep=True)
        await kept.delete()

    within(server.address, body)


def test_many_at_once(server: Server, random: np.random.Generator) -> None:
    X, W = rows(random, 600), weight(16, 64)

    async def body(client: aio.Client) -> None:
        async with client.calibration(64) as calibration:

            async def send(rank: int) -> None:
                async with calibration.stream(f"rank-{rank}") as stream:
                    await stream.send(X[rank * 20 : rank * 20 + 20])

            await asyncio.gather(*map(send, range(30)))
            await calibration.finalize(expected_tokens=600)
            jobs = await asyncio.gather(
                *(client.submit(W, calibration=calibration) for _ in range(30))
            )
            layers = await asyncio.gather(*(job.result() for job in jobs))
            assert len({layer.tensors["weight"].tobytes() for layer in layers}) == 1
            # Counted in any order of the streams.
            found = await calibration.export_statistics()
            Sums(found.tokens, (found.gram,)).assert_equals(Sums.of(X))

    within(server.address, body)


def test_connections_that_are_cut(server: Server, random: np.random.Generator) -> None:
    X = rows(random, 3000)
    with Relay(lambda: server.port) as relay:

        async def body(client: aio.Client) -> None:
            async with client.calibration(64) as calibration:
                async with calibration.stream("a", chunk_rows=50) as stream:
                    for cut, at in enumerate(range(0, len(X), 500), start=1):
                        relay.cut_after(60_000 + at)
                        await stream.send(X[at : at + 500])
                        # Rows leave after send has returned.
                        async with asyncio.timeout(PATIENCE_SECONDS):
                            while relay.cuts < cut:
                                await asyncio.sleep(0.01)
                found = await calibration.export_statistics()
                Sums(found.tokens, (found.gram,)).assert_equals(Sums.of(X))

        within(relay.address, body, QUICK)
        assert relay.cuts == len(X) // 500


def test_a_cancelled_task_cancels_its_call(start_server: StartServer) -> None:
    server = start_server()
    random = np.random.default_rng(1)
    X = random.standard_normal((2 * BIG, BIG), dtype="<f4")
    W = random.standard_normal((BIG, BIG), dtype="<f4")

    async def body(client: aio.Client) -> None:
        began = asyncio.Event()
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(
            client.quantize(W, X, progress=lambda _: loop.call_soon_threadsafe(began.set) and None)
        )
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # And the client goes on.
        assert (await client.quantize(weight(), weight(100))).shape == (16, 32)

    within(server.address, body)
    wait_until(lambda: "CANCELLED" in server.log(), "the server hears of it")


def test_cancelling_while_a_stream_waits(
    start_server: StartServer, tmp_path: Path, random: np.random.Generator
) -> None:
    """The server commits never, so the window stays full."""
    server = start_server("--data_dir", str(tmp_path / "data"), "--commit_seconds", "3600")
    x = rows(random, 500)

    async def body(client: aio.Client) -> None:
        calibration = await client.calibration(64, keep=True)
        stream = calibration.stream("a", chunk_rows=100, window_bytes=1)
        task = asyncio.create_task(stream.send(x))
        while not (await calibration.refresh()).info.streams:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(certiq.FailedPrecondition):
            await stream.send(x)

    within(server.address, body)


def test_a_server_that_refuses_early_is_heard(server: Server) -> None:
    """While the client is still writing: what the server said arrives, field and all."""
    W = np.ones((1024, 4096), "<f4")

    async def body(client: aio.Client) -> None:
        for _ in range(30):
            with pytest.raises(certiq.InvalidArgument) as caught:
                await client.quantize(W, W, certiq.Spec(bits=99))
            assert caught.value.field == "spec.bits"
            with pytest.raises(certiq.NotFound):
                await client.submit(W, calibration="cal-" + "0" * 32)

    within(server.address, body)


def test_errors_within_blocks(server: Server) -> None:
    async def body(client: aio.Client) -> None:
        with pytest.raises(KeyError):
            async with client.calibration(64) as calibration, calibration.stream("a") as stream:
                await stream.send(weight(10, 64))
                raise KeyError
        with pytest.raises(certiq.NotFound):
            await calibration.refresh()
        with pytest.raises(certiq.InvalidArgument):
            await client.quantize(weight(), weight(10, 31))

    within(server.address, body)


def test_a_client_that_was_closed(server: Server) -> None:
    async def main() -> None:
        client = aio.Client(server.address)
        await client.close()
        with pytest.raises(certiq.Cancelled):
            await client.get_job("x")

    asyncio.run(main())


def test_the_blocking_client_within_a_loop(server: Server) -> None:
    """As in a notebook."""

    async def main() -> None:
        with certiq.Client(server.address) as client:
            assert client.quantize(weight(), weight(100)).shape == (16, 32)
            job = next(client.jobs(), None)
            assert job is None or [seen.id for seen in job.watch()]

    asyncio.run(main())
