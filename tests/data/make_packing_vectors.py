#!/usr/bin/env python3
"""Runs the packers of other projects over made-up codes; their tensors are what ours must equal.

    pip install torch compressed-tensors==0.20.0 gptqmodel==7.7.0
    GPTQMODEL_DISABLE_PACK_EXT=1 python3 tests/data/make_packing_vectors.py [DESTINATION]

Writes packing_vectors.safetensors, the same bytes every time with the same packages. To the
packers goes what a quantizer would give them: float32 weights, each exactly the level of its code,
with scales and zero points. GPTQModel's three routes (pack_original, pack_block, and v2 to v1)
have to agree with each other and with its own reader; compressed-tensors with its own reader.

Tensors are named CASE.TENSOR. Inputs: codes U8 [rows, features], scales_given F32 and
zero_points I32 [rows, groups], group_index I32 [features]. The rest are the packers' own. Cases
named gptq_... are GPTQModel's and have qzeros_v1 beside the qzeros of version 2 where the grid is
symmetric; ct_... are compressed-tensors'.
"""

import json
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.utils.backend import BACKEND
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from gptqmodel.version import __version__ as gptqmodel_version

SCALE_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
SAFETENSORS_TYPES = {
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}


@dataclass(frozen=True)
class Case:
    """One layer and how it is packed."""

    packer: str
    bits: int
    symmetric: bool
    group_size: int
    scale_type: str = "F16"
    act_order: bool = False

    @property
    def name(self) -> str:
        parts = [
            self.packer,
            f"{self.bits}bit",
            "sym" if self.symmetric else "asym",
            f"g{self.group_size}" if self.group_size else "channel",
            *(["actorder"] if self.act_order else []),
            *([] if self.scale_type == "F16" else [self.scale_type.lower()]),
        ]
        return "_".join(parts)

    @property
    def shape(self) -> tuple[int, int]:
        """GPTQ packs whole words; compressed-tensors pads both ways, so its sizes are odd."""
        return (32, 64) if self.packer == "gptq" else (21, 72)


GRIDS = [(symmetric, grouped) for symmetric in (True, False) for grouped in (False, True)]
CASES = [
    *(Case("gptq", bits, symmetric, 16 * g) for bits in (2, 3, 4, 8) for symmetric, g in GRIDS),
    *(Case("gptq", bits, False, 16, act_order=True) for bits in (3, 4)),
    *(Case("ct", bits, symmetric, 24 * g) for bits in (2, 4, 8) for symmetric, g in GRIDS),
    Case("ct", 4, False, 24, "BF16"),
    Case("ct", 4, True, 24, "F32"),
    # Codes that straddle words, dense since release 0.18. Behind the others, whose seeds are their
    # places.
    *(Case("ct", bits, symmetric, 24 * g) for bits in (3, 5, 6, 7) for symmetric, g in GRIDS),
]


class Layer:
    """Random codes and grid of a case; weights are the codes' levels."""

    def __init__(self, case: Case, seed: int) -> None:
        random = np.random.default_rng(seed)
        rows, features = case.shape
        size = case.group_size or features
        top = 2**case.bits - 1
        group_index = np.arange(features) // size
        if case.act_order:
            group_index = random.permutation(group_index)
        codes = random.integers(0, top + 1, case.shape)
        # Both ends of every group occur, from which absmax scales find the grid again.
        for group in range(features // size):
            members = np.flatnonzero(group_index == group)
            codes[:, members[0]], codes[:, members[-1]] = 0, top
        zero_points = random.integers(0, top + 1, (rows, features // size))
        if case.symmetric:
            zero_points[:] = 2 ** (case.bits - 1)
        scales = random.uniform(0.001, 0.1, zero_points.shape)

        self.codes = torch.tensor(codes, dtype=torch.uint8)
        self.zero_points = torch.tensor(zero_points, dtype=torch.int32)
        self.scales = torch.tensor(scales).to(SCALE_TYPES[case.scale_type]).float()
        self.group_index = torch.tensor(group_index, dtype=torch.int32)
        levels = self.codes.double() - self.zero_points.double()[:, group_index]
        exact = levels * self.scales.double()[:, group_index]
        self.weight = exact.float()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            "codes": self.codes,
            "scales_given": self.scales,
            "zero_points": self.zero_points,
            "group_index": self.group_index,
        }


def gptq(case: Case, layer: Layer) -> dict[str, torch.Tensor]:
    rows, features = case.shape

    def packed(pack: str) -> TorchLinear:
        module = TorchLinear(
            bits=case.bits,
            group_size=case.group_size or features,
            desc_act=case.act_order,
            sym=case.symmetric,
            in_features=features,
            out_features=rows,
            bias=False,
            pack_dtype=torch.int32,
            backend=BACKEND.GPTQ_TORCH,
            adapter=None,
            register_buffers=True,
            format=FORMAT.GPTQ_V2,
        )
        linear = torch.nn.Linear(features, rows, bias=False)
        linear.weight.data = layer.weight.clone()
        zeros = layer.zero_points.float()
        getattr(module, pack)(linear, layer.scales, zeros, layer.group_index)
        return module

    module = packed("pack_original")
    other = packed("pack_block")
    names = ("qweight", "qzeros", "scales", "g_idx")
    tensors = {name: getattr(module, name).clone() for name in names}
    for name in names:
        assert torch.equal(tensors[name], getattr(other, name)), (case, name)
    module.qzero_format(format=2)
    module.post_init()
    read = module.dequantize_weight().T
    assert torch.equal(read.float(), layer.weight.to(read.dtype).float()), case
    if case.symmetric:
        convert_gptq_v2_to_v1_format_module(other, QuantizeConfig(bits=case.bits))
        tensors["qzeros_v1"] = other.qzeros
    return tensors


def compressed_tensors(case: Case, layer: Layer) -> dict[str, torch.Tensor]:
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=case.bits,
            symmetric=case.symmetric,
            strategy="group" if case.group_size else "channel",
            group_size=case.group_size or None,
        ),
    )
    scale = layer.scales.to(SCALE_TYPES[case.scale_type])
    signed = (layer.zero_points - 2 ** (case.bits - 1)).to(torch.int8)
    state = {"weight": layer.weight, "weight_scale": scale, "weight_zero_point": signed}
    tensors = PackedQuantizationCompressor.compress(state, scheme)
    read = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    assert torch.equal(read.float(), layer.weight.to(read.dtype).float()), case
    assert ("weight_zero_point" in tensors) != case.symmetric
    return tensors


def release(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        assert package == "gptqmodel"
        return gptqmodel_version


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """By hand: the order of the safetensors package's metadata changes from run to run."""
    metadata = {name: release(name) for name in ("gptqmodel", "compressed-tensors", "torch")}
    header: dict[str, dict] = {"__metadata__": metadata}
    data = b""
    for name, tensor in tensors.items():
        flat = tensor.clone(memory_format=torch.contiguous_format).flatten()
        content = flat.view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": SAFETENSORS_TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0]) if arguments else Path(__file__).parent
    tensors: dict[str, torch.Tensor] = {}
    for seed, case in enumerate(CASES):
        layer = Layer(case, seed)
        pack = gptq if case.packer == "gptq" else compressed_tensors
        for name, tensor in (layer.tensors() | pack(case, layer)).items():
            tensors[f"{case.name}.{name}"] = tensor
    write(folder / "packing_vectors.safetensors", tensors)
    print(f"{len(CASES)} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
