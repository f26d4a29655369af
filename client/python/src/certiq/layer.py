"""Quantized layers: tensors and certificate as the server sent them."""

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from certiq._proto import spec_pb2
from certiq._proto.certificate_pb2 import Certificate
from certiq.tensors import Array


def unpack_bits(words: Array, bits: int, count: int) -> Array:
    """`count` codes [..., count] from streams of 32-bit words [..., words], least significant bit
    first: code i takes the bits [i * bits, (i + 1) * bits). int32."""
    stream = np.ascontiguousarray(words).astype("<u4", copy=False)
    octets = stream.view(np.uint8).reshape(*words.shape[:-1], -1)
    # The last code may end where the words end; 64 bits from there on must not.
    padded = np.concatenate(
        [octets, np.zeros((*words.shape[:-1], 2), np.uint8)], axis=-1, dtype=np.uint8
    )
    first = np.arange(count, dtype=np.int64) * bits
    # A code of at most 8 bits lies within two octets.
    low = padded[..., first // 8].astype(np.int32)
    high = padded[..., first // 8 + 1].astype(np.int32)
    codes: Array = ((low | high << 8) >> (first % 8).astype(np.int32)) & ((1 << bits) - 1)
    return codes


@dataclass(frozen=True)
class Layer:
    """Tensors and certificate of one layer."""

    tensors: dict[str, Array]
    """Arrays by role, as the server named them: "weight", "scales", ... or a packed format's names.
    bfloat16 ones have the dtype ml_dtypes.bfloat16."""
    certificate: Certificate
    name: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, features] of the weights."""
        return self.certificate.rows, self.certificate.features

    @property
    def relative_error(self) -> float:
        """|X W^T - X~ Q^T| / |X W^T| on the calibration tokens."""
        return self.certificate.relative_error

    @property
    def relative_error_range(self) -> tuple[float, float]:
        """Between which the relative error on the activations lies, whatever rounding did to their
        sums: the certificate's squared error and energy, each give or take its `_rounding`."""
        c = self.certificate
        least = max(0.0, c.squared_error - c.squared_error_rounding)
        most = c.squared_error + c.squared_error_rounding
        energy = c.reference_energy - c.reference_energy_rounding
        if most == 0:
            return 0.0, 0.0
        return (
            math.sqrt(least / (c.reference_energy + c.reference_energy_rounding)),
            math.sqrt(most / energy) if energy > 0 else math.inf,
        )

    def dequantized(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The weights the layer now has, float32 [rows, features], from any format."""
        weight = self.tensors.get("weight")
        if weight is not None:
            return weight.astype(np.float32)
        codes, zeros, scales, group_of = self._packed()
        group = group_of.astype(np.int64)
        levels: np.ndarray[Any, np.dtype[np.float32]] = (codes - zeros[:, group]).astype(np.float32)
        levels *= scales[:, group]
        return levels

    def codes(self) -> Array:
        """Unsigned codes [rows, features], uint8, of a packed format."""
        return self._packed()[0].astype(np.uint8)

    def _packed(self) -> tuple[Array, Array, Array, Array]:
        """Codes [R, N], zero points and scales [R, groups], and each feature's group."""
        rows, features = self.shape
        bits = self.certificate.bits
        t = self.tensors
        if "qweight" in t:
            codes = unpack_bits(t["qweight"].T, bits, features)
            # Version 1 stores zero points minus one.
            offset = 1 if self.certificate.spec.format == spec_pb2.FORMAT_GPTQ else 0
            zeros = unpack_bits(t["qzeros"], bits, rows).T + offset
            return codes, zeros, t["scales"].astype(np.float32).T, t["g_idx"]
        if "weight_packed" in t:
            codes = unpack_bits(t["weight_packed"], bits, features)
            scales = t["weight_scale"].astype(np.float32)
            if "weight_zero_point" in t:
                zeros = unpack_bits(t["weight_zero_point"].T, bits, rows).T
            else:
                zeros = np.full(scales.shape, 1 << (bits - 1), np.int32)
            group_of = t.get("weight_g_idx")
            if group_of is None:
                size = self.certificate.group_size or features
                group_of = np.arange(features) // size
            return codes, zeros, scales, group_of
        raise ValueError(f"no format that is known has these tensors: {', '.join(t)}")

    def torch(self) -> dict[str, Any]:
        """The same tensors for torch, which takes over the memory."""
        import torch

        found = {}
        for name, array in self.tensors.items():
            if array.dtype == ml_dtypes.bfloat16:
                found[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            else:
                found[name] = torch.from_numpy(array)
        return found
