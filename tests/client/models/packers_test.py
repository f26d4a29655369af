"""Packed tensors against compressed-tensors' own compressor and decompressor.

What it and GPTQModel's packer made of known codes is in tests/e2e/packing_test.py. GPTQ's words are
those of compressed-tensors, transposed.
"""

from pathlib import Path
from typing import Any

import certiq
import certiq.torch
import models
import numpy as np
import pytest
import torch
import unpack
from certiq.model.cli import main
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from programs import Server


@pytest.mark.parametrize("format", ["gptq", "gptq-v2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_words_are_those_of_a_packer(
    format: str,
    bits: int,
    server: Server,
    text: Path,
    tokenizer: Any,  # noqa: ANN401
    tmp_path: Path,
) -> None:
    source = models.save(models.make("llama"), tokenizer, tmp_path / "source")
    output = tmp_path / "output"
    flags = ["--format", format, "--bits", str(bits), "--group-size", "32"]
    flags += ["--sequences", "8", "--sequence-length", "64", "--layers", "1", "--quiet"]
    command = ["--server", server.address, "--model", str(source), "--calibration", str(text)]
    assert main([*command, "--output", str(output), *flags]) == 0
    tensors = unpack.tensors_of(output)
    packed = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(packed) == 7
    for name in packed:
        qweight = tensors[f"{name}.qweight"]
        features, rows = qweight.shape[0] * 32 // bits, qweight.shape[1]
        # Signed, as that library wants them.
        codes = unpack_from_int32(qweight.t().contiguous(), bits, torch.Size((rows, features)))
        assert torch.equal(pack_to_int32(codes, bits).t(), qweight)
        scales = tensors[f"{name}.scales"].float()
        index = tensors[f"{name}.g_idx"].long()
        assert torch.equal(index, torch.arange(features) // 32)
        weights = unpack.gptq(tensors, name, bits, version=1 if format == "gptq" else 2)
        assert torch.equal(codes.float() * scales.t()[:, index], torch.from_numpy(weights))
        original = certiq.torch.weight_of(models.make("llama").get_submodule(name))
        assert (torch.from_numpy(weights) - original).norm() < 0.2 * original.norm()


@pytest.mark.parametrize("group_size", [0, 24])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_compressed_tensors_reads_and_would_write_it(
    client: certiq.Client, bits: int, symmetric: bool, group_size: int
) -> None:
    """Rows and features that end within a word, so that codes and zero points straddle words."""
    random = np.random.default_rng(bits)
    W = random.standard_normal((21, 72), dtype=np.float32)
    X = random.standard_normal((200, 72), dtype=np.float32)
    layer = client.quantize(
        W,
        X,
        certiq.Spec(
            bits=bits,
            symmetric=symmetric,
            group_size=group_size,
            order="decreasing_norm",
            format="compressed_tensors",
            scale_dtype="f32",
        ),
    )
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=bits,
            type="int",
            symmetric=symmetric,
            strategy="group" if group_size else "channel",
            group_size=group_size or None,
        ),
    )
    tensors = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in layer.torch().items()
    }
    read = PackedQuantizationCompressor.decompress(dict(tensors), scheme)["weight"]
    assert torch.equal(read, torch.from_numpy(layer.dequantized()))
    assert (read - torch.from_numpy(W)).norm() < 0.7 * np.linalg.norm(W)

    # Our levels, packed by them.
    state = {"weight": read, "weight_scale": tensors["weight_scale"]}
    if not symmetric:
        groups = tensors["weight_scale"].shape[1]
        zeros = unpack_from_int32(
            tensors["weight_zero_point"], bits, torch.Size((21, groups)), packed_dim=0
        )
        state["weight_zero_point"] = zeros.to(torch.int8)
    packed = PackedQuantizationCompressor.compress(state, scheme)
    assert set(packed) == set(tensors)
    for name, expected in packed.items():
        assert torch.equal(tensors[name], expected), name
