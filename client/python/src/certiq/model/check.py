"""The model run as this package runs it, on a short sequence, before anything depends on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from certiq.model.errors import UsageError
from certiq.model.levels import Level, levels_of, pattern_of
from certiq.model.lockstep import AtBlock, BlockStack, Finished, Forward
from certiq.model.source import ModelSource, model_class, quiet_bars
from certiq.torch.experts import take_experts_apart
from certiq.torch.taps import InputTap, Seen

# So many tokens show which linears share an input.
TOKENS = 64
# Both run in the same type; sums in another order differ by a few units of it, and depth multiplies
# that.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
# The whole model is compared where its float32 weights take no more than this part of the memory
# that is available.
_MEMORY_PART = 0.4


@dataclass(frozen=True)
class Checked:
    """What a short forward showed."""

    levels: list[list[Level]]
    """Of each block."""
    logits: str
    """How the logits were compared with transformers' own, or why not; for the report."""
    has_logits: bool = True
    """Of next tokens, by which their prediction is measured: an encoder sees those."""


def check_model(
    source: ModelSource,
    stack: BlockStack,
    ids: torch.Tensor,
    wanted: Callable[[int, nn.Module], Mapping[str, nn.Module]],
    *,
    sequential: bool,
    compare: bool = True,
) -> Checked:
    """Runs `ids` [1, positions] through the float model block by block. The shell must be loaded.

    `wanted(index, block)` are the linears to quantize of a block. UsageError where blocks do not
    run one after another, once each, and where the logits are not transformers' own. These take
    the whole model in memory; unless `compare` they are left out.
    """
    short = ids[:1, :TOKENS].to(source.device)
    forward = Forward(stack.model, short, "check")
    levels: list[list[Level]] = []
    several: list[str] = []
    try:
        with torch.no_grad(), stack.entered():
            stop = forward.advance()
            for index in range(len(stack)):
                _expect(stop, index, stack)
                block = source.load_block(stack.blocks, stack.name, index)
                apart = take_experts_apart(block)
                linears = dict(wanted(index, block))
                stack.set_block(index, {"check": block}.__getitem__)
                uses = _Uses(linears)
                again = _SeveralInputs(linears)
                with InputTap(linears, lambda name, rows: None) as tap, again, uses:
                    stop = forward.advance()
                several += [f"{stack.block_name(index)}.{name}" for name in again.names()]
                reached = {name for group in tap.groups.values() for name in group.members}
                _expect_calls(stack.block_name(index), uses.seen - reached)
                groups = {name: group.members for name, group in tap.groups.items()}
                levels.append(levels_of(list(linears), groups, apart, sequential=sequential))
            _expect(stop, len(stack), stack)
            stop = forward.advance()
        if several:
            raise _reads_several(stack, several)
        if not isinstance(stop, Finished):
            raise _other_order(stop, len(stack), stack)
        logits = getattr(stop.output, "logits", None)
        return Checked(
            levels,
            _compare(source, short, stop.output, compare=compare),
            isinstance(logits, torch.Tensor)
            and logits.shape[:2] == short.shape
            and not type(stack.model).__name__.endswith("MaskedLM"),
        )
    finally:
        forward.end()


class _Uses(TorchFunctionMode):
    """Which linears' weights any function of torch gets."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._names = {id(module.weight): name for name, module in linears.items()}
        self.seen: set[str] = set()

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        for value in (*arguments, *(keywords or {}).values()):
            name = self._names.get(id(value))
            if name is not None and getattr(function, "__name__", "") != "__get__":
                self.seen.add(name)
        return function(*arguments, **(keywords or {}))


def _expect_calls(block: str, uncalled: set[str]) -> None:
    if uncalled:
        name = min(uncalled)
        raise UsageError(
            f"{block}.{name}: its weight is read without calling the linear, so what it reads is "
            f"not seen: --ignore '{name.rpartition('.')[2]}$'"
        )


class _SeveralInputs:
    """Counts the inputs that linears read while it is entered."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        self._linears = linears
        self._first: dict[str, Seen] = {}
        self._again: dict[str, None] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> _SeveralInputs:
        for name, module in self._linears.items():
            self._handles.append(
                module.register_forward_pre_hook(
                    lambda _, arguments, name=name: self._read(name, arguments[0])
                )
            )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def names(self) -> list[str]:
        """Those that read more than one."""
        return list(self._again)

    def _read(self, name: str, x: torch.Tensor) -> None:
        if name not in self._first:
            self._first[name] = Seen(x)
        elif not self._first[name].same(x):
            self._again[name] = None


