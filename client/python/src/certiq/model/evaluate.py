"""How far the quantized model is from the float one, and both from the text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from certiq.model.errors import UsageError


@dataclass
class Agreement:
    """Sums over the predicted tokens of a text: each window's but the first and special ones."""

    tokens: int = 0
    loss: float = 0.0
    """Negative log likelihood of the text in the quantized model, nats."""
    float_loss: float = 0.0
    divergence: float = 0.0
    """KL(float || quantized) of the predicted distributions, nats."""
    same_first: int = 0
    """Positions where both models think the same token most likely."""
    flips: int = 0
    """Positions where one model is right about the next token and the other is not."""
    compared: bool = False

    @torch.no_grad()
    def add(
        self, ids: torch.Tensor, output: Any, float_output: Any | None, *, special: int = 0
    ) -> None:
        """One batch of windows [batch, positions], of which the first `special` tokens are no text;
        `float_output` None: only the text counts."""
        start = max(1, special)
        # Logits are large: there is one window at a time.
        for index in range(ids.shape[0]):
            logits = logits_of(output)[index, start - 1 : -1].float()
            following = ids[index, start:].to(logits.device)
            log_p = torch.log_softmax(logits, dim=-1)
            self.tokens += following.numel()
            self.loss -= _sum(log_p.gather(1, following[:, None]))
            if float_output is None:
                continue
            self.compared = True
            float_logits = logits_of(float_output)[index, start - 1 : -1].float().to(logits.device)
            float_log_p = torch.log_softmax(float_logits, dim=-1)
            self.float_loss -= _sum(float_log_p.gather(1, following[:, None]))
            self.divergence += _sum(
                torch.nn.functional.kl_div(log_p, float_log_p, reduction="none", log_target=True)
            )
            first, float_first = log_p.argmax(dim=-1), float_log_p.argmax(dim=-1)
            self.same_first += int((first == float_first).sum())
            self.flips += int(((first == following) != (float_first == following)).sum())

    def described(self) -> dict[str, Any]:
        """For the report: perplexities, and how the models differ where both were run."""
        found: dict[str, Any] = {
            "tokens": self.tokens,
            "quantized": _perplexity(self.loss, self.tokens),
            "float": _perplexity(self.float_loss, self.tokens) if self.compared else None,
        }
        if self.compared:
            found["kl_divergence"] = self.divergence / self.tokens
            found["top1_agreement"] = self.same_first / self.tokens
            found["flips"] = self.flips / self.tokens
        return found


def logits_of(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
        raise UsageError(
            f"{type(output).__name__} has no logits of tokens: expected a model that predicts them "
            "for --evaluation"
        )
    return logits


def _sum(values: torch.Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def _perplexity(loss: float, tokens: int) -> float:
    # Beyond a double's range a model is as bad as any.
    mean = loss / tokens
    return math.exp(mean) if mean < 700 else math.inf
