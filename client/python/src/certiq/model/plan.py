"""What a run will do, known and checked before the first forward."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from certiq.model.checkpoint_files import TensorInfo
from certiq.model.errors import UsageError
from certiq.model.levels import pattern_of
from certiq.model.lockstep import BlockStack
from certiq.model.naming import StoredLinear, outside_modules, stored_linears
from certiq.model.recipe import Recipe
from certiq.model.settings import PACKED, RunSettings
from certiq.model.siblings import disagreements
from certiq.model.source import ModelSource
from certiq.spec import Spec

# A smaller share of quantized weights is worth a warning.
EXPECTED_SHARE = 0.9
# transformers puts a list of modules in the place of this one where a checkpoint is packed, and
# vLLM reads the same names (transformers 5.24's MODULES_TO_PATCH_FOR_QUANTIZATION).
_PACKED_BY_EXPERT = {"compressed_tensors": ("Llama4TextExperts",)}
IGNORED = "ignored"
DENSE_DTYPES = {"dense_f32": "F32", "dense_f16": "F16", "dense_bf16": "BF16"}


@dataclass(frozen=True)
class Planned:
    """A linear that will be quantized."""

    linear: StoredLinear
    spec: Spec


@dataclass
class Plan:
    """Which linears are quantized how, and which stay float for what reason."""

    format: str
    quantized: dict[str, Planned] = field(default_factory=dict)
    """By their names in the model, in the order of the work."""
    outside: dict[str, Planned] = field(default_factory=dict)
    """Heads and embeddings that a rule asks for, as `quantized`."""
    linears: dict[str, StoredLinear] = field(default_factory=dict)
    """All of the blocks' linears by their names in the model."""
    floats: dict[str, str] = field(default_factory=dict)
    """Reasons by the checkpoint's names of modules and tensors."""
    float_modules: list[str] = field(default_factory=list)
    """All that loaders must not look for packed, by the names of modules and tensors."""
    joined: dict[str, list[StoredLinear]] = field(default_factory=dict)
    """Float experts that are written as one tensor, by the name of the model's parameter."""
    mixed: list[str] = field(default_factory=list)
    """The model's parameters of experts of which some are packed and some are not."""
    made: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)
    """Other float tensors that are written as the parameters that a converter makes of them: both
    names, by the first of the tensors."""
    weights: int = 0
    """Of the blocks, those that were ignored left out."""
    warnings: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the weights of the blocks that nobody asked to ignore, the part that is quantized."""
        done = sum(planned.linear.weights for planned in self.quantized.values())
        return done / self.weights if self.weights else 0.0

    def all(self) -> dict[str, Planned]:
        """`quantized` and `outside`."""
        return {**self.quantized, **self.outside}

    def specs(self) -> dict[str, Spec]:
        """By the checkpoint's names."""
        return {planned.linear.prefix: planned.spec for planned in self.all().values()}

    def embeddings(self) -> list[str]:
        """Those of `outside` that are tables, by the checkpoint's names."""
        return [own.linear.prefix for own in self.outside.values() if own.linear.embedding]

    def bytes(self) -> int:
        """What the quantized linears take in the checkpoint."""
        return sum(
            sum(info.bytes for info in result_tensors(planned).values())
            for planned in self.all().values()
        )

    def lines(self) -> Iterator[str]:
        """For people: linears that are alike are one line."""
        done = Counter(
            (pattern_of(own.linear.prefix), own.linear.rows, own.linear.features, _scheme(own.spec))
            for own in self.all().values()
        )
        for (pattern, rows, features, scheme), count in done.items():
            yield f"  {pattern}: {count} of [{rows}, {features}], {scheme}"
        left = Counter((pattern_of(name), reason) for name, reason in self.floats.items())
        for (pattern, reason), count in left.items():
            yield f"  {pattern}: {count} stay float: {reason}"
        yield (
            f"  {100 * self.share:.1f} % of the layers' weights are quantized, "
            f"to {self.bytes() / 1e6:,.3g} MB"
        )


