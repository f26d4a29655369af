"""Packed checkpoints back to float32, from the layouts' definitions alone."""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def codes_of(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """A stream of bits along the last axis, least significant first, in words of 32."""
    single = (words.astype(np.uint32)[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    stream = single.reshape(*words.shape[:-1], -1)[..., : count * bits]
    digits = stream.reshape(*words.shape[:-1], count, bits).astype(np.int64)
    return (digits << np.arange(bits)).sum(-1)


def gptq(tensors: dict[str, torch.Tensor], prefix: str, bits: int, *, version: int) -> np.ndarray:
    """w = scales[g_idx[k], n] (u - z[g_idx[k], n]), [N, K]."""
    qweight, qzeros, scales, g_idx = (
        tensors[f"{prefix}.{role}"].numpy() for role in ("qweight", "qzeros", "scales", "g_idx")
    )
    codes = codes_of(qweight.T, bits, len(g_idx))
    zeros = codes_of(qzeros, bits, scales.shape[1]) + (1 if version == 1 else 0)
    return (scales.astype(np.float32).T[:, g_idx] * (codes - zeros.T[:, g_idx])).astype(np.float32)


def compressed(tensors: dict[str, torch.Tensor], prefix: str, bits: int) -> np.ndarray:
    rows, features = tensors[f"{prefix}.weight_shape"].tolist()
    scales = tensors[f"{prefix}.weight_scale"].float().numpy()
    codes = codes_of(tensors[f"{prefix}.weight_packed"].numpy(), bits, features)
    zeros = np.full(scales.shape, 1 << (bits - 1))
    if f"{prefix}.weight_zero_point" in tensors:
        zeros = codes_of(tensors[f"{prefix}.weight_zero_point"].numpy().T, bits, rows).T
    group = np.arange(features) // (features // scales.shape[1])
    return (scales[:, group] * (codes - zeros[:, group])).astype(np.float32)
