"""Text to tokens: calibration sequences, evaluation windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from certiq.model.errors import UsageError


def read_token_ids(path: Path, tokenizer: Any) -> torch.Tensor:
    """The token ids of a UTF-8 file, without special tokens."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a text file in UTF-8: {error}") from error
    # A whole file is longer than any context; that warning is not for us.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def calibration_sequences(
    ids: torch.Tensor, count: int, length: int, tokenizer: Any, *, source: str
) -> torch.Tensor:
    """`count` sequences [count, length], evenly spaced over the ids.

    Encoders that end a sequence with special tokens ([CLS], [SEP]) get them, within `length`.
    """
    before, after = _frame(tokenizer) if _is_encoder(tokenizer) else ([], [])
    own = length - len(before) - len(after)
    if own < 1 or len(ids) < own:
        raise UsageError(
            f"{source}: expected at least {own} tokens for sequences of {length}, got {len(ids)}"
        )
    starts = [index * (len(ids) - own) // max(1, count - 1) for index in range(count)]
    rows = [[*before, *ids[start : start + own].tolist(), *after] for start in starts]
    return torch.tensor(rows, dtype=torch.int64)


def evaluation_windows(ids: torch.Tensor, tokens: int, window: int, *, source: str) -> torch.Tensor:
    """The first `tokens` tokens in consecutive windows [count, window]; the rest is left out."""
    count = min(tokens, len(ids)) // window
    if count < 1:
        raise UsageError(
            f"{source}: expected at least one window of {window} tokens, got {len(ids)}"
        )
    return ids[: count * window].reshape(count, window)


def _is_encoder(tokenizer: Any) -> bool:
    return tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text."""
    text = "a"
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    framed = tokenizer(text)["input_ids"]
    for start in range(len(framed) - len(own) + 1):
        if framed[start : start + len(own)] == own:
            return framed[:start], framed[start + len(own) :]
    raise UsageError(f"the tokenizer makes {framed} of {text!r}, in which {own} is not found")
