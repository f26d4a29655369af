"""Packed tensors of whole checkpoints against compressed-tensors' packer.

The bytes of GPTQModel's packer are in tests/e2e/packing_test.py. At 2, 4 and 8 bits both layouts
hold the same words, transposed.
"""

from pathlib import Path
from typing import Any

import certiq
import certiq.torch
import models
import pytest
import torch
import unpack
from certiq.model.cli import main
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
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
