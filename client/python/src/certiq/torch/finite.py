"""Where a tensor is not finite, in words: what the service would say, before anything is sent."""

from __future__ import annotations

import torch


def not_finite(x: torch.Tensor, first_row: int = 0) -> str | None:
    """Its first value that is NaN, infinite or beyond float32, and where, such as "nan at row 3,
    column 4"; None where there is none. Rows of a matrix count from `first_row`; tensors of other
    dimensions have an index. Types that are no floating point numbers are finite.
    """
    if not x.is_floating_point() or x.numel() == 0:
        return None
    if x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        # One pass that stores nothing: a NaN is both.
        low, high = torch.aminmax(x)
        if bool(torch.isfinite(low) & torch.isfinite(high)):
            return None
    try:
        bad = ~torch.isfinite(x)
    except (NotImplementedError, RuntimeError):
        # Types of eight bits.
        bad = ~torch.isfinite(x.float())
    if x.dtype == torch.float64:
        bad |= ~torch.isfinite(x.float())
    if not bool(bad.any()):
        return None
    flat = int(bad.reshape(-1).to(torch.uint8).argmax())
    value = float(x.reshape(-1)[flat])
    index: list[int] = []
    for size in reversed(x.shape):
        flat, at = divmod(flat, size)
        index.insert(0, at)
    if len(index) == 2:
        return f"{value} at row {first_row + index[0]}, column {index[1]}"
    return f"{value} at index {index}"
