"""Sums XᵀX on the tensors' own device, with held-out rows apart: what a client with GPUs sends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from certiq.errors import FieldViolation, InvalidArgument
from certiq.torch.finite import not_finite

# One float32 product takes so many rows: over so few its error stays below 1e-6 of sqrt(H_ii H_jj),
# which is what the service promises for its own sums; the products are added up in float64.
PRODUCT_ROWS = 256
_MASK = (1 << 64) - 1


def held_out_hash(stream_id: str) -> int:
    """FNV-1a, 64 bits."""
    value = 0xCBF29CE484222325
    for byte in stream_id.encode():
        value = ((value ^ byte) * 0x100000001B3) & _MASK
    return value


@lru_cache(maxsize=65536)
def is_held_out_block(stream_hash: int, block: int, fraction: float) -> bool:
    """True: a stream's block is held out, by the rule of QuantizeHeader.held_out_fraction (V1).

    Stratum s gives up block floor((s + u_s) / fraction), u_s being a hash of stream and s: the
    split is the one the server makes when the rows themselves are sent.
    """
    if fraction <= 0:
        return False
    first, last = int(block * fraction), int((block + 1) * fraction)
    return any(
        int((stratum + _unit(stream_hash, stratum)) // fraction) == block
        for stratum in range(first, last + 1)
    )


def _unit(stream_hash: int, stratum: int) -> float:
    x = (stream_hash + stratum * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return float((x ^ (x >> 31)) >> 11) * 2.0**-53


@dataclass
class Portion:
    """Sums of the rows of one portion: XᵀX [N, N] float64 and how many rows there are."""

    gram: torch.Tensor
    tokens: int = 0


class GramAccumulator:
    """XᵀX of one stream, the rows to hold out kept apart.

    Where the device has no float64 (MPS) the sums are kept on the CPU.
    """

    def __init__(
        self,
        features: int,
        device: torch.device,
        *,
        stream_id: str,
        held_out_fraction: float,
        block_rows: int,
    ) -> None:
        home = torch.device("cpu") if device.type == "mps" else device
        self.fit = Portion(torch.zeros(features, features, dtype=torch.float64, device=home))
        self.held_out = Portion(torch.zeros_like(self.fit.gram)) if held_out_fraction > 0 else None
        self._home = home
        self._hash = held_out_hash(stream_id)
        self._fraction = held_out_fraction
        self._block_rows = block_rows
        self._rows = 0

    def add(self, x: torch.Tensor) -> None:
        """Rows [tokens, N] in the stream's order, of any floating dtype."""
        start = 0
        while start < x.shape[0]:
            block, within = divmod(self._rows, self._block_rows)
            take = min(self._block_rows - within, x.shape[0] - start)
            portion = self.fit
            if self.held_out is not None and is_held_out_block(self._hash, block, self._fraction):
                portion = self.held_out
            self._add_to(portion, x[start : start + take])
            start += take
            self._rows += take

    def _add_to(self, portion: Portion, rows: torch.Tensor) -> None:
        before = self._rows
        for piece in rows.split(PRODUCT_ROWS):
            values = piece.float()
            with _full_precision(values.device):
                product = values.t() @ values
            if not bool(torch.isfinite(product).all()):
                raise _refused(piece, before)
            portion.gram += product.to(self._home, torch.float64)
            before += piece.shape[0]
        portion.tokens += rows.shape[0]


def _refused(rows: torch.Tensor, first_row: int) -> InvalidArgument:
    """What is wrong with rows whose product is not finite, in the service's words."""
    bad = not_finite(rows, first_row)
    if bad is not None:
        reason = f"expected finite values within float32's range, got {bad}"
    else:
        row, column = divmod(int(rows.abs().argmax()), rows.shape[1])
        reason = (
            "expected values whose sums of squares stay within float32's range, got "
            f"{float(rows[row, column])} at row {first_row + row}, column {column}"
        )
    return InvalidArgument(f"x: {reason}", violations=[FieldViolation("x", reason)])


class _full_precision:  # noqa: N801 - reads as a word of the language
    """Float32 products in float32, also where TF32 or bfloat16 passes are allowed, and under
    autocast."""

    def __init__(self, device: torch.device) -> None:
        self._autocast = torch.autocast(device.type, enabled=False)

    def __enter__(self) -> None:
        self._precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        self._autocast.__enter__()

    def __exit__(self, *error: object) -> None:
        self._autocast.__exit__(*error)
        torch.set_float32_matmul_precision(self._precision)