def _reads_several(stack: BlockStack, names: list[str]) -> UsageError:
    found = Counter(pattern_of(name) for name in names)
    listed = ", ".join(f"{name} ({count} of them)" for name, count in found.items())
    last = sorted({name.rpartition(".")[2] for name in names})
    return UsageError(
        f"{type(stack.model).__name__}: expected linears that read one input in a forward, got "
        f"several for {listed}; --ignore '({'|'.join(last)})$' leaves them float"
    )


def _expect(stop: object, index: int, stack: BlockStack) -> None:
    if stop != AtBlock(index):
        raise _other_order(stop, index, stack)


def _other_order(stop: object, index: int, stack: BlockStack) -> UsageError:
    came = f"block {stop.index}" if isinstance(stop, AtBlock) else "its end"
    expected = f"block {index}" if index < len(stack) else "its end"
    return UsageError(
        f"{type(stack.model).__name__}: its forward came to {came} of {stack.name} where "
        f"{expected} was expected: models whose blocks run once each, in order, are supported"
    )


def _compare(source: ModelSource, ids: torch.Tensor, output: Any, *, compare: bool) -> str:
    """The same ids through the model as transformers loads it."""
    ours = _outcome(output)
    if not bool(torch.isfinite(ours).all()):
        # The run itself says where values cease to be finite.
        return "not compared: not finite"
    if source.decoded_names():
        return "not compared: transformers runs the quantized model, not the decoded one"
    reason = "not asked for" if not compare else too_large(source)
    if reason is not None:
        return f"not compared: {reason}"
    theirs = _outcome(_run_whole(source, ids))
    difference = float((ours - theirs).abs().max())
    largest = float(theirs.abs().max())
    if not difference <= TOLERANCES[source.dtype] * largest:
        raise UsageError(
            f"{source.path}: run block by block it gives other logits than transformers' "
            f"{type(source.model).__name__}: they differ by {difference:.3g}, the largest is "
            f"{largest:.3g}"
        )
    return f"equal to transformers' own to {difference:.2g} of {largest:.2g}"


def too_large(source: ModelSource) -> str | None:
    """Why the whole float model is not held in memory to compare with; None where it can be."""
    size = 4 * sum(source.files.info(name).values for name in source.files.names())
    available = _available_bytes()
    if available is None or size <= _MEMORY_PART * available:
        return None
    return f"{size / 1e9:.1f} GB of float32 weights, {available / 1e9:.1f} GB of memory available"


def whole_model(source: ModelSource) -> Any:
    """The float model as transformers loads it, all of it in memory."""
    try:
        with quiet_bars():
            model = model_class(source.config).from_pretrained(
                str(source.folder), dtype=source.dtype, **source.arguments
            )
    except Exception as error:
        raise UsageError(
            f"{source.path}: transformers does not load it: {type(error).__name__}: {error}"
        ) from error
    return model.to(source.device).eval()


@torch.no_grad()
def _run_whole(source: ModelSource, ids: torch.Tensor) -> Any:
    return whole_model(source)(input_ids=ids)


def _outcome(output: Any) -> torch.Tensor:
    """Logits, or what a model without a head returns."""
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value.float()
    raise UsageError(
        f"{type(output).__name__}: expected logits or last_hidden_state, got {list(output)}"
    )


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None
