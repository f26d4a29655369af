"""Packed results against the packers of GPTQModel and compressed-tensors, byte for byte.

`tests/data/packing_vectors.safetensors` holds what they made of known codes and grids (its maker
says how). Here the codes' levels go in as weights with the same grid, and rounding them to the
nearest gives the codes back; explicit grids have no flag, so the calls are made frame by frame.
"""

from dataclasses import dataclass
from itertools import groupby

import grpc
import numpy as np
import pytest
import raw
import safetensors_file
from programs import ROOT, Server
from safetensors_file import Tensor
from stubs import spec_pb2, tensor_pb2

VECTORS = ROOT / "tests" / "data" / "packing_vectors.safetensors"
NUMPY = {
    tensor_pb2.DATA_TYPE_F32: "<f4",
    tensor_pb2.DATA_TYPE_F16: "<f2",
    # Bit patterns.
    tensor_pb2.DATA_TYPE_BF16: "<u2",
    tensor_pb2.DATA_TYPE_I32: "<i4",
    tensor_pb2.DATA_TYPE_I64: "<i8",
}
SCALE_TYPES = {"F16": tensor_pb2.DATA_TYPE_F16, "BF16": tensor_pb2.DATA_TYPE_BF16}
SCALE_TYPES["F32"] = tensor_pb2.DATA_TYPE_F32


@dataclass(frozen=True)
class Vector:
    """One case of the file."""

    name: str
    tensors: dict[str, Tensor]

    def array(self, name: str) -> np.ndarray:
        return self.tensors[name].array

    @property
    def bits(self) -> int:
        return int(self.name.split("_")[1].removesuffix("bit"))

    @property
    def symmetric(self) -> bool:
        return self.name.split("_")[2] == "sym"

    @property
    def act_order(self) -> bool:
        return self.name.endswith("_actorder")

    @property
    def scale_name(self) -> str:
        return "scales" if self.name.startswith("gptq") else "weight_scale"

    @property
    def group_size(self) -> int:
        groups = self.array("scales_given").shape[1]
        return self.array("codes").shape[1] // groups if groups > 1 else 0

    def weights(self) -> np.ndarray:
        """The codes' levels, which float32 holds exactly: 24 bits are enough for a product."""
        index = self.array("group_index")
        steps = self.array("codes").astype(int) - self.array("zero_points")[:, index]
        levels = self.array("scales_given").astype(np.float64)[:, index] * steps
        if self.tensors[self.scale_name].dtype != "F32":
            assert np.array_equal(levels.astype(np.float32), levels)
        return levels

    def inputs(self) -> np.ndarray:
        """One token; under act-order its features decrease through group after group."""
        index = self.array("group_index")
        x = np.ones((1, len(index)), np.float32)
        if self.act_order:
            x[0, np.argsort(index, kind="stable")] = np.arange(len(index), 0, -1)
        return x

    def spec(self, format: int) -> spec_pb2.QuantizationSpec:
        spec = spec_pb2.QuantizationSpec(
            method=spec_pb2.METHOD_NEAREST,
            bits=self.bits,
            symmetric=self.symmetric,
            group_size=self.group_size,
            scale_dtype=SCALE_TYPES[self.tensors[self.scale_name].dtype],
            format=format,
        )
        if self.act_order:
            # Groups that follow the order exclude an explicit grid. Both ends of each group's
            # codes occur, so the search finds this very grid.
            spec.order = spec_pb2.ORDER_DECREASING_NORM
            spec.group_scales = spec_pb2.GROUP_SCALES_DYNAMIC
            return spec
        spec.grid.scales.extend(self.array("scales_given").ravel().tolist())
        if not self.symmetric:
            spec.grid.zero_points.extend(self.array("zero_points").ravel().tolist())
        return spec


def read_vectors() -> list[Vector]:
    tensors = safetensors_file.read(VECTORS)
    return [
        Vector(case, {name.split(".")[1]: tensors[name] for name in names})
        for case, names in groupby(tensors, lambda name: name.split(".")[0])
    ]


VECTOR_LIST = read_vectors()


def select(packer: str, *, symmetric_only: bool = False) -> pytest.MarkDecorator:
    chosen = [
        v
        for v in VECTOR_LIST
        if v.name.startswith(f"{packer}_") and (v.symmetric or not symmetric_only)
    ]
    return pytest.mark.parametrize("vector", chosen, ids=lambda v: v.name)


def tensors_of(answer: grpc.Call) -> dict[str, np.ndarray]:
    headers = []
    parts: list[bytearray] = []
    for frame in answer:
        kind = frame.WhichOneof("payload")
        if kind == "result":
            headers = list(frame.result.tensors)
            parts = [bytearray() for _ in headers]
        elif kind == "chunk":
            parts[frame.chunk.tensor] += frame.chunk.data
    return {
        header.name: np.frombuffer(part, NUMPY[header.dtype]).reshape(header.shape)
        for header, part in zip(headers, parts, strict=True)
    }


def pack(server: Server, vector: Vector, format: int) -> dict[str, np.ndarray]:
    layer = raw.Layer(vector.weights(), vector.inputs())
    layer.header.spec.CopyFrom(vector.spec(format))
    with raw.connect(server) as channel:
        return tensors_of(raw.quantize(channel, layer.frames()))


def check(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        assert ours[name].shape == expected.shape, name
        assert ours[name].tobytes() == expected.tobytes(), name


@select("gptq")
def test_gptq_v2_is_gptqmodels(server: Server, vector: Vector) -> None:
    names = ("qweight", "qzeros", "scales", "g_idx")
    ours = pack(server, vector, spec_pb2.FORMAT_GPTQ_V2)
    check(ours, {name: vector.array(name) for name in names})


@select("gptq", symmetric_only=True)
def test_gptq_v1_is_gptqmodels(server: Server, vector: Vector) -> None:
    theirs = {name: vector.array(name) for name in ("qweight", "scales", "g_idx")}
    theirs["qzeros"] = vector.array("qzeros_v1")
    check(pack(server, vector, spec_pb2.FORMAT_GPTQ), theirs)


@select("ct")
def test_compressed_tensors_is_theirs(server: Server, vector: Vector) -> None:
    names = ["weight_packed", "weight_scale", "weight_shape"]
    if not vector.symmetric:
        names.append("weight_zero_point")
    ours = pack(server, vector, spec_pb2.FORMAT_COMPRESSED_TENSORS)
    check(ours, {name: vector.array(name) for name in names})


def test_every_layout_has_its_vectors() -> None:
    names = {vector.name for vector in VECTOR_LIST}
    assert len(names) == len(VECTOR_LIST) == 32
    for packer, widths in (("gptq", (2, 3, 4, 8)), ("ct", (2, 4, 8))):
        for bits in widths:
            for grid in ("sym_channel", "asym_channel"):
                assert f"{packer}_{bits}bit_{grid}" in names
    assert {"gptq_3bit_asym_g16_actorder", "gptq_4bit_asym_g16_actorder"} <= names
