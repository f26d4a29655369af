"""Flags, folders and models that somebody may well give: done, or refused in a sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import driving
import models
import pytest
import torch
import transformers
import unpack
import unusual
from driving import Driver, edit, rewrite
from programs import Server
from safetensors.torch import save_file

UNPACKED = transformers.CompressedTensorsConfig(dequantize=True)
Save = Callable[..., Path]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--layers", 0), ("layers", "at least 1", "0")),
        (("--layers", -1), ("layers", "at least 1", "-1")),
        (("--bits", 0), ("bits", "0")),
        (("--bits", 1), ("bits", "1")),
        (("--bits", 9), ("bits", "9")),
        (("--group-size", -1), ("group_size", "-1")),
        (("--ignore", "("), ("(",)),
        (("--held-out-fraction", 2), ("held_out_fraction", "2")),
        (("--held-out-fraction", -1), ("held_out_fraction", "-1")),
        (("--held-out-fraction", "nan"), ("held_out_fraction", "nan")),
        (("--damping", "much"), ("damping", "much")),
        (("--seed", -1), ("seed", "-1")),
        (("--seed", 2**64), ("seed",)),
        (("--scale-passes", -1), ("scale_passes",)),
        (("--polish", -1), ("polish",)),
        (("--min-share", "nan"), ("min_share",)),
        (("--evaluation-window", 1), ("evaluation_window", "2")),
        (("--evaluation-tokens", 0), ("evaluation_tokens", "0")),
        (("--sequence-length", 0), ("sequence_length",)),
        (("--device", "abacus"), ("device", "abacus")),
        (("--device", "cuda:99"), ("device", "cuda:99")),
        (("--device", "meta"), ("device", "meta")),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_flags_that_cannot_be(
    flags: tuple[object, ...], words: tuple[str, ...], llama: Path, drive: Driver, server: Server
) -> None:
    before = server.metrics().sum("certiq_jobs_total")
    run = drive.evaluated(llama, *flags)
    run.refused(*words)
    assert server.metrics().sum("certiq_jobs_total") == before


def test_a_server_that_is_not_there(llama: Path, drive: Driver) -> None:
    run = drive(llama, "--server", "127.0.0.1:1").refused("127.0.0.1:1")
    assert run.status == 1


def test_folders_by_other_names(
    copied: Path, drive: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "Modell 100% größer, v1.0"
    copied.rename(odd)
    monkeypatch.chdir(odd)
    run = drive(Path(), output=Path("../out put.é")).succeeded()
    assert run.report()["settings"]["model"] == odd.name
    assert odd.name in (run.output / "report.html").read_text()
    assert drive(Path(), output=Path("out")).status == 2
    assert not Path("out").exists()


def test_files_that_the_command_makes_itself(copied: Path, drive: Driver) -> None:
    """Those of the model give way, and the report says so."""
    for name in ("recipe.yaml", "report.json", "report.html", "quantize_config.json"):
        (copied / name).write_text("the model's")
    run = drive(copied).succeeded()
    assert "the model's" not in (run.output / "recipe.yaml").read_text()
    assert set(run.report()["files"]["not_copied"]) == {
        "recipe.yaml",
        "report.json",
        "report.html",
        "quantize_config.json",
    }
    assert not (run.output / "quantize_config.json").exists()


def test_a_head_of_its_own_where_the_configuration_ties_it(save: Save, drive: Driver) -> None:
    """As transformers reads it, whichever way that is."""
    source = save(unusual.llama(tie_word_embeddings=True))
    head = torch.randn(160, 64, generator=torch.Generator().manual_seed(4)) * 0.2
    rewrite(source, lambda tensors: tensors.update({"lm_head.weight": head}))
    run = drive.evaluated(source, "--format", "dense-f32").succeeded()
    assert run.tensors()["lm_head.weight"].equal(head)
    for folder, name in ((source, "float"), (run.output, "quantized")):
        own = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert run.report()["perplexity"][name] == pytest.approx(
            driving.perplexity(own, run.text), rel=1e-4
        )


@pytest.mark.parametrize("format", ["compressed-tensors", "dense-f32"])
def test_names_without_the_models_prefix(format: str, copied: Path, drive: Driver) -> None:
    """A base model's weights in the checkpoint of one with a head."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [own for own in tensors if own.startswith("model.")]:
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(copied, change)
    run = drive.evaluated(copied, "--format", format).succeeded()
    names = run.tensors().keys()
    assert "layers.0.input_layernorm.weight" in names
    assert not any(name.startswith("model.") for name in names)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        run.output,
        output_loading_info=True,
        **({"quantization_config": UNPACKED} if format != "dense-f32" else {}),
    )
    assert not info["missing_keys"]
    assert run.report()["perplexity"]["quantized"] == pytest.approx(
        driving.perplexity(loaded, run.text), rel=1e-3
    )