def make_plan(
    source: ModelSource, stack: BlockStack, settings: RunSettings, recipe: Recipe
) -> Plan:
    """Raises UsageError, with all linears that are concerned, for what the format cannot hold and
    for a share of quantized weights below --min-share."""
    format = settings.spec.format or "dense_f32"
    plan = Plan(format)
    count = min(settings.blocks or len(stack), len(stack))
    inside = stored_linears(source, stack.name, list(stack.blocks))
    others = _parameters_with_others(source, inside)
    plan.linears = inside
    cannot: list[str] = []
    names = [own.prefix for own in inside.values()]
    for name, own in inside.items():
        if _index(name, stack.name) >= count:
            plan.floats[own.prefix] = "behind --layers"
            continue
        spec = recipe.spec_of(own.prefix)
        if spec is None:
            plan.floats[own.prefix] = IGNORED
            continue
        plan.weights += own.weights
        reason = own.float_because or _unreadable(own, format) or _among_others(own, format, others)
        if reason is not None:
            plan.floats[own.prefix] = reason
            continue
        refusal = _refusal(own, spec)
        if refusal is not None:
            cannot.append(f"{own.prefix} {refusal}")
            continue
        plan.quantized[name] = Planned(own, spec)
    outside = outside_modules(source, stack.name)
    names += [own.prefix for own in outside.values()]
    for name, own in outside.items():
        # A rule has to ask for these: few loaders take them packed.
        spec = recipe.spec_of(own.prefix) if recipe.chosen(own.prefix) else None
        if spec is None:
            if not own.embedding:
                plan.floats.setdefault(own.prefix, f"outside {stack.name}")
            continue
        refusal = own.float_because or _outside_refusal(own, spec) or _refusal(own, spec)
        if refusal is not None:
            cannot.append(f"{own.prefix} {refusal}")
            continue
        plan.outside[name] = Planned(own, spec)
    _add_unclaimed(plan, source, stack, inside, count, recipe)
    if cannot:
        raise UsageError(_refused(cannot))
    if not plan.quantized:
        raise UsageError("no linears to quantize: all are ignored or stay float")
    plan.float_modules = _float_modules(source, plan, {**inside, **outside})
    plan.joined, plan.mixed = _float_experts(plan, others)
    if plan.joined:
        plan.warnings.append(
            f"{pattern_of(min(plan.joined))}: experts that stay float are written as one tensor, "
            "since transformers (5.24) does not load them one by one in a packed checkpoint; vLLM "
            "is not known to read them so"
        )
    if plan.mixed:
        plan.warnings.append(
            f"{pattern_of(min(plan.mixed))}: transformers (5.24) does not load experts of which "
            "some stay float"
        )
    plan.made = _made_floats(source, plan)
    if plan.made:
        parameters = [name for names, _ in plan.made.values() for name in names]
        plan.warnings.append(
            f"{', '.join(dict.fromkeys(map(pattern_of, parameters)))}: float tensors that "
            "transformers (5.24) puts together or apart as it loads them are written so, since it "
            "drops them in a packed checkpoint; vLLM is not known to read them so"
        )
    for unmatched in recipe.unmatched(names):
        plan.warnings.append(f"{unmatched} matches no linear")
    if format in PACKED:
        plan.warnings += disagreements(names, plan.specs().get)
    _check_share(plan, settings)
    return plan


def _index(name: str, stack: str) -> int:
    return int(name.removeprefix(f"{stack}.").partition(".")[0])


def _unreadable(own: StoredLinear, format: str) -> str | None:
    """Why no loader would find a packed matrix of experts that the checkpoint has in one tensor."""
    if format not in PACKED:
        return None
    if own.within is not None:
        return (
            f"it is a part of {pattern_of(own.tensor or '')}, or in another order there, which no "
            f"reader of {format} takes packed; a dense format quantizes it"
        )
    if own.matrix is None or not own.together:
        return None
    if own.fused in _PACKED_BY_EXPERT.get(format, ()):
        return None
    names = own.prefix.rpartition(".")[2]
    plain = own.matrix.part not in ("even", "odd") and not own.matrix.transposed
    plain = plain and not own.matrix.stacked_rows
    if format.startswith("gptq") and plain and names.endswith("_proj"):
        # GPTQModel's defuser takes such experts apart before it loads.
        return None
    return (
        f"all experts are one tensor ({pattern_of(own.tensor or '')}), which no reader of {format} "
        "takes packed; a dense format quantizes them"
    )


def _parameters_with_others(
    source: ModelSource, linears: Mapping[str, StoredLinear]
) -> frozenset[str]:
    """Parameters of experts for which the checkpoint has more tensors than experts have linears."""
    claimed = {own.tensor for own in linears.values() if own.tensor}
    parameters = {own.parameter for own in linears.values() if own.matrix is not None}
    return frozenset(
        parameter
        for parameter in parameters
        if not claimed.issuperset(name for name, _ in source.names_of(parameter))
    )


def _among_others(own: StoredLinear, format: str, others: frozenset[str]) -> str | None:
    """Why an expert is not packed beside experts that are none."""
    if format != "compressed_tensors" or own.parameter not in others:
        return None
    return (
        "other experts of its layer have weights and no linear, and transformers drops what is not "
        "packed; a dense format quantizes it"
    )


