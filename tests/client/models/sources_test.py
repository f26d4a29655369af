"""Sources in other forms than float safetensors: FP8, MXFP4, GGUF, end to end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import driving
import gguf
import numpy as np
import pytest
import torch
import transformers
import unpack
import unusual
from driving import Driver, edit, rewrite
from safetensors.torch import save_file
from text_test import ALPHABET, SPECIAL

E4M3 = torch.float8_e4m3fn
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [32, 32],
    "activation_scheme": "dynamic",
}
UNPACKED = transformers.CompressedTensorsConfig(dequantize=True)

Save = Callable[..., Path]


def codes_of(weight: torch.Tensor, block: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 codes and scales of blocks, the last ones of which may be smaller."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // block), -(-columns // block))
    codes = torch.empty_like(weight, dtype=E4M3)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            part = (
                slice(row * block, (row + 1) * block),
                slice(column * block, (column + 1) * block),
            )
            # No power of two, so that a scale that is forgotten or used twice shows.
            scales[row, column] = weight[part].float().abs().max() / 400
            codes[part] = (weight[part].float() / scales[row, column]).to(E4M3)
    return codes, scales


def value_of(codes: torch.Tensor, scales: torch.Tensor, block: int = 32) -> torch.Tensor:
    rows, columns = codes.shape
    wide = scales.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return codes.float() * wide


def to_fp8(folder: Path, is_coded: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """Codes what is chosen of a saved model; the tensors of the float model that it stands for."""
    floats: dict[str, torch.Tensor] = {}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            floats[name] = tensors[name]
            if is_coded(name):
                codes, scales = codes_of(tensors[name])
                tensors |= {name: codes, f"{name}_scale_inv": scales}
                floats[name] = value_of(codes, scales)

    rewrite(folder, change)
    assert any(is_coded(name) for name in floats)
    return floats


def is_projection(name: str) -> bool:
    return ".layers." in name and name.endswith("proj.weight")


def assert_as_from_floats(run: driving.Outcome, floats: driving.Outcome) -> None:
    """Quantizing codes and scales is quantizing the values that they stand for."""
    ours, theirs = run.succeeded().tensors(), floats.succeeded().tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].equal(tensor), name
    assert run.report()["plan"] == floats.report()["plan"]
    assert run.report()["perplexity"] == floats.report()["perplexity"]


def saved_floats(source: Path, floats: dict[str, torch.Tensor], folder: Path) -> Path:
    """The float model beside a coded one."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in floats.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("configured", [True, False], ids=["configured", "bare"])
def test_fp8_in_blocks(configured: bool, save: Save, drive: Driver, tmp_path: Path) -> None:
    """Bare: config.json lost its quantization_config, whose blocks were the usual ones."""
    source = save(unusual.llama())
    if configured:
        floats = to_fp8(source, is_projection)
        edit(source / "config.json", quantization_config=FP8)
    else:
        # Of 128 x 128, which are larger than any of these matrices.
        floats = {}

        def change(tensors: dict[str, torch.Tensor]) -> None:
            for name in list(tensors):
                floats[name] = tensors[name]
                if is_projection(name):
                    codes, scales = codes_of(tensors[name], 128)
                    tensors |= {name: codes, f"{name}_scale_inv": scales}
                    floats[name] = value_of(codes, scales, 128)

        rewrite(source, change)
    run = drive.evaluated(source)
    beside = drive.evaluated(saved_floats(source, floats, tmp_path / "floats"))
    assert_as_from_floats(run, beside)
    assert not any("scale_inv" in name for name in run.tensors())
    assert run.config()["quantization_config"]["quant_method"] == "compressed-tensors"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        run.output, quantization_config=UNPACKED
    )
    assert run.report()["perplexity"]["quantized"] == pytest.approx(
        driving.perplexity(loaded, run.text), rel=1e-3
    )


@pytest.mark.parametrize("format", ["gptq", "dense-f32"])
def test_fp8_that_stays_float(format: str, save: Save, drive: Driver, tmp_path: Path) -> None:
    """Codes that are not quantized come out as the values they stand for, in the main type."""
    source = save(unusual.llama(), dtype="bfloat16")
    floats = to_fp8(source, is_projection)
    edit(source / "config.json", quantization_config=FP8)
    run = drive(source, "--format", format, "--ignore", "v_proj", "--layers", 1).succeeded()
    tensors = run.tensors()
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        assert tensors[name].dtype == torch.bfloat16
        assert tensors[name].equal(floats[name].bfloat16()), name
    assert not any(tensor.dtype == E4M3 for tensor in tensors.values())


