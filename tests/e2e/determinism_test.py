"""Same inputs, bit-identical results: again, with more workers, beside other jobs."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Quantizer, Settings, StartServer
from programs import Server
from verification import Layer, Run

SETTINGS = [Settings(4, True, 64), Settings(2, False, 0)]
# What tells one run from another without being a result.
OF_THE_RUN = ("phase_seconds",)


def content(run: Run) -> tuple[bytes, dict]:
    certificate = json.loads(run.report.read_text())
    for name in OF_THE_RUN:
        del certificate[name]
    return run.output.read_bytes(), certificate


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_runs_repeat_themselves(
    server: Server, quantizer: Quantizer, carried_layer: Layer, settings: Settings
) -> None:
    first = content(quantizer.run(server, carried_layer, settings))
    assert content(quantizer.run(server, carried_layer, settings)) == first


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_number_of_workers_does_not_show(
    start_server: StartServer, quantizer: Quantizer, carried_layer: Layer, settings: Settings
) -> None:
    results = [
        content(quantizer.run(start_server("--workers", workers), carried_layer, settings))
        for workers in ("1", "2", "5")
    ]
    assert results[1] == results[0]
    assert results[2] == results[0]


def test_jobs_side_by_side_do_not_show(
    server: Server, quantizer: Quantizer, carried_layer: Layer
) -> None:
    alone = content(quantizer.run(server, carried_layer, SETTINGS[0]))
    with ThreadPoolExecutor(4) as pool:
        # Each its own files: a quantizer numbers them, so calls are prepared one by one.
        quantizers = [Quantizer(quantizer.folder / f"side_{i}") for i in range(4)]
        for each in quantizers:
            each.folder.mkdir()
        together = pool.map(
            lambda q: content(q.run(server, carried_layer, SETTINGS[0])), quantizers
        )
        assert all(result == alone for result in together)
