"""torch.distributed: several processes fill one calibration, each token counted once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import certiq
import certiq.torch
import models
import numpy as np
import pytest
import rank_worker
import torch
from programs import Server

pytestmark = pytest.mark.slow

RANKS = 3


def run_ranks(server: Server, folder: Path, sums: str, mode: str = "plain") -> list[dict[str, Any]]:
    worker = Path(__file__).with_name("rank_worker.py")
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, str(worker), server.address),
                *(str(rank), str(RANKS), str(folder), sums, mode),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        # A rank that hangs would hang us; on a busy machine importing torch three times is minutes.
        outputs = [process.communicate(timeout=1800)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def all_inputs(linear: str) -> np.ndarray:
    """What the linear reads for the batches of every rank, float64."""
    model = models.make("llama")
    seen: list[torch.Tensor] = []
    model.get_submodule(linear).register_forward_hook(
        lambda module, arguments, output: seen.append(arguments[0].flatten(0, -2))
    )
    with torch.no_grad():
        for rank in range(RANKS):
            for batch in rank_worker.batches(rank):
                model(input_ids=batch)
    return torch.cat(seen).double().numpy()


@pytest.mark.parametrize("sums", ["server", "client"])
def test_every_token_of_every_rank_counts_once(
    sums: str, server: Server, client: certiq.Client, tmp_path: Path
) -> None:
    said = run_ranks(server, tmp_path, sums)
    assert said[0]["groups"] == said[1]["groups"] == said[2]["groups"]
    assert len(said[0]["groups"]) == 4
    tokens = sum(batch.numel() for rank in range(RANKS) for batch in rank_worker.batches(rank))
    for name, group in said[0]["groups"].items():
        assert group["tokens"] == tokens
        calibration = client.get_calibration(group["id"])
        assert calibration.finalized
        assert calibration.labels == [f"{tmp_path.name}.{name}"]
        assert calibration.tokens + calibration.held_out_tokens == tokens
        assert calibration.held_out_tokens > 0
        streams = {stream.stream_id.split("/")[0] for stream in calibration.info.streams}
        assert streams == {f"rank-{rank}" for rank in range(RANKS)}
        X = all_inputs(name)
        H = X.T @ X
        found = sum(calibration.export_statistics(held_out=part).gram for part in (False, True))
        diagonal = np.sqrt(np.diag(H))
        assert np.all(np.abs(found - H) <= 2e-6 * np.outer(diagonal, diagonal))
        calibration.delete()


def test_ranks_that_experts_had_no_tokens_on_agree(
    server: Server, client: certiq.Client, tmp_path: Path
) -> None:
    said = run_ranks(server, tmp_path, "server", "experts")
    assert said[0]["groups"] == said[1]["groups"] == said[2]["groups"]
    experts = [name for name in said[0]["groups"] if ".experts." in name and "gate" in name]
    tokens = sum(batch.numel() for rank in range(RANKS) for batch in rank_worker.batches(rank))
    assert sum(said[0]["groups"][name]["tokens"] for name in experts) == 2 * tokens
    for group in said[0]["groups"].values():
        client.get_calibration(group["id"]).delete()


def test_one_failing_rank_fails_all(server: Server, client: certiq.Client, tmp_path: Path) -> None:
    said = run_ranks(server, tmp_path, "server", "failing")
    assert said[1]["error"] == "ZeroDivisionError: rank 1 has enough"
    for rank in (0, 2):
        assert said[rank]["error"].startswith("RecordingError: rank 1: ZeroDivisionError")
    made = [
        found
        for found in client.calibrations()
        if any(label.startswith(f"{tmp_path.name}.") for label in found.labels)
    ]
    assert made
    assert not any(found.finalized for found in made)
