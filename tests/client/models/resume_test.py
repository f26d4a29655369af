"""A run that was interrupted: nothing is done twice, and the result is the same."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import models
import pytest
import unpack
from certiq.model.cli import main
from programs import Server

LINEARS = 28
# At most so many were on their way when it was killed: q, k and v.
IN_FLIGHT = 3


def flags(server: Server, source: Path, text: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--server", server.address, "--model", str(source), "--calibration", str(text)),
        *("--sequences", "16", "--sequence-length", "64", "--method", "qronos", "--quiet"),
        *("--evaluation", str(text), "--evaluation-tokens", "512"),
        *("--evaluation-window", "128", "--output", str(output), *more),
    ]


@pytest.fixture
def source(tokenizer: Any, tmp_path: Path) -> Path:  # noqa: ANN401
    import torch
    import transformers

    torch.manual_seed(4)
    config = transformers.LlamaConfig(**{**models.HEADS, "num_hidden_layers": 4})
    return models.save(transformers.LlamaForCausalLM(config), tokenizer, tmp_path / "source")


def jobs_of(server: Server) -> float:
    return server.metrics().sum("certiq_jobs_total")


def test_a_killed_run_goes_on(server: Server, source: Path, text: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    before = jobs_of(server)
    assert main(flags(server, source, text, whole)) == 0
    assert jobs_of(server) - before == LINEARS

    output = tmp_path / "output"
    before = jobs_of(server)
    process = subprocess.Popen(
        [sys.executable, "-m", "certiq.model", *flags(server, source, text, output)],
        stdin=subprocess.DEVNULL,
    )
    linears = output / "unfinished" / "linears"
    try:
        # However long that takes: importing torch alone can be minutes on a busy machine.
        while process.poll() is None and len(list(linears.glob("*.safetensors"))) < 10:
            time.sleep(0.02)
    finally:
        process.kill()
    assert process.wait() != 0
    done = {path: path.stat().st_mtime_ns for path in linears.glob("*.safetensors")}
    assert 10 <= len(done) < LINEARS
    server_done = jobs_of(server) - before
    assert main(flags(server, source, text, output)) == 0
    assert jobs_of(server) - before <= LINEARS + IN_FLIGHT
    assert jobs_of(server) - before - server_done <= LINEARS - len(done)

    first, second = (json.loads((path / "report.json").read_text()) for path in (whole, output))
    assert first["perplexity"] == second["perplexity"]
    ours, theirs = unpack.tensors_of(output), unpack.tensors_of(whole)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].equal(tensor), name


def test_other_settings_do_not_go_on(
    server: Server, source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    linears = output / "unfinished" / "linears"
    linears.mkdir(parents=True)
    (output / "unfinished" / "run.json").write_text(json.dumps({"sequences": 8}))
    done = linears / "model.layers.0.self_attn.q_proj.safetensors"
    done.touch()
    assert main(flags(server, source, text, output)) == 2
    said = capsys.readouterr().err
    assert "sequences: 8 there, 16 now" in said
    assert "--restart" in said
    # Nothing done is nothing to mix with.
    done.unlink()
    assert main(flags(server, source, text, output, "--layers", "1")) == 0
    assert main(flags(server, source, text, output, "--restart", "--layers", "1")) == 0
    assert main(flags(server, source, text, output, "--layers", "1")) == 2
    assert "holds a finished run" in capsys.readouterr().err
