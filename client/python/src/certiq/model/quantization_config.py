"""The quantization_config of config.json: what tells loaders which modules are packed, and how."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from certiq.model.errors import UsageError
from certiq.model.siblings import Scheme, experts_of, fused_sets
from certiq.spec import Spec

# The first number in a name is the layer's: model.layers.3.self_attn.q_proj, transformer.h.0 ...
_LAYER = re.compile(r"(?P<stack>.+?)\.(?P<layer>\d+)\.(?P<own>.+)")
# An expert's number in what follows: mlp.experts.7.up_proj.
_EXPERT = re.compile(r"(?P<experts>(?:.+\.)?experts)\.(?P<expert>\d+)\.(?P<own>.+)")


def quantization_config(
    schemes: Mapping[str, Spec],
    floats: Sequence[str],
    *,
    desc_act: bool = False,
    embeddings: Collection[str] = (),
    head: str = "lm_head",
) -> dict[str, Any] | None:
    """By the specs' format; None for an ordinary checkpoint.

    `schemes` has the quantized modules, `floats` all others with a weight matrix, by their names
    in the checkpoint; `embeddings` are those of `schemes` that are no linears.
    """
    formats = {spec.format for spec in schemes.values()}
    if len(formats) > 1:
        raise UsageError(
            "format: expected one for all modules of a checkpoint, got "
            f"{', '.join(sorted(str(name) for name in formats))}"
        )
    if formats == {"compressed_tensors"}:
        return compressed_tensors(schemes, floats, embeddings=embeddings)
    if formats <= {"gptq", "gptq_v2"} and formats:
        if embeddings:
            raise UsageError(
                f"{min(embeddings)}: expected a linear, as GPTQ has no layout for embeddings, got "
                "an embedding: ignore it, or use compressed_tensors"
            )
        return gptq(schemes, floats, desc_act=desc_act, head=head)
    return None


def compressed_tensors(
    schemes: Mapping[str, Spec], floats: Sequence[str], *, embeddings: Collection[str] = ()
) -> dict[str, Any]:
    """A group of pack-quantized modules for each scheme, that of most modules first."""
    groups = _by_scheme(schemes)
    every = [*schemes, *floats]
    # vLLM finds an embedding by its class alone where it makes it without a name, and so do
    # llm-compressor's recipes; classes cannot tell two schemes of embeddings apart.
    by_class = len({Scheme.of(schemes[name]) for name in embeddings}) == 1
    config_groups = {}
    for number, (scheme, names) in enumerate(groups.items()):
        targets = (
            # An output head's class in vLLM is not a linear's, so it is named beside it.
            ["Linear", *(name for name in names if not _LAYER.fullmatch(name))]
            if len(groups) == 1
            else _targets(names, every)
        )
        if by_class and any(name in embeddings for name in names):
            targets.append("Embedding")
        config_groups[f"group_{number}"] = {
            "targets": targets,
            "weights": _weights(scheme),
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": _targets(floats, every),
        "kv_cache_scheme": None,
    }


def gptq(
    schemes: Mapping[str, Spec],
    floats: Sequence[str],
    *,
    desc_act: bool,
    head: str = "lm_head",
) -> dict[str, Any]:
    """The scheme of most modules, and `dynamic` for what differs from it.

    GPTQModel and vLLM read `dynamic`; transformers (optimum) does not, and so reads mixed schemes
    wrongly.
    """
    groups = _by_scheme(schemes)
    usual, *others = groups
    (checkpoint_format,) = {spec.format for spec in schemes.values()}
    return {
        "bits": usual.bits,
        "group_size": usual.group_size or -1,
        "desc_act": desc_act,
        "sym": usual.symmetric,
        "lm_head": head in schemes,
        "quant_method": "gptq",
        "checkpoint_format": checkpoint_format,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["certiq"]},
        **_dynamic({scheme: groups[scheme] for scheme in others}, schemes, floats),
    }


def _dynamic(
    others: Mapping[Scheme, list[str]], schemes: Mapping[str, Spec], floats: Sequence[str]
) -> dict[str, Any]:
    """Loaders of GPTQ take every linear of a block for packed in one way unless they are told
    otherwise: GPTQModel and vLLM what is not, transformers what is."""
    every = [*schemes, *floats]
    # vLLM looks a fused linear up by its own name (qkv_proj), which the checkpoint does not have.
    fused = {
        one.fused: one.members for one in fused_sets(every) if experts_of(one.members[0]) is None
    }

    def patterns(names: Sequence[str]) -> list[str]:
        own = set(names)
        whole = [name for name, members in fused.items() if own.issuperset(members)]
        exact, folded = _folded([*names, *whole], [*every, *fused])
        return [f"^{re.escape(name)}$" for name in exact] + folded

    left = [name for name in floats if _LAYER.fullmatch(name)]
    dynamic: dict[str, dict[str, Any]] = {f"-:{pattern}": {} for pattern in patterns(left)}
    for scheme, names in others.items():
        override = {
            "bits": scheme.bits,
            "group_size": scheme.group_size or -1,
            "sym": scheme.symmetric,
        }
        dynamic |= {f"+:{pattern}": override for pattern in patterns(names)}
    told: dict[str, Any] = {"dynamic": dynamic} if dynamic else {}
    if left:
        told["modules_in_block_to_quantize"] = [list(schemes)]
    return told


def dequantize_reads(
    config: Mapping[str, Any], names: Iterable[str] = (), floats: Iterable[str] | None = None
) -> bool:
    """Whether transformers with dequantize=True reads a compressed-tensors config right.

    It takes one group for all dense layers and one for all experts, gives the experts' codes no
    zero points, and finds no experts that are float and have a matrix each; float ones in one
    tensor a layer it does find (transformers 5.24, integrations/compressed_tensors.py).

    `names` and `floats` are the modules that are quantized and those that are not. Without `names`
    the targets have to tell, where "Linear" says nothing of experts; without `floats` any of
    `ignore` that is about experts counts.
    """
    if _float_experts(config["ignore"], floats):
        return False
    groups = list(config["config_groups"].values())
    experts = next((group for group in groups if _names_experts(group)), None)
    if experts is None:
        by_class = (group for group in groups if not all(map(_is_regex, group["targets"])))
        experts = next(by_class, groups[0])
    dense = next((group for group in groups if not _names_experts(group)), groups[0])
    used = [
        (_is_regex(target) and "experts" in target, group)
        for group in groups
        for target in group["targets"]
    ]
    used += [(experts_of(name) is not None, _group_of(name, groups)) for name in names]
    return all(
        group["weights"] == (experts if of_experts else dense)["weights"]
        and (group["weights"].get("symmetric", True) or not of_experts)
        for of_experts, group in used
    )


def _float_experts(ignore: Iterable[str], floats: Iterable[str] | None) -> bool:
    if floats is not None:
        return any(_EXPERT.fullmatch(name) for name in floats)
    return any(
        "experts" in entry if _is_regex(entry) else experts_of(entry) is not None
        for entry in ignore
    )


def _names_experts(group: Mapping[str, Any]) -> bool:
    return any(_is_regex(target) and "experts" in target for target in group["targets"])


def _is_regex(target: str) -> bool:
    return target.startswith("re:")


def _group_of(name: str, groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """As compressed-tensors has it: the name itself, then patterns, then the class."""
    ways: tuple[Callable[[str], bool], ...] = (
        lambda target: target == name,
        lambda target: _is_regex(target) and re.match(target[3:], name) is not None,
        lambda target: target == "Linear",
    )
    for matches in ways:
        for group in groups:
            if any(matches(target) for target in group["targets"]):
                return group
    raise UsageError(f"config_groups: expected one that targets {name}, got none")


def _by_scheme(schemes: Mapping[str, Spec]) -> dict[Scheme, list[str]]:
    """Names by scheme, the scheme of most modules first, then the one that came first."""
    groups: dict[Scheme, list[str]] = defaultdict(list)
    for name, spec in schemes.items():
        groups[Scheme.of(spec)].append(name)
    counts = Counter({scheme: len(names) for scheme, names in groups.items()})
    return {scheme: groups[scheme] for scheme, _ in counts.most_common()}


def _weights(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size or None,
        "dynamic": False,
        "actorder": None,
    }


def _targets(names: Sequence[str], every: Sequence[str]) -> list[str]:
    """Names and patterns ("re:") that find `names` and no other of `every`.

    transformers takes a group for the experts' if a pattern of it has the word "experts", which
    DeepSeek's shared_experts have, too: theirs is written with a class of one letter.
    """
    experts = [name for name in names if experts_of(name) is not None]
    exact, dense = _folded([name for name in names if experts_of(name) is None], every)
    without_layer, of_experts = _folded(experts, every)
    return [
        *exact,
        *(f"re:{pattern.replace('experts', 'expert[s]')}" for pattern in dense),
        *(f"re:{re.escape(name)}$" for name in without_layer),
        *(f"re:{pattern}" for pattern in of_experts),
    ]


def _folded(names: Sequence[str], every: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names without a layer's number, and patterns (of re.match) for those with one: together they
    find all of `names` and no other of `every`."""
    own = set(names)
    others = [name for name in every if name not in own]
    exact = [name for name in names if not _LAYER.fullmatch(name)]
    layers: dict[tuple[str, str], list[int]] = defaultdict(list)
    for stack, layer, inner in _without_experts(names, others):
        layers[stack, inner].append(layer)
    patterns = [
        _layers_pattern(stack, numbers, inner, others) for (stack, inner), numbers in layers.items()
    ]
    # Two stacks may share a pattern.
    return exact, list(dict.fromkeys(patterns))