@pytest.mark.parametrize(
    "format", ["compressed-tensors", pytest.param("dense-f32", marks=pytest.mark.slow)]
)
def test_fp8_experts_of_deepseek(format: str, save: Save, drive: Driver, tmp_path: Path) -> None:
    source = save(unusual.deepseek())
    floats = to_fp8(source, lambda name: is_projection(name) and "kv_a" not in name)
    assert floats["model.layers.1.mlp.experts.7.down_proj.weight"].shape == (64, 32)
    edit(source / "config.json", quantization_config=FP8)
    run = drive.evaluated(source, "--format", format)
    beside = drive.evaluated(saved_floats(source, floats, tmp_path / "floats"), "--format", format)
    assert_as_from_floats(run, beside)


def test_fp8_in_shards_whose_scales_are_in_another(
    save: Save, drive: Driver, tmp_path: Path
) -> None:
    source = save(unusual.llama())
    floats = to_fp8(source, is_projection)
    edit(source / "config.json", quantization_config=FP8)
    tensors = unpack.tensors_of(source)
    (source / "model.safetensors").unlink()
    parts = {
        "model-00001-of-00002.safetensors": {n: t for n, t in tensors.items() if "scale" in n},
        "model-00002-of-00002.safetensors": {n: t for n, t in tensors.items() if "scale" not in n},
    }
    for file, own in parts.items():
        save_file(own, source / file)
    weight_map = {name: file for file, own in parts.items() for name in own}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    run = drive.evaluated(source)
    beside = drive.evaluated(saved_floats(source, floats, tmp_path / "floats"))
    assert_as_from_floats(run, beside)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        run.output, quantization_config=UNPACKED, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert driving.perplexity(loaded, run.text) == pytest.approx(
        run.report()["perplexity"]["quantized"], rel=1e-3
    )


