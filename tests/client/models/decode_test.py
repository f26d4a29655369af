"""Quantized checkpoints decoded: against transformers, compressed-tensors and loops over codes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import models
import numpy as np
import pytest
import torch
import transformers
from certiq.model.checkpoint_files import SafetensorsFiles, TorchFiles
from certiq.model.decode import DecodedFiles, decoded
from certiq.model.errors import UsageError
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Tensors = dict[str, torch.Tensor]
E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
W, S = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight_scale_inv"


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., DecodedFiles]:
    """The tensors written to a file of their own and opened decoded."""

    def write(tensors: Tensors, config: Mapping[str, Any] | None = None) -> DecodedFiles:
        # Those that were opened before are read from their own file.
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        return decoded(SafetensorsFiles(folder), config)

    return write


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(17)


def codes(generator: torch.Generator, *shape: int, dtype: torch.dtype = E4M3) -> torch.Tensor:
    return (30 * torch.randn(shape, generator=generator)).to(dtype)


def scales(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=generator) * 1e-3 + 1e-5


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The values by ml_dtypes, which knows nothing of torch's conversions."""
    types = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}
    raw = tensor.view(torch.uint8).numpy()
    return raw.view(types[tensor.dtype]).astype(np.float32)


def by_loop(weight: torch.Tensor, scale: np.ndarray, rows: int, columns: int) -> np.ndarray:
    values = as_numpy(weight)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            values[row, column] *= scale[row // rows, column // columns]
    return values


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_code(opened: Callable[..., DecodedFiles], dtype: torch.dtype) -> None:
    """NaN and infinite codes too: whoever reads them says where they are."""
    weight = torch.arange(256, dtype=torch.uint8).reshape(16, 16).view(dtype)
    scale = torch.tensor([[0.1, 3e-5], [7.25, 1.7e3]])
    files = opened({W: weight, S: scale}, {"quant_method": "fp8", "weight_block_size": [8, 8]})
    found = files.read(W)
    assert found.dtype == torch.float32
    expected = by_loop(weight, scale.numpy(), 8, 8)
    assert np.array_equal(found.numpy(), expected, equal_nan=True)
    assert np.isfinite(expected).sum() == {E4M3: 254, E5M2: 248}[dtype]


@pytest.mark.parametrize("shape", [(1, 1), (127, 129), (128, 256), (200, 300), (5, 513)])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_blocks_of_any_size(
    opened: Callable[..., DecodedFiles],
    generator: torch.Generator,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    weight = codes(generator, *shape, dtype=dtype)
    for rows, columns in ((128, 128), (64, 32), (1, 128)):
        scale = scales(generator, -(-shape[0] // rows), -(-shape[1] // columns))
        config = {"quant_method": "fp8", "weight_block_size": [rows, columns]}
        found = opened({W: weight, S: scale}, config).read(W)
        assert np.array_equal(found.numpy(), by_loop(weight, scale.numpy(), rows, columns))
        theirs = _dequantize_fp8_weight(weight, scale, [rows, columns], torch.float32)
        assert torch.equal(found, theirs)


def test_without_configuration(
    opened: Callable[..., DecodedFiles], generator: torch.Generator
) -> None:
    """The scales beside a weight tell enough where the blocks are the usual ones."""
    weight, scale = codes(generator, 200, 300), scales(generator, 2, 3)
    norm = torch.ones(300, dtype=torch.bfloat16)
    files = opened({W: weight, S: scale, "norm.weight": norm})
    assert torch.equal(files.read(W), opened({W: weight, S: scale}, FP8).read(W))
    assert sorted(files.names()) == sorted(["norm.weight", W])
    assert files.read("norm.weight").dtype == torch.bfloat16
    assert files.decoded_names() == {W}
    assert files.consumed(W) == [W, S]
    assert files.consumed("norm.weight") == ["norm.weight"]
    assert files.dropped() == []


@pytest.mark.parametrize("name", [f"{W}_scale", f"{W}_scale_inv", "scale", "qscale_weight"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale(
    opened: Callable[..., DecodedFiles],
    generator: torch.Generator,
    name: str,
    shape: tuple[int, ...],
) -> None:
    scale = W.removesuffix("weight") + name if "." not in name else name
    weight = codes(generator, 7, 5)
    files = opened({W: weight, scale: torch.full(shape, 0.03)}, {"quant_method": "fp8"})
    expected = by_loop(weight, np.full((1, 1), np.float32(0.03)), 7, 5)
    assert np.array_equal(files.read(W).numpy(), expected)
    assert files.names() == [W]


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "fbgemm_fp8"},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        None,
    ],
)
@pytest.mark.parametrize("shape", [(200,), (200, 1)])
def test_a_scale_for_each_row(
    opened: Callable[..., DecodedFiles],
    generator: torch.Generator,
    config: dict[str, Any] | None,
    shape: tuple[int, ...],
) -> None:
    weight, scale = codes(generator, 200, 33), scales(generator, *shape).to(torch.bfloat16)
    found = opened({W: weight, f"{W}_scale": scale}, config).read(W)
    expected = by_loop(weight, scale.float().reshape(-1, 1).numpy(), 1, 33)
    assert np.array_equal(found.numpy(), expected)


def test_blocks_of_modelopt(
    opened: Callable[..., DecodedFiles], generator: torch.Generator
) -> None:
    weight, scale = codes(generator, 200, 300), scales(generator, 2, 1, 3, 1)
    config = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}
    found = opened({W: weight, f"{W}_scale": scale}, config).read(W)
    assert np.array_equal(found.numpy(), by_loop(weight, scale.reshape(2, 3).numpy(), 128, 128))


@pytest.mark.parametrize(
    ("format_", "arguments"),
    [
        ("float-quantized", {"strategy": "tensor"}),
        ("float-quantized", {"strategy": "channel"}),
        ("float-quantized", {"strategy": "block", "block_structure": [32, 16]}),
        ("naive-quantized", {"strategy": "group", "group_size": 16}),
        (
            "mxfp8-quantized",
            {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        ),
    ],
)
def test_as_compressed_tensors_reads_it(
    opened: Callable[..., DecodedFiles],
    generator: torch.Generator,
    format_: str,
    arguments: dict[str, Any],
) -> None:
    weight = codes(generator, 96, 64)
    shape = {
        "tensor": (1,),
        "channel": (96, 1),
        "block": (3, 4),
        "group": (96, 64 // arguments.get("group_size", 1)),
    }[arguments["strategy"]]
    scale = scales(generator, *shape)
    if format_ == "mxfp8-quantized":
        scale = torch.randint(110, 130, shape, generator=generator).to(torch.uint8)
    settings = {"num_bits": 8, "type": "float", "symmetric": True, **arguments}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
    stored = {"weight": weight, "weight_scale": scale}
    theirs = BaseCompressor.get_value_from_registry(format_).decompress(dict(stored), scheme)
    found = opened(
        {W: weight, f"{W}_scale": scale},
        {
            "quant_method": "compressed-tensors",
            "format": format_,
            "config_groups": {"group_0": {"weights": settings, "targets": ["Linear"]}},
        },
    ).read(W)
    # Theirs has the type of its scales, bfloat16 where they are exponents.
    assert torch.equal(found.to(theirs["weight"].dtype), theirs["weight"])


@pytest.mark.parametrize("stored_as", [torch.uint8, E8M0])
def test_scales_that_are_exponents(
    opened: Callable[..., DecodedFiles], generator: torch.Generator, stored_as: torch.dtype
) -> None:
    """All of e8m0's 255 numbers, 2 ** -127 among them, which float32 has as a subnormal."""
    scale = torch.arange(255, dtype=torch.uint8).reshape(51, 5)
    weight = codes(generator, 51, 160)
    weight[:, ::32] = 1
    found = opened({W: weight, S: scale.view(stored_as)}, {"quant_method": "fp8"}).read(W)
    values = scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    with np.errstate(over="ignore"):
        assert np.array_equal(found.numpy(), by_loop(weight, values, 1, 32))
    assert found[0, 0] == 2.0**-127
    normal = slice(1, 50)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(found[normal], theirs[normal])


def test_packed_fp4(opened: Callable[..., DecodedFiles], generator: torch.Generator) -> None:
    """DeepSeek-V4's experts, each code with each exponent of some size."""
    weight = torch.arange(256).to(torch.uint8).view(torch.int8).reshape(4, 64)
    scale = torch.randint(100, 140, (4, 4), generator=generator).to(torch.uint8).view(E8M0)
    name = "layers.0.ffn.experts.0.w1"
    files = opened({f"{name}.weight": weight, f"{name}.scale": scale}, FP8)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(files.read(f"{name}.weight"), theirs)
    assert theirs.shape == (4, 128)


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ((3, 2, 4), 128, 128),
        ((3, 1, 1), 200, 300),
        ((3,), 200, 300),
        ((), 200, 300),
        ((3, 200, 1), 1, 300),
        ((3, 200), 1, 300),
        ((3, 1, 385), 200, 1),
    ],
)
def test_experts_in_one_tensor(
    opened: Callable[..., DecodedFiles],
    generator: torch.Generator,
    shape: tuple[int, ...],
    rows: int,
    columns: int,
) -> None:
    columns = 385 if columns == 300 else columns
    weight, scale = codes(generator, 3, 200, 385), scales(generator, *shape)
    name = "model.layers.0.mlp.experts.down_proj"
    found = opened({name: weight, f"{name}_scale_inv": scale}, FP8).read(name)
    grids = scale.reshape(-1, 1 if rows == 200 else -(-200 // rows), -(-385 // columns))
    for expert in range(3):
        grid = grids.expand(3, -1, -1)[expert].numpy()
        expected = by_loop(weight[expert].contiguous(), grid, rows, columns)
        assert np.array_equal(found[expert].numpy(), expected)


def test_gate_and_up_with_scales_of_their_own(
    opened: Callable[..., DecodedFiles], generator: torch.Generator
) -> None:
    """transformers' FP8Experts has two scales of rows at least, one for each half."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weight, scale = codes(generator, 2, 24, 40), scales(generator, 2, 2, 1)
    for config in (FP8, {"quant_method": "fp8"}):
        found = opened({name: weight, f"{name}_scale_inv": scale}, config).read(name)
        theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
        assert torch.equal(found, theirs)
    # Halves of 200 rows begin blocks of their own: 128, 72, 128, 72.
    weight, scale = codes(generator, 2, 400, 40), scales(generator, 2, 4, 1)
    message = "fit model.layers.0.mlp.experts.gate_up_proj .* in one way"
    with pytest.raises(UsageError, match=message):
        opened({name: weight, f"{name}_scale_inv": scale}, FP8)
    scale = scales(generator, 2, 6, 1)
    weight = codes(generator, 2, 520, 40)
    found = opened({name: weight, f"{name}_scale_inv": scale}, FP8).read(name)
    for half in range(2):
        part = slice(260 * half, 260 * (half + 1))
        grid = scale[1, 3 * half : 3 * half + 3].numpy()
        expected = by_loop(weight[1, part].contiguous(), grid, 128, 40)
        assert np.array_equal(found[1, part].numpy(), expected)


def test_experts_of_fbgemm(opened: Callable[..., DecodedFiles], generator: torch.Generator) -> None:
    """Their scales are of columns, in either of two shapes."""
    weight, scale = codes(generator, 2, 30, 20), scales(generator, 2, 20)
    name = "feed_forward.experts.down_proj"
    for shape in ((2, 20, 1), (2, 1, 20)):
        stored = {name: weight, f"{name}_scale": scale.reshape(shape)}
        found = opened(stored, {"quant_method": "fbgemm_fp8"}).read(name)
        assert torch.equal(found, weight.float() * scale[:, None, :])
    with pytest.raises(UsageError, match="expected one scale"):
        opened({name: weight, f"{name}_scale": ones(2, 30, 1)}, {"quant_method": "fbgemm_fp8"})


def test_mxfp4(opened: Callable[..., DecodedFiles], generator: torch.Generator) -> None:
    """Every byte of two codes, and every exponent."""
    blocks = torch.arange(256).to(torch.uint8).repeat(2 * 5 * 17 * 3 * 16 // 256 + 1)
    blocks = blocks[: 2 * 85 * 3 * 16].reshape(2, 85, 3, 16)
    exponents = torch.arange(510).remainder(255).to(torch.uint8).reshape(2, 85, 3)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    bias = torch.randn(2, 85, generator=generator).to(torch.bfloat16)
    files = opened(
        {f"{name}_blocks": blocks, f"{name}_scales": exponents, f"{name}_bias": bias},
        {"quant_method": "mxfp4"},
    )
    found = files.read(name)
    assert found.shape == (2, 96, 85)
    assert found.is_contiguous()
    table = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    powers = exponents.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    expected = np.empty((2, 96, 85), np.float32)
    with np.errstate(over="ignore"):
        for expert, row, group, byte in np.ndindex(2, 85, 3, 16):
            pair = int(blocks[expert, row, group, byte])
            for half, code in enumerate((pair & 15, pair >> 4)):
                value = table[code] * powers[expert, row, group]
                expected[expert, group * 32 + byte * 2 + half, row] = value
    assert np.array_equal(found.numpy(), expected)
    assert torch.equal(found, convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32))
    assert sorted(files.names()) == [name, f"{name}_bias"]
    assert torch.equal(files.read(f"{name}_bias"), bias)
    assert files.consumed(name) == [f"{name}_blocks", f"{name}_scales"]


def test_a_model_of_fp8_as_transformers_loads_it(tmp_path: Path) -> None:
    """Llama with blocks of 32 x 32, decoded by transformers to bfloat16, since there is no GPU."""
    model = models.make("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tensors = {}
    for name, value in model.state_dict().items():
        tensors[name] = value.clone()
        if name.endswith("proj.weight"):
            rows, columns = value.shape
            tiles = value.float().reshape(rows // 32, 32, columns // 32, 32)
            scale = tiles.abs().amax((1, 3)) / 448
            quantized = (tiles / scale[:, None, :, None]).reshape(rows, columns).to(E4M3)
            tensors |= {name: quantized, f"{name}_scale_inv": scale}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    config.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    files = decoded(SafetensorsFiles(tmp_path), config.quantization_config)
    assert len(files.decoded_names()) == 14
    state = loaded.state_dict()
    assert sorted(state) == sorted(files.names())
    for name, value in state.items():
        assert torch.equal(files.read(name).to(torch.bfloat16), value), name


def test_a_model_of_mxfp4_as_transformers_loads_it(
    tmp_path: Path, generator: torch.Generator
) -> None:
    config = transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    for name, rows, groups in (("gate_up_proj", 64, 2), ("down_proj", 64, 1)):
        base = f"model.layers.0.mlp.experts.{name}"
        del tensors[base]
        shape = (4, rows, groups)
        packed = torch.randint(0, 256, (*shape, 16), generator=generator)
        exponents = torch.randint(110, 125, shape, generator=generator)
        tensors[f"{base}_blocks"] = packed.to(torch.uint8)
        tensors[f"{base}_scales"] = exponents.to(torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config.quantization_config = {"quant_method": "mxfp4"}
    config.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    files = decoded(SafetensorsFiles(tmp_path), config.quantization_config)
    state = loaded.state_dict()
    assert sorted(state) == sorted(files.names())
    for name, value in state.items():
        assert torch.equal(files.read(name).to(torch.bfloat16), value), name


def test_scales_of_activations_and_of_the_cache_are_dropped(
    opened: Callable[..., DecodedFiles], generator: torch.Generator
) -> None:
    attention = "model.layers.0.self_attn"
    one = torch.ones(())
    tensors = {
        f"{attention}.k_proj.weight": codes(generator, 4, 4),
        f"{attention}.k_proj.weight_scale": one.clone(),
        f"{attention}.k_proj.input_scale": one.clone(),
        f"{attention}.k_proj.k_scale": one.clone(),
        f"{attention}.v_scale": one.clone(),
        "experts.gate_up_proj_activation_scale": one.clone(),
    }
    files = opened(tensors)
    assert files.names() == [f"{attention}.k_proj.weight"]
    assert sorted(files.dropped()) == sorted(
        name for name in tensors if not name.endswith((".weight", "weight_scale"))
    )


def test_a_float_model_passes_through(
    opened: Callable[..., DecodedFiles], generator: torch.Generator
) -> None:
    """Its own parameters may have names that scales have elsewhere."""
    tensors = {
        "block.k_scale": torch.randn(4, generator=generator),
        "q_norm.scale": torch.randn(4, generator=generator).to(torch.bfloat16),
        "conv_blocks": torch.arange(6, dtype=torch.int32),
        "layer_scale": torch.randn(3, generator=generator),
        "layer": torch.randn(3, generator=generator),
    }
    files = opened(tensors)
    assert sorted(files.names()) == sorted(tensors)
    assert not files.decoded_names()
    assert not files.dropped()
    for name, value in tensors.items():
        assert files.read(name).dtype == value.dtype
        assert torch.equal(files.read(name), value)


def test_files_of_pytorch(tmp_path: Path, generator: torch.Generator) -> None:
    weight, scale = codes(generator, 200, 300), scales(generator, 2, 3)
    torch.save({W: weight, S: scale}, tmp_path / "pytorch_model.bin")
    for config in (FP8, None):
        files = decoded(TorchFiles(tmp_path), config)
        assert np.array_equal(files.read(W).numpy(), by_loop(weight, scale.numpy(), 128, 128))
        assert files.names() == [W]
    torch.save({W: weight}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="expected its scales beside it"):
        decoded(TorchFiles(tmp_path), FP8)
    with pytest.raises(UsageError, match="expected its scales beside it"):
        decoded(TorchFiles(tmp_path), None).read(W)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape).to(dtype)


FP8_ONES = ones(200, 300, dtype=E4M3)
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}


@pytest.mark.parametrize(
    ("tensors", "config", "parts"),
    [
        ({W: FP8_ONES}, None, [W, "its scales beside it", "float8_e4m3fn [200, 300]"]),
        ({W: FP8_ONES}, FP8, [W, "its scales beside it"]),
        ({W: ones(4, 4, dtype=E5M2)}, None, [W, "float8_e5m2"]),
        (
            {W: FP8_ONES, S: ones(3, 3)},
            FP8,
            [S, f"{W} [200, 300]", "128x128", "float32 [3, 3]", "weight_block_size"],
        ),
        ({W: FP8_ONES, S: ones(4, 4)}, None, [S, "128x128", "float32 [4, 4]"]),
        ({W: FP8_ONES, S: ones(300)}, FP8, [S, "float32 [300]"]),
        ({W: FP8_ONES, S: ones(2, 3, dtype=torch.int32)}, FP8, [S, "int32 [2, 3]"]),
        ({S: ones(2, 3)}, FP8, [S, f"expected {W} beside it"]),
        ({W: ones(200, 300), S: ones(2, 3)}, FP8, [W, S, "got float32", "cannot be known"]),
        ({W: ones(200, 300, dtype=torch.int8), S: ones(200, 1)}, None, [W, "got int8"]),
        ({W: FP8_ONES, S: ones(2, 3)}, {"quant_method": "fp8", "weight_block_size": [0, 1]}, []),
        ({W: FP8_ONES}, {"quant_method": "rotated"}, ["rotated", "mxfp4"]),
        ({W: FP8_ONES}, {"bits": 4}, ["unnamed method"]),
        ({W: FP8_ONES}, {"quant_method": "gptq"}, ["gptq", "float model that it was made of"]),
        ({W: FP8_ONES}, {"quant_method": "bitsandbytes"}, ["model.dequantize()"]),
        (
            {W: FP8_ONES},
            {**COMPRESSED, "format": "pack-quantized"},
            ["pack-quantized", "CompressedTensorsConfig(dequantize=True)"],
        ),
        ({W: FP8_ONES}, {**COMPRESSED, "transform_config": {"a": {}}}, ["transform_config"]),
        (
            {W: FP8_ONES},
            {**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}},
            ["sparsity_config"],
        ),
        ({W: FP8_ONES}, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, ["NVFP4"]),
        ({"a.qweight": ones(4, 4, dtype=torch.int32)}, None, ["a.qweight", "GPTQ"]),
        ({"a.weight_packed": ones(4, dtype=torch.int32)}, COMPRESSED, ["pack-quantized"]),
        (
            {"a.weight": ones(4, 8, dtype=torch.uint8), "a.weight_scale_2": ones(1)},
            None,
            ["a.weight_scale_2", "NVFP4"],
        ),
        ({"e_blocks": ones(1, 2, 3, 16, dtype=torch.uint8)}, None, ["e_blocks", "e_scales"]),
        (
            {
                "e_blocks": ones(2, 3, 16, dtype=torch.uint8),
                "e_scales": ones(2, 3, dtype=torch.uint8),
            },
            None,
            ["e_blocks", "[experts, rows, groups, 16]", "uint8 [2, 3, 16]"],
        ),
        (
            {
                "e_blocks": ones(1, 2, 3, 16, dtype=torch.uint8),
                "e_scales": ones(1, 2, 3),
            },
            None,
            ["e_scales", "uint8 [1, 2, 3]", "float32 [1, 2, 3]"],
        ),
        (
            {
                "e": ones(1, 96, 2),
                "e_blocks": ones(1, 2, 3, 16, dtype=torch.uint8),
                "e_scales": ones(1, 2, 3, dtype=torch.uint8),
            },
            None,
            ["e: ", "got both"],
        ),
    ],
)
def test_refused_before_a_tensor_is_read(
    opened: Callable[..., DecodedFiles],
    tensors: Tensors,
    config: dict[str, Any] | None,
    parts: list[str],
) -> None:
    with pytest.raises(UsageError) as error:
        opened(tensors, config)
    message = str(error.value)
    for part in [*parts, "expected" if "not decoded here" not in message else "decoded"]:
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_scale_nothing(opened: Callable[..., DecodedFiles], value: float) -> None:
    scale = ones(2, 3)
    scale[1, 2] = value
    files = opened({W: FP8_ONES, S: scale}, FP8)
    with pytest.raises(UsageError, match=r"positive finite scales, got .* at index \[1, 2\]") as e:
        files.read(W)
    assert S in str(e.value)


def test_exponents_that_are_no_numbers(opened: Callable[..., DecodedFiles]) -> None:
    exponents = torch.full((1, 2, 3), 127, dtype=torch.uint8)
    exponents[0, 1, 0] = 255
    blocks = ones(1, 2, 3, 16, dtype=torch.uint8)
    files = opened({"e_blocks": blocks, "e_scales": exponents}, {"quant_method": "mxfp4"})
    with pytest.raises(UsageError, match=r"e_scales: .* got nan at index \[0, 1, 0\]"):
        files.read("e")


def test_zero_points(opened: Callable[..., DecodedFiles]) -> None:
    tensors = {W: FP8_ONES, f"{W}_scale": ones(1), f"{W}_zero_point": ones(1, dtype=E4M3)}
    files = opened(tensors, COMPRESSED)
    assert files.names() == [W]
    with pytest.raises(UsageError, match="weight_zero_point: expected zeros"):
        files.read(W)
    tensors[f"{W}_zero_point"].zero_()
    assert torch.equal(opened(tensors, COMPRESSED).read(W), ones(200, 300))
