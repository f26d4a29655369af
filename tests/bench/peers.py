"""Times one peer on one layer; compare.py runs it in the peers' virtual environment.

python peers.py PEER THREADS answers each line {"rows", "features", "tokens"} of its standard
input by a line {"statistics", "quantize"} in seconds, {"error", "nearest_error"}, or {"failure"}.
Between requests it is blocked in a read. The weights come out 4 bits, symmetric, one scale a row.

Shapes: W [rows, features], X and X_seen [tokens, features], H [features, features]; float32.
"""

import json
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch

BITS = 4
DAMPING = 0.01
BLOCK = 128
# Calibration sets are fed a sequence at a time.
SEQUENCE = 2048
# What the activations of a quantized model differ by, relative to their deviation.
MISMATCH = 0.1


@dataclass(frozen=True)
class Layer:
    rows: int
    features: int
    tokens: int

    @cached_property
    def W(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.rows, self.features, generator=generator) / math.sqrt(self.features)

    @cached_property
    def X(self) -> torch.Tensor:
        """Correlated features of unequal norms, rounded to float16."""
        generator = torch.Generator().manual_seed(2)
        rank = max(1, self.features // 8)
        mixing = torch.randn(rank, self.features, generator=generator) / math.sqrt(rank)
        X = torch.randn(self.tokens, rank, generator=generator) @ mixing
        X += 0.5 * torch.randn(self.tokens, self.features, generator=generator)
        X *= torch.exp(0.5 * torch.randn(self.features, generator=generator))
        return X.half().float()

    @cached_property
    def X_seen(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(self.tokens, self.features, generator=generator)
        return (self.X + MISMATCH * self.X.std(dim=0) * noise).half().float()

    @cached_property
    def outputs(self) -> torch.Tensor:
        return self.X @ self.W.T

    def error(self, Q: torch.Tensor, X: torch.Tensor) -> float:
        return float((self.outputs - X @ Q.T).norm() / self.outputs.norm())


class Clock:
    """Seconds of each named phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


class Rounding:
    """Scales 2 max|w| / (2^b - 1), codes -2^(b-1) ... 2^(b-1) - 1."""

    def __init__(self, W: torch.Tensor) -> None:
        self.lowest, self.highest = -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1
        self.scales = 2 * W.abs().amax(dim=1, keepdim=True) / (2**BITS - 1)

    def nearest(self, w: torch.Tensor) -> torch.Tensor:
        """Of columns."""
        return self.scales * torch.clamp(torch.round(w / self.scales), self.lowest, self.highest)


def gptq_torch(layer: Layer, clock: Clock) -> torch.Tensor:
    """Arxiv 2210.17323 as it is usually run in torch, with no bookkeeping of losses."""
    with clock.phase("statistics"):
        H = torch.zeros(layer.features, layer.features)
        for count, X in enumerate(layer.X.split(SEQUENCE), start=1):
            H *= (count - 1) / count
            x = math.sqrt(2 / count) * X.T
            H += x @ x.T
    with clock.phase("quantize"):
        W = layer.W.clone()
        grid = Rounding(W)
        H.diagonal().add_(DAMPING * H.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
        U = torch.linalg.cholesky(inverse, upper=True)
        Q = torch.zeros_like(W)
        for start in range(0, layer.features, BLOCK):
            end = min(start + BLOCK, layer.features)
            block = W[:, start:end].clone()
            errors = torch.zeros_like(block)
            corner = U[start:end, start:end]
            for i in range(end - start):
                w = block[:, i : i + 1]
                q = grid.nearest(w)
                error = (w - q) / corner[i, i]
                block[:, i:] -= error @ corner[i : i + 1, i:]
                Q[:, start + i] = q[:, 0]
                errors[:, i] = error[:, 0]
            W[:, end:] -= errors @ U[start:end, end:]
    return Q


def llmcompressor_gptq(layer: Layer, clock: Clock) -> torch.Tensor:
    """Features in their natural order, as with actorder=None."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq import gptq_quantize, helpers

    module = torch.nn.Linear(layer.features, layer.rows, bias=False)
    module.weight.data.copy_(layer.W)
    settings = QuantizationArgs(num_bits=BITS, symmetric=True, strategy="channel", actorder=None)
    with clock.phase("statistics"):
        H = helpers.make_empty_hessian(module)
        samples = torch.zeros(())
        for X in layer.X.split(SEQUENCE):
            H, samples = helpers.accumulate_hessian(X, module, H, samples)
    with clock.phase("quantize"):
        least, most = module.weight.aminmax(dim=1, keepdim=True)
        scale, zero_point = calculate_qparams(least, most, settings)
        parameters = {"scale": scale, "zero_point": zero_point, "global_scale": None}
        batch = helpers.prepare_batch([module], [parameters], {module: H}, {module: samples})
        Q, _, fell_back = gptq_quantize.quantize_weight(
            *batch, quant_args=settings, blocksize=BLOCK, percdamp=DAMPING
        )
    if fell_back.any():
        raise RuntimeError("llmcompressor fell back to plain rounding")
    return Q[0]


def brevitas_layer(layer: Layer) -> torch.nn.Module:
    """Its scales stay those of the original weights: that is faster, too, than to follow them."""
    from brevitas.inject.enum import ScalingImplType
    from brevitas.nn import QuantLinear
    from brevitas.quant import Int8WeightPerChannelFloat

    linear = QuantLinear(
        layer.features,
        layer.rows,
        bias=False,
        weight_quant=Int8WeightPerChannelFloat,
        weight_bit_width=BITS,
        weight_scaling_impl_type=ScalingImplType.PARAMETER_FROM_STATS,
    )
    linear.weight.data.copy_(layer.W)
    linear.weight_quant.init_tensor_quant()
    linear.eval()
    # The first call fixes the scales.
    linear.quant_weight()
    return linear


class OneOfTwoInputs(torch.nn.Module):
    """Gives the layer the inputs of the float model while its quantizer is off."""

    def __init__(self, linear: torch.nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, X: torch.Tensor, X_seen: torch.Tensor) -> torch.Tensor:
        return self.linear(X_seen if self.linear.weight_quant.is_quant_enabled else X)


def brevitas_gptq(layer: Layer, clock: Clock) -> torch.Tensor:
    from brevitas.graph.gptq import gptq_mode

    model = torch.nn.Sequential(brevitas_layer(layer))
    with gptq_mode(model) as mode:
        with clock.phase("statistics"):
            for X in layer.X.split(SEQUENCE):
                mode.model(X)
        with clock.phase("quantize"):
            mode.update()
    return model[0].quant_weight().value


def brevitas_qronos(layer: Layer, clock: Clock) -> torch.Tensor:
    from brevitas.graph.gpfq import gpfq_mode
    from brevitas.graph.qronos import Qronos

    model = OneOfTwoInputs(brevitas_layer(layer))
    with gpfq_mode(model, algorithm_impl=Qronos) as mode:
        with clock.phase("statistics"):
            for X, X_seen in zip(
                layer.X.split(SEQUENCE), layer.X_seen.split(SEQUENCE), strict=True
            ):
                mode.model(X, X_seen)
        with clock.phase("quantize"):
            mode.update()
    return model.linear.quant_weight().value


@dataclass(frozen=True)
class Peer:
    run: Callable[[Layer, Clock], torch.Tensor]
    mismatched: bool = False


PEERS = {
    "gptq-torch": Peer(gptq_torch),
    "llmcompressor": Peer(llmcompressor_gptq),
    "brevitas-gptq": Peer(brevitas_gptq),
    "brevitas-qronos": Peer(brevitas_qronos, mismatched=True),
}


def check_on_grid(Q: torch.Tensor) -> None:
    """A row has at most 2^b values, up to rounding, and none is infinite."""
    if not torch.isfinite(Q).all():
        raise RuntimeError("the result is not finite")
    some = Q[:: max(1, len(Q) // 64)].sort(dim=1).values
    apart = some.diff(dim=1) > 1e-3 * some.abs().amax(dim=1, keepdim=True)
    levels = int(apart.sum(dim=1).max()) + 1
    if levels > 2**BITS:
        raise RuntimeError(f"a row of the result has {levels} values, not {2**BITS}")


def measure(peer: Peer, layer: Layer) -> dict[str, float]:
    """Raises where the result is no better than plain rounding."""
    X = layer.X_seen if peer.mismatched else layer.X
    clock = Clock()
    Q = peer.run(layer, clock)
    check_on_grid(Q)
    error = layer.error(Q, X)
    nearest_error = layer.error(Rounding(layer.W).nearest(layer.W), X)
    if not error < nearest_error:
        raise RuntimeError(f"error {error:.4f}, plain rounding has {nearest_error:.4f}")
    return clock.seconds | {"error": error, "nearest_error": nearest_error}


def main(arguments: list[str]) -> int:
    name, threads = arguments
    # Libraries may print; the answers keep the standard output to themselves.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Brevitas warns, and leaves the layer as it is, where a matrix cannot be factored.
    warnings.filterwarnings("error", message="Failed to compute")
    torch.set_num_threads(int(threads))
    torch.set_grad_enabled(False)

    # The first run of all loads code.
    measure(PEERS[name], Layer(64, 64, 256))
    print(json.dumps({"torch": torch.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer: dict[str, float | str] = dict(measure(PEERS[name], Layer(**json.loads(line))))
        except Exception as failure:
            traceback.print_exc()
            answer = {"failure": f"{type(failure).__name__}: {failure}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