def _outside_refusal(own: StoredLinear, spec: Spec) -> str | None:
    if own.embedding and spec.format in ("gptq", "gptq_v2"):
        return f"is an embedding, for which {spec.format} has no layout"
    return None


def _refusal(own: StoredLinear, spec: Spec) -> str | None:
    """Why the format cannot hold a linear, as the server would say it in the middle of the work."""
    bits, group, rows, features = spec.bits or 4, spec.group_size or 0, own.rows, own.features
    if spec.format in PACKED and group and features % group:
        return f"[{rows}, {features}]: groups of {group} do not divide its {features} features"
    if spec.format in ("gptq", "gptq_v2"):
        if features * bits % 32:
            return (
                f"[{rows}, {features}]: {spec.format} packs features into words of 32 bits, which "
                f"{features} x {bits} bits do not fill"
            )
        if rows * bits % 32:
            return (
                f"[{rows}, {features}]: {spec.format} packs the rows' zero points into words of 32 "
                f"bits, which {rows} x {bits} bits do not fill"
            )
    if spec.format == "compressed_tensors" and own.transposed:
        return "is a Conv1D, which compressed-tensors does not know: use gptq or gptq_v2"
    return None


def _refused(cannot: list[str]) -> str:
    shown = Counter(pattern_of(text) for text in cannot)
    listed = "; ".join(
        text if count == 1 else f"{text} ({count} of them)"
        for text, count in list(shown.items())[:8]
    )
    names = {pattern_of(text.split()[0]).rpartition(".")[2] for text in cannot}
    flags = " ".join(f"--ignore '{name}$'" for name in sorted(names))
    return f"these linears cannot be quantized so: {listed}. {flags} leaves them float"


def _add_unclaimed(
    plan: Plan,
    source: ModelSource,
    stack: BlockStack,
    linears: Mapping[str, StoredLinear],
    count: int,
    recipe: Recipe,
) -> None:
    """Weights of the blocks that belong to no linear."""
    claimed = {own.tensor for own in linears.values() if own.tensor}
    prefixes = {own.prefix for own in linears.values()}
    for index, block in enumerate(stack.blocks):
        if index >= count:
            break
        for name, parameter in block.named_parameters():
            if parameter.dim() < 2 or isinstance(_owner(block, name), nn.modules.conv._ConvNd):
                continue
            # Fused experts have their biases in one matrix.
            if name.endswith("bias"):
                continue
            sources = [tensor for tensor, _ in source.names_of(f"{stack.block_name(index)}.{name}")]
            sources = [tensor for tensor in sources if tensor not in claimed]
            if not sources:
                continue
            stored = [module_name(tensor) for tensor in sources]
            if any(own in plan.floats or own in prefixes for own in stored):
                continue
            ignored = all(recipe.spec_of(own) is None for own in stored)
            plan.floats |= dict.fromkeys(stored, IGNORED if ignored else "no linear")
            plan.weights += 0 if ignored else sum(source.files.info(own).values for own in sources)


def _owner(block: nn.Module, name: str) -> nn.Module:
    return block.get_submodule(name.rpartition(".")[0])


def module_name(tensor: str) -> str:
    """The module of a tensor: its own name where it is a parameter of another sort."""
    return tensor.removesuffix(".weight")


def _float_modules(
    source: ModelSource, plan: Plan, linears: Mapping[str, StoredLinear]
) -> list[str]:
    """Modules with matrices that stay float, by the checkpoint's names and, where they differ, by
    the model's."""
    planned = plan.all()
    replaced = {own.linear.tensor for own in planned.values()}
    quantized = {own.linear.prefix for own in planned.values()}
    embeddings = {
        tensor
        for name, module in source.model.named_modules()
        if isinstance(module, nn.Embedding)
        for tensor, _ in source.names_of(f"{name}.weight")
    }
    found: dict[str, None] = {}
    for name, own in linears.items():
        # Of experts in one tensor, those have names of their own that stay beside packed ones.
        if own.embedding or name in planned:
            continue
        if not own.together or own.tensor in replaced:
            found |= {own.prefix: None, name: None}
    for tensor in source.files.names():
        shape = source.files.info(tensor).shape
        if tensor in replaced or tensor in embeddings or len(shape) < 2:
            continue
        if len(shape) == 2 and tensor.endswith(".weight"):
            found[module_name(tensor)] = None
        elif len(shape) == 3 and not tensor.endswith(("conv1d.weight", "conv.weight")):
            module = tensor.removesuffix(".weight")
            # Where it is no module's weight, it belongs to one of fused experts.
            found[module if module != tensor else tensor.rpartition(".")[0]] = None
    return [name for name in found if name and name not in quantized]