def mxfp4_of(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks and scales as gpt-oss has them, of [experts, features, rows], and what they mean."""
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    grid = torch.cat([grid, -grid])
    experts, features, rows = values.shape
    groups = values.transpose(1, 2).reshape(experts, rows, features // 32, 32)
    exponents = (groups.abs().amax(-1) / 6).log2().ceil()
    scaled = groups / exponents.exp2()[..., None]
    codes = (scaled[..., None] - grid).abs().argmin(-1).to(torch.uint8)
    blocks = codes[..., ::2] | (codes[..., 1::2] << 4)
    meant = (grid[codes.long()] * exponents.exp2()[..., None]).reshape(experts, rows, features)
    return blocks, (exponents + 127).to(torch.uint8), meant.transpose(1, 2).contiguous()


@pytest.mark.parametrize(
    "format",
    [
        pytest.param("dense-f32", marks=pytest.mark.slow),
        "dense-bf16",
        "compressed-tensors",
    ],
)
def test_gpt_oss_in_mxfp4(format: str, save: Save, drive: Driver, tmp_path: Path) -> None:
    source = save(unusual.gpt_oss(intermediate_size=64), dtype="bfloat16")
    floats: dict[str, torch.Tensor] = {}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            floats[name] = tensors[name]
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                blocks, scales, meant = mxfp4_of(tensors.pop(name).float())
                tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
                floats[name] = meant

    rewrite(source, change)
    edit(
        source / "config.json",
        quantization_config={
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
        },
    )
    run = drive.evaluated(source, "--format", format).succeeded()
    plan = run.report()["plan"]
    tensors = run.tensors()
    experts = "model.layers.1.mlp.experts.gate_up_proj"
    assert f"{experts}_blocks" not in tensors
    if format == "compressed-tensors":
        # No loader takes such experts packed: they stay float, and are what they stood for.
        assert plan["share_quantized"] < 0.5
        assert tensors[experts].equal(floats[experts].bfloat16())
    else:
        assert plan["share_quantized"] > 0.95
        relative = (tensors[experts].float() - floats[experts]).norm() / floats[experts].norm()
        assert 0.03 < relative < 0.2
    loaded, info = transformers.GptOssForCausalLM.from_pretrained(
        run.output,
        dtype=torch.float32,
        output_loading_info=True,
        **({"quantization_config": UNPACKED} if format == "compressed-tensors" else {}),
    )
    assert not info["missing_keys"]
    assert driving.perplexity(loaded, run.text) == pytest.approx(
        run.report()["perplexity"]["quantized"], rel=1e-2 if format != "dense-f32" else 1e-3
    )
    # The float perplexity is that of the values.
    folder = saved_floats(source, floats, tmp_path / "floats")
    own = transformers.GptOssForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert driving.perplexity(own, run.text) == pytest.approx(
        run.report()["perplexity"]["float"], rel=1e-4
    )


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, ("gptq",)),
        ({"quant_method": "awq", "bits": 4}, ("awq",)),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, ("bitsandbytes", "dequantize")),
        ({"quant_method": "something_new"}, ("something_new",)),
        ({}, ("quantization",)),
        ("fp8", ("config.json",)),
    ],
    ids=str,
)
def test_other_methods_are_refused_with_a_way_on(
    quantization: object, words: tuple[str, ...], save: Save, drive: Driver
) -> None:
    source = save(unusual.llama())
    edit(source / "config.json", quantization_config=quantization)
    drive(source).refused(*words)


def test_float8_without_scales_is_refused(save: Save, drive: Driver) -> None:
    source = save(unusual.llama())
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(source, lambda tensors: tensors.update({name: tensors[name].to(E4M3)}))
    drive(source).refused(name, "scale")


# ---- GGUF ----


# Bytes, what text_test.py has beside them, and a pair, since no merges at all are no GPT-2's.
WORDS = [*ALPHABET, *SPECIAL, "th"]


def write_gguf(folder: Path, model: Any, kind: gguf.GGMLQuantizationType) -> Path:  # noqa: ANN401
    """A Llama as llama.cpp's converter writes it, rotary permutation and all."""
    path = folder / "model.gguf"
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["t h"])
    writer.add_token_types([1] * len(WORDS))
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{p}_proj": f"attn_{p}" for p in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")},
    }
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        own = module
        if module.startswith("model.layers."):
            _, _, layer, inner = module.split(".", 3)
            own = f"blk.{layer}.{names[inner]}"
        else:
            own = names[module]
        values = tensor.float().numpy()
        if own.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if own.endswith("q") else config.num_key_value_heads
            values = (
                values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            )
        if values.ndim == 2:
            data = gguf.quantize(np.ascontiguousarray(values), kind)
            writer.add_tensor(f"{own}.weight", data, raw_dtype=kind)
        else:
            writer.add_tensor(f"{own}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KINDS = gguf.GGMLQuantizationType


@pytest.mark.parametrize(
    "kind",
    [KINDS.F32, pytest.param(KINDS.F16, marks=pytest.mark.slow), KINDS.Q8_0],
    ids=lambda kind: kind.name,
)
def test_gguf(kind: gguf.GGMLQuantizationType, drive: Driver, tmp_path: Path) -> None:
    model = unusual.llama(vocab_size=len(WORDS))
    path = write_gguf(tmp_path, model, kind)
    run = drive.evaluated(path, "--dtype", "float32").succeeded()
    # Norms are float32 in all of these files.
    assert run.tensors()["model.norm.weight"].equal(model.model.norm.weight)
    embedding = run.tensors()["model.embed_tokens.weight"]
    assert torch.allclose(
        embedding,
        model.model.embed_tokens.weight,
        atol={"F32": 0, "F16": 2e-3}.get(kind.name, 1e-2),
    )
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        run.output, quantization_config=UNPACKED, output_loading_info=True
    )
    assert not info["missing_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.output)
    ids = torch.tensor(tokenizer(run.text.read_text(), verbose=False)["input_ids"][:512])
    with torch.no_grad():
        windows = ids.reshape(-1, driving.WINDOW)
        loss = loaded(input_ids=windows, labels=windows).loss
    assert run.report()["perplexity"]["quantized"] == pytest.approx(loss.exp().item(), rel=1e-3)


def test_a_damaged_gguf(drive: Driver, tmp_path: Path) -> None:
    path = write_gguf(tmp_path, unusual.llama(vocab_size=len(WORDS)), KINDS.F16)
    whole = path.read_bytes()
    for kept in (whole[: len(whole) // 2], whole[:100], b"GGUF", b"", b"no GGUF file at all" * 9):
        path.write_bytes(kept)
        drive(path).refused(str(path))
    text = tmp_path / "model.bin"
    text.write_bytes(whole)
    drive(text).refused("expected a folder or a .gguf file")