def _layers_pattern(stack: str, layers: list[int], inner: str, others: Sequence[str]) -> str:
    """The most general that finds none of `others`: other programs than the one that wrote the
    checkpoint may have another prefix before the stack (vLLM's language_model.model.layers)."""
    last = re.escape(stack.rpartition(".")[2])
    candidates = [
        rf"{prefix}\.{number}\.{inner}$"
        for prefix, number in itertools.product(
            (rf"(.*\.)?{last}", re.escape(stack)), (r"\d+", _one_of(layers))
        )
    ]
    return next(
        (one for one in candidates if not any(re.match(one, name) for name in others)),
        candidates[-1],
    )


def _one_of(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    return f"({'|'.join(str(number) for number in sorted(numbers))})"


def _without_experts(names: Sequence[str], others: Sequence[str]) -> Iterable[tuple[str, int, str]]:
    """The stack, the layer and a pattern for what follows it, once for all experts of a layer.

    Experts that are all of `names` are found by the set's name, whatever a loader calls their
    projections: vLLM asks for experts.0.gate_proj where Mixtral has experts.0.w1.
    """
    mixed = {experts_of(name) for name in others}
    found: dict[tuple[str, int, str], None] = {}
    partly: dict[tuple[str, int, str, str], list[int]] = defaultdict(list)
    for name in names:
        match = _LAYER.fullmatch(name)
        if match is None:
            continue
        stack, layer, inner = match["stack"], int(match["layer"]), match["own"]
        experts = experts_of(inner)
        expert = _EXPERT.fullmatch(inner)
        if experts is not None and experts_of(name) not in mixed:
            found[stack, layer, rf"{re.escape(experts)}(\..*)?"] = None
        elif expert is not None:
            partly[stack, layer, expert["experts"], expert["own"]].append(int(expert["expert"]))
        else:
            found[stack, layer, re.escape(inner)] = None
    projections = {re.sub(r"(\.experts\.)\d+\.", r"\1", name) for name in others}
    for (stack, layer, experts, inner), numbers in partly.items():
        every = f"{stack}.{layer}.{experts}.{inner}" not in projections
        number = r"\d+" if every else _one_of(numbers)
        pattern = rf"{re.escape(experts)}\.{number}\.{re.escape(inner)}"
        found[stack, layer, pattern] = None
    return found