def _float_experts(
    plan: Plan, others: frozenset[str]
) -> tuple[dict[str, list[StoredLinear]], list[str]]:
    """Experts that the checkpoint has one by one, by the model's parameter: those of which none is
    packed, and the parameters of which some are. transformers' loader of compressed-tensors takes
    what is one by one for packed."""
    of_parameter: dict[str, list[StoredLinear]] = defaultdict(list)
    if plan.format == "compressed_tensors":
        for own in plan.linears.values():
            if own.matrix is not None and not own.together:
                of_parameter[own.parameter].append(own)
    packed = {
        parameter: sum(own.name in plan.quantized for own in experts)
        for parameter, experts in of_parameter.items()
    }
    joined = {
        name: experts
        for name, experts in of_parameter.items()
        if packed[name] == 0 and name not in others
    }
    return joined, [name for name in packed if 0 < packed[name] < len(of_parameter[name])]


def _made_floats(source: ModelSource, plan: Plan) -> dict[str, tuple[list[str], list[str]]]:
    """Float tensors whose converter transformers' loader of compressed-tensors puts its unpacking
    in front of, which drops what is not packed (transformers 5.24's update_weight_conversions)."""
    if plan.format != "compressed_tensors":
        return {}
    packed = {planned.linear.tensor for planned in plan.quantized.values()}
    made: dict[str, tuple[list[str], list[str]]] = {}
    for parameters, tensors in source.made_of_weights().values():
        joined = any(name in plan.joined for name in parameters)
        if joined or packed.intersection(tensors):
            continue
        for name in parameters:
            # Under its own name it may be converted again.
            if source.is_converted(name) or source.places_of(name) is None:
                raise UsageError(
                    f"{source.path}: transformers (5.24) converts {tensors[0]} when it loads it, "
                    "and drops what it converts beside packed weights: expected a dense format"
                )
        made[tensors[0]] = (parameters, tensors)
    return made


def _check_share(plan: Plan, settings: RunSettings) -> None:
    if plan.share < settings.min_share:
        raise UsageError(
            f"{100 * plan.share:.1f} % of the layers' weights can be quantized, less than the "
            f"{100 * settings.min_share:g} % of --min-share: {_reasons(plan)}"
        )
    if plan.share < EXPECTED_SHARE:
        plan.warnings.append(
            f"only {100 * plan.share:.1f} % of the layers' weights are quantized: {_reasons(plan)}"
        )


def _reasons(plan: Plan) -> str:
    found = Counter(
        (pattern_of(name), reason)
        for name, reason in plan.floats.items()
        if reason not in (IGNORED, "behind --layers") and not reason.startswith("outside ")
    )
    return "; ".join(f"{name} ({reason})" for (name, reason), _ in found.most_common(4))


def _scheme(spec: Spec) -> str:
    grid = "symmetric" if spec.symmetric is not False else "asymmetric"
    scales = f"groups of {spec.group_size}" if spec.group_size else "a scale a row"
    return f"{spec.method or 'optq'} {spec.bits or 4} bits, {scales}, {grid}"


_SCALE_BYTES = {"f32": ("F32", 4), "f16": ("F16", 2), "bf16": ("BF16", 2), None: ("F32", 4)}


def result_tensors(planned: Planned) -> dict[str, TensorInfo]:
    """The tensors that a linear will have in the checkpoint, by role."""
    own, spec = planned.linear, planned.spec
    bits, rows, features = spec.bits or 4, own.rows, own.features
    groups = features // spec.group_size if spec.group_size else 1
    format = spec.format or "dense_f32"
    if format not in PACKED:
        return {"weight": TensorInfo(DENSE_DTYPES[format], (rows, features))}
    if format == "compressed_tensors":
        scale, _ = _SCALE_BYTES[spec.scale_dtype]
        found = {
            "weight_packed": TensorInfo("I32", (rows, -(-features * bits // 32))),
            "weight_scale": TensorInfo(scale, (rows, groups)),
            "weight_shape": TensorInfo("I64", (2,)),
        }
        if spec.symmetric is False:
            found["weight_zero_point"] = TensorInfo("I32", (-(-rows * bits // 32), groups))
        return found
    return {
        "qweight": TensorInfo("I32", (features * bits // 32, rows)),
        "qzeros": TensorInfo("I32", (groups, rows * bits // 32)),
        "scales": TensorInfo("F16", (groups, rows)),
        "g_idx": TensorInfo("I32", (features,)),
    }


def described(plan: Plan) -> dict[str, Any]:
    """For the report."""
    return {
        "share_quantized": plan.share,
        "predicted_bytes": plan.bytes(),
        "stay_float": dict(plan.floats),
        "warnings": list(plan.warnings),
    }