def test_a_model_without_a_head(save: Save, drive: Driver, server: Server) -> None:
    """It is quantized; what it predicts cannot be measured, and that is known before the work."""
    source = save(unusual.llama().model)
    assert json.loads((source / "config.json").read_text())["architectures"] == ["LlamaModel"]
    before = server.metrics().sum("certiq_jobs_total")
    drive.evaluated(source).refused("logits", "--evaluation")
    assert server.metrics().sum("certiq_jobs_total") == before
    run = drive(source).succeeded()
    transformers.AutoModel.from_pretrained(run.output, quantization_config=UNPACKED)


def test_one_layer(save: Save, drive: Driver) -> None:
    run = drive.evaluated(save(unusual.llama(num_hidden_layers=1))).succeeded()
    assert len(run.report()["linears"]) == 7


def test_biases_are_kept(save: Save, drive: Driver) -> None:
    source = save(unusual.enlarged(models.make("qwen2")))
    run = drive.evaluated(source, "--format", "gptq").succeeded()
    before, after = unpack.tensors_of(source), run.tensors()
    biases = [name for name in before if name.endswith("proj.bias")]
    assert len(biases) == 6
    assert all(after[name].equal(before[name]) for name in biases)


def test_types_that_only_files_have(copied: Path, drive: Driver) -> None:
    extra = {
        "some.large": torch.tensor([2**15, 2**16 - 1], dtype=torch.uint16),
        "some.larger": torch.tensor([2**63], dtype=torch.uint64),
        "some.complex": torch.tensor([1 + 2j], dtype=torch.complex64),
        "größe ": torch.ones(3),
    }
    rewrite(copied, lambda tensors: tensors.update(extra))
    after = drive(copied, "--dtype", "bfloat16").succeeded().tensors()
    for name, tensor in extra.items():
        if name == "größe ":
            tensor = tensor.bfloat16()
        assert after[name].dtype == tensor.dtype, name
        assert driving.bytes_of(after[name]) == driving.bytes_of(tensor), name


def test_a_null_configuration_of_quantization(copied: Path, drive: Driver) -> None:
    edit(copied / "config.json", quantization_config=None)
    assert drive(copied).succeeded().config()["quantization_config"] is not None
    dense = drive(copied, "--format", "dense-f32").succeeded().config()
    assert dense.get("quantization_config") is None


def test_its_own_output_is_a_source_again(llama: Path, drive: Driver) -> None:
    """A float checkpoint that the command wrote, at fewer bits."""
    first = drive(llama, "--bits", 8, "--format", "dense-f32").succeeded()
    second = drive.evaluated(first.output, "--bits", 3).succeeded()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(second.output)
    assert second.report()["perplexity"]["quantized"] == pytest.approx(
        driving.perplexity(loaded, second.text), rel=1e-3
    )


def test_a_missing_shard_of_pytorch(copied: Path, drive: Driver) -> None:
    tensors = unpack.tensors_of(copied)
    (copied / "model.safetensors").unlink()
    weight_map = dict.fromkeys(tensors, "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {}, "weight_map": weight_map}
    (copied / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    drive(copied).refused("pytorch_model-00001-of-00001.bin")


def test_whole_files_of_other_names_are_not_guessed(copied: Path, drive: Driver) -> None:
    (copied / "model.safetensors").rename(copied / "model.fp16.safetensors")
    drive(copied).refused("expected model.safetensors", "model.fp16.safetensors")
    save_file({"a": torch.ones(1)}, copied / "model.safetensors")
    drive(copied).refused("has no tensor for")


@pytest.mark.parametrize("said", [None, "float32", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("flags", [(), ("--dtype", "float16")], ids=["kept", "float16"])
def test_a_configuration_that_says_another_type(
    said: str | None, flags: tuple[str, ...], save: Save, drive: Driver
) -> None:
    """Of tensors in bfloat16; one in float32 among them is what it is for a reason."""
    source = save(unusual.llama(), dtype="bfloat16")
    rewrite(source, lambda tensors: tensors.update({"some.gain": torch.full((64,), 1.5)}))
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype")
    (source / "config.json").write_text(json.dumps(config | ({"dtype": said} if said else {})))
    run = drive.evaluated(source, *flags).succeeded()
    after = run.tensors()
    wanted = torch.float16 if flags else torch.bfloat16
    assert after["model.norm.weight"].dtype == wanted
    assert after["some.gain"].dtype == torch.float32
    assert run.config().get("dtype") == ("float16" if flags else said)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(run.output)
    assert loaded.dtype == (torch.float16 if flags else getattr(torch, said or "bfloat16"))
    scales = after["model.layers.0.mlp.up_proj.weight_scale"]
    assert scales.dtype == loaded.dtype
    assert run.report()["perplexity"]["quantized"] == pytest.approx(
        driving.perplexity(loaded, run.text), rel=2e-2
    )


def test_what_is_predicted_from_both_sides_is_not_measured(save: Save, drive: Driver) -> None:
    """An encoder sees the token that it would be asked for."""
    source = save(transformers.BertForMaskedLM(models.make("bert").config))
    drive.evaluated(source).refused("BertForMaskedLM", "--evaluation")
    drive(source).succeeded()
