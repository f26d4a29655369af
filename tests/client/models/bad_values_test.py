"""certiq-quantize-model on values that no type holds: refused by name, or zeros."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import unpack
from certiq.model.cli import main
from programs import Server

Change = Callable[[torch.Tensor], object]
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def run(
    server: Server,
    text: Path,
    tokenizer: Any,  # noqa: ANN401
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str, Path]]:
    """The command on a llama of which some parameters were changed: status, stderr, output."""

    def quantize(changes: dict[str, Change], *flags: str) -> tuple[int, str, Path]:
        model = models.make("llama")
        with torch.no_grad():
            for name, change in changes.items():
                change(model.get_parameter(name))
        source = models.save(model, tokenizer, tmp_path / "source")
        output = tmp_path / "output"
        # Saving shows a bar.
        capsys.readouterr()
        status = main(
            [
                *("--model", str(source), "--calibration", str(text), "--output", str(output)),
                *("--server", server.address, "--sequences", "8", "--sequence-length", "64"),
                *("--quiet", *flags),
            ]
        )
        return status, capsys.readouterr().err, output

    return quantize


def put(value: float, *index: int) -> Change:
    return lambda tensor: tensor.__setitem__(index, value)


@pytest.mark.parametrize(
    ("name", "change", "place"),
    [
        (UP, put(float("nan"), 3, 4), f"{UP} is nan at row 3, column 4"),
        (UP, put(float("-inf"), 95, 63), f"{UP} is -inf at row 95, column 63"),
        (NORM, put(float("inf"), 7), f"{NORM} is inf at index [7]"),
        # A token that the text does not have.
        (
            "model.embed_tokens.weight",
            put(float("nan"), models.VOCABULARY - 1, 0),
            f"is nan at row {models.VOCABULARY - 1}, column 0",
        ),
        ("lm_head.weight", put(float("nan"), 5, 6), "is nan at row 5, column 6"),
    ],
)
def test_weights_that_are_not_finite(
    run: Callable[..., tuple[int, str, Path]], name: str, change: Change, place: str
) -> None:
    status, said, output = run({name: change})
    assert status == 2
    assert place in said
    assert f"{name} " in said
    assert said.count("\n") == 1
    assert not list(output.glob("*.safetensors"))
    assert not (output / "report.json").exists()


@pytest.mark.parametrize("flags", [(), ("--method", "qronos"), ("--one-pass",)], ids=" ".join)
def test_activations_that_are_not_finite(
    run: Callable[..., tuple[int, str, Path]], flags: tuple[str, ...]
) -> None:
    # Its product with a hidden state passes float32.
    status, said, output = run({NORM: lambda tensor: tensor.fill_(3e38)}, *flags)
    assert status == 2
    assert "the input of model.layers.1.self_attn.q_proj in the quantized model is " in said
    assert "inf at row 0, column " in said
    assert said.count("\n") == 1
    assert not list(output.glob("*.safetensors"))


def test_what_the_service_refuses_names_the_linear(
    run: Callable[..., tuple[int, str, Path]],
) -> None:
    status, said, _ = run({UP: put(1e6, 3, 4)}, "--format", "gptq", "--layers", "2")
    assert status == 1
    assert "model.layers.1.mlp.up_proj: " in said
    assert "row 3 has a weight of 1e+06 (column 4)" in said


@pytest.mark.parametrize(
    "flags",
    [
        ("--format", "gptq"),
        ("--format", "compressed-tensors", "--dtype", "float16"),
        ("--format", "compressed-tensors", "--dtype", "float16", "--group-size", "32"),
        ("--format", "dense-f16"),
    ],
    ids=" ".join,
)
def test_a_row_too_small_for_its_scales_becomes_zeros(
    run: Callable[..., tuple[int, str, Path]], flags: tuple[str, ...]
) -> None:
    status, said, output = run({UP: lambda tensor: tensor[5].fill_(1e-8)}, *flags)
    assert status == 0, said
    report = json.loads((output / "report.json").read_text())
    assert report["totals"]["underflowed_rows"] == 1
    by_name = {linear["name"]: linear for linear in report["linears"]}
    own = by_name[UP.removesuffix(".weight")]
    assert own["certificate"]["underflow"]["first_rows"] == ["5"]
    assert any("became zeros" in text for text in own["warnings"])
    tensors = unpack.tensors_of(output)
    prefix = UP.removesuffix(".weight")
    if "gptq" in flags:
        weight = unpack.gptq(tensors, prefix, 4, version=1)
    elif "dense-f16" in flags:
        weight = tensors[UP].float().numpy()
    else:
        weight = unpack.compressed(tensors, prefix, 4)
    assert not weight[5].any()
    assert weight[4].any()
    for name, tensor in tensors.items():
        if name.endswith("scale") or name.endswith("scales"):
            assert bool((tensor > 0).all() & torch.isfinite(tensor).all()), name
