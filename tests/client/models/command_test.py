"""What certiq-quantize-model says to what cannot be done."""

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from certiq.model.cli import main
from programs import Server


@pytest.fixture(scope="module")
def source(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ANN401
    return models.save(models.make("llama"), tokenizer, tmp_path_factory.mktemp("source"))


def run(server: Server, source: Path, text: Path, output: Path, *more: str) -> int:
    return main(
        [
            *("--server", server.address, "--model", str(source), "--calibration", str(text)),
            *("--output", str(output), "--sequences", "4", "--sequence-length", "32", "--quiet"),
            *more,
        ]
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--format", "gptq", "--asymmetric"], "asymmetric grids need gptq_v2"),
        (
            [
                *("--group-size", "32", "--group-scales", "dynamic"),
                *("--order", "decreasing_norm", "--format", "compressed-tensors"),
            ],
            "weight_g_idx",
        ),
        (["--ignore", "."], "all are ignored"),
        (["--sequences", "0"], "sequences: expected at least 1, got 0"),
        (["--sequences", "1", "--damping", "held_out"], "0.5 of the sequences (1) is not one"),
        (["--held-out-fraction", "0.125"], "0.125 of the sequences (4) is not one"),
        (["--sequence-length", "100000"], "expected at least 100000 tokens"),
        (["--model", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_mistakes_are_named(
    more: list[str],
    said: str,
    server: Server,
    source: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(server, source, text, tmp_path / "output", *more) == 2
    assert said in capsys.readouterr().err


def test_one_of_few_sequences_is_held_out(
    server: Server, source: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    assert run(server, source, text, output, "--damping", "held_out") == 0
    settings = json.loads((output / "report.json").read_text())["settings"]
    assert settings["held_out_fraction"] == 0.25


def test_the_servers_refusal_is_passed_on(
    server: Server,
    source: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(server, source, text, tmp_path / "output", "--scale-trials", "99") == 1
    said = capsys.readouterr().err
    assert "spec.scale_trials" in said
    assert "model.layers.0.self_attn.q_proj" in said


def test_what_the_format_cannot_hold_is_refused_before_the_work(
    server: Server,
    source: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = server.metrics().sum("certiq_jobs_total")
    output = tmp_path / "output"
    assert run(server, source, text, output, "--group-size", "24") == 2
    said = capsys.readouterr().err
    assert "model.layers.*.mlp.gate_proj [96, 64]: groups of 24 do not divide its 64" in said
    assert "--ignore 'gate_proj$'" in said
    assert "down_proj" not in said
    assert not output.exists()
    assert server.metrics().sum("certiq_jobs_total") == before
    ignored = [flag for name in "qkvo" for flag in ("--ignore", f"{name}_proj$")]
    ignored += ["--ignore", "(gate|up)_proj$"]
    assert run(server, source, text, output, "--group-size", "24", *ignored) == 0


def test_conv1d_in_compressed_tensors_is_refused(
    server: Server,
    tokenizer: Any,  # noqa: ANN401
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = models.save(models.make("gpt2"), tokenizer, tmp_path / "source")
    assert run(server, source, text, tmp_path / "output") == 2
    assert "is a Conv1D" in capsys.readouterr().err


def test_quantized_models_and_missing_tensors_are_refused(
    server: Server,
    source: Path,
    tokenizer: Any,  # noqa: ANN401
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(server, source, text, tmp_path / "once") == 0
    assert run(server, tmp_path / "once", text, tmp_path / "twice") == 2
    assert "is quantized with compressed-tensors in pack-quantized" in capsys.readouterr().err
    model = models.make("llama")
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    folder = tmp_path / "incomplete"
    models.save(model, tokenizer, folder)
    model.save_pretrained(folder, state_dict=state)
    assert run(server, folder, text, tmp_path / "output") == 2
    assert "model.layers.1.mlp.up_proj" in capsys.readouterr().err


def test_encoder_decoders_are_refused(
    server: Server,
    tokenizer: Any,  # noqa: ANN401
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    sizes |= dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 32)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    config = transformers.BartConfig(vocab_size=models.VOCABULARY, **sizes)
    source = models.save(transformers.BartModel(config), tokenizer, tmp_path / "source")
    assert run(server, source, text, tmp_path / "output") == 2
    assert "is an encoder-decoder" in capsys.readouterr().err
