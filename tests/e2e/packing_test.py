"""Packed results against the packers of GPTQModel and compressed-tensors, byte for byte.

`tests/data/packing_vectors.safetensors` holds what they made of known codes and grids (its maker
says how). Here the codes' levels go in as weights with the same grid, and rounding them to the
nearest gives the codes back.
"""

from collections import defaultdict
from dataclasses import dataclass

import certiq
import numpy as np
import pytest
from programs import ROOT, Server
from safetensors.numpy import load_file
from work import client_of

VECTORS = ROOT / "tests" / "data" / "packing_vectors.safetensors"
SCALE_TYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}


@dataclass(frozen=True)
class Vector:
    """One case of the file."""

    name: str
    tensors: dict[str, np.ndarray]

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
        groups = self.tensors["scales_given"].shape[1]
        return self.tensors["codes"].shape[1] // groups if groups > 1 else 0

    def weights(self) -> np.ndarray:
        """The codes' levels, which float32 holds exactly: 24 bits are enough for a product."""
        index = self.tensors["group_index"]
        steps = self.tensors["codes"].astype(int) - self.tensors["zero_points"][:, index]
        levels = self.tensors["scales_given"].astype(np.float64)[:, index] * steps
        if self.tensors[self.scale_name].dtype.name != "float32":
            assert np.array_equal(levels.astype(np.float32), levels)
        return levels

    def inputs(self) -> np.ndarray:
        """One token; under act-order its features decrease through group after group."""
        index = self.tensors["group_index"]
        x = np.ones((1, len(index)), np.float32)
        if self.act_order:
            x[0, np.argsort(index, kind="stable")] = np.arange(len(index), 0, -1)
        return x

    def spec(self, format_name: str) -> certiq.Spec:
        # Groups that follow the order exclude an explicit grid. Both ends of each group's codes
        # occur, so the search finds this very grid.
        zeros = None if self.symmetric else self.tensors["zero_points"]
        given = {"grid": certiq.Grid(self.tensors["scales_given"], zeros)}
        searched = {"order": "decreasing_norm", "group_scales": "dynamic"}
        return certiq.Spec(
            method="nearest",
            bits=self.bits,
            symmetric=self.symmetric,
            group_size=self.group_size,
            scale_dtype=SCALE_TYPES[self.tensors[self.scale_name].dtype.name],
            format=format_name,
            **(searched if self.act_order else given),
        )


def read_vectors() -> list[Vector]:
    cases: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for name, tensor in load_file(VECTORS).items():
        case, _, part = name.partition(".")
        cases[case][part] = tensor
    return [Vector(case, tensors) for case, tensors in sorted(cases.items())]


VECTOR_LIST = read_vectors()


def select(packer: str, *, symmetric_only: bool = False) -> pytest.MarkDecorator:
    chosen = [
        v
        for v in VECTOR_LIST
        if v.name.startswith(f"{packer}_") and (v.symmetric or not symmetric_only)
    ]
    return pytest.mark.parametrize("vector", chosen, ids=lambda v: v.name)


def pack(server: Server, vector: Vector, format_name: str) -> dict[str, np.ndarray]:
    weights = vector.weights().astype("<f4")
    return client_of(server).quantize(weights, vector.inputs(), vector.spec(format_name)).tensors


def check(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        assert ours[name].shape == expected.shape, name
        assert ours[name].tobytes() == expected.tobytes(), name


@select("gptq")
def test_gptq_v2_is_gptqmodels(server: Server, vector: Vector) -> None:
    names = ("qweight", "qzeros", "scales", "g_idx")
    ours = pack(server, vector, "gptq_v2")
    check(ours, {name: vector.tensors[name] for name in names})


@select("gptq", symmetric_only=True)
def test_gptq_v1_is_gptqmodels(server: Server, vector: Vector) -> None:
    theirs = {name: vector.tensors[name] for name in ("qweight", "scales", "g_idx")}
    theirs["qzeros"] = vector.tensors["qzeros_v1"]
    check(pack(server, vector, "gptq"), theirs)


@select("ct")
def test_compressed_tensors_is_theirs(server: Server, vector: Vector) -> None:
    names = ["weight_packed", "weight_scale", "weight_shape"]
    if not vector.symmetric:
        names.append("weight_zero_point")
    ours = pack(server, vector, "compressed_tensors")
    check(ours, {name: vector.tensors[name] for name in names})


def test_every_layout_has_its_vectors() -> None:
    names = {vector.name for vector in VECTOR_LIST}
    assert len(names) == len(VECTOR_LIST) == 48
    for packer, widths in (("gptq", (2, 3, 4, 8)), ("ct", (2, 3, 4, 5, 6, 7, 8))):
        for bits in widths:
            for grid in ("sym_channel", "asym_channel"):
                assert f"{packer}_{bits}bit_{grid}" in names
    assert {"gptq_3bit_asym_g16_actorder", "gptq_4bit_asym_g16_actorder"} <= names
