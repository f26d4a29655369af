"""Heads and embeddings that a recipe asks for: packed, untied, loaded."""

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
import unpack
from certiq.model.cli import main
from programs import Server

RECIPE = """
version: 1
rules:
  - match: '{match}'
    bits: {bits}
"""


@pytest.mark.parametrize("method", ["optq", "qronos"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("match", ["lm_head", "embed_tokens", "lm_head|embed_tokens"])
def test_heads_and_embeddings(
    match: str,
    tied: bool,
    method: str,
    server: Server,
    text: Path,
    tokenizer: Any,  # noqa: ANN401
    tmp_path: Path,
) -> None:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**models.HEADS, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config).eval()
    source = models.save(model, tokenizer, tmp_path / "source")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(match=match, bits=8))
    output = tmp_path / "output"
    status = main(
        [
            *("--model", str(source), "--calibration", str(text), "--output", str(output)),
            *("--server", server.address, "--sequences", "8", "--sequence-length", "64"),
            *("--recipe", str(recipe), "--method", method, "--quiet", "--evaluation", str(text)),
            *("--evaluation-tokens", "512", "--evaluation-window", "64"),
        ]
    )
    assert status == 0
    report = json.loads((output / "report.json").read_text())
    tensors = unpack.tensors_of(output)
    names = {linear["name"] for linear in report["linears"]}
    chosen = {
        "lm_head": ["lm_head"],
        "embed_tokens": ["model.embed_tokens"],
    }
    own = [name for part in match.split("|") for name in chosen[part]]
    assert names >= set(own)
    assert len(names) == 14 + len(own)
    for name in own:
        assert f"{name}.weight" not in tensors
        assert f"{name}.weight_packed" in tensors
    written = json.loads((output / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    # The model that the report speaks of, put together from the packed tensors.
    expected = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**models.HEADS, tie_word_embeddings=False)
    ).eval()
    state = dict(model.state_dict())
    for name in names:
        bits = 8 if name in own else 4
        state[f"{name}.weight"] = torch.from_numpy(unpack.compressed(tensors, name, bits))
    expected.load_state_dict(state)
    ids = [int(word[1:]) for word in text.read_text().split()[:512]]
    windows = torch.tensor(ids).reshape(-1, 64)
    for measured, value in ((expected, "quantized"), (model, "float")):
        with torch.no_grad():
            loss = measured(input_ids=windows, labels=windows).loss
        assert report["perplexity"][value] == pytest.approx(float(loss.exp()), rel=1e-4)
    if match == "lm_head":
        loaded = transformers.AutoModelForCausalLM.from_pretrained(output)
        with torch.no_grad():
            difference = loaded(input_ids=windows).logits - expected(input_ids=windows).logits
        assert float(difference.abs().max()) < 1e-4


def test_gptq_has_no_layout_for_an_embedding(
    server: Server,
    text: Path,
    tokenizer: Any,  # noqa: ANN401
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = models.save(models.make("llama"), tokenizer, tmp_path / "source")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(match="embed_tokens", bits=8))
    status = main(
        [
            *("--model", str(source), "--calibration", str(text), "--server", server.address),
            *("--output", str(tmp_path / "output"), "--recipe", str(recipe), "--format", "gptq"),
        ]
    )
    assert status == 2
    assert "model.embed_tokens is an embedding" in capsys.readouterr().err
