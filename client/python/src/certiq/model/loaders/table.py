"""What loaders ask for beyond the table of readers: one line a rule, with the release or the
source in which it was looked up, and the day.

Which formats, bits, grids and groups a reader takes at all is in proto/certiq/v1/readers.csv
(`certiq.readers`) and not repeated here. llama.cpp is no reader of these formats: its converter
dequantizes them, so all that is known of it stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from certiq.model.loaders.checkpoint import Checkpoint, Module, experts_of, in_block
from certiq.model.loaders.findings import Severity
from certiq.model.loaders.schemes import COMPRESSED, GPTQ, Scheme, is_table
from certiq.readers import Reader

DENSE = ("dense_f32", "dense_f16", "dense_bf16")

LLAMA_CPP = Reader(
    "llama.cpp",
    "convert_hf_to_gguf.py since November 2025",
    "2026-12-01",
    "of the architectures that it knows; packed weights are dequantized",
)

# Linears that loaders hold as one.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
# The names of those by the first of them.
FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj", "q_a_proj": "fused_qkv_a_proj"}
# Models whose linears are transformers' Conv1D.
CONV1D = ("gpt2",)

Place = tuple[str, str]
"""A module or file, and a sentence."""


@dataclass(frozen=True)
class Rule:
    """One line of the table."""

    reader: str
    versions: str
    checked: str
    formats: tuple[str, ...]
    severity: Severity
    source: str
    """Where that is known from."""
    check: Callable[[Checkpoint], Iterator[Place]]


# -- vLLM ------------------------------------------------------------------------------------------


def siblings_share_a_scheme(checkpoint: Checkpoint) -> Iterator[Place]:
    for members in sibling_sets(checkpoint):
        schemes = {name: scheme_of(checkpoint, name) for name in members}
        if len(set(schemes.values())) > 1:
            told = "; ".join(f"{_last(name)} {_said(own)}" for name, own in schemes.items())
            yield members[0], f"expected one scheme for all that are one matrix here, got {told}"


def dynamic_knows_fused_names(checkpoint: Checkpoint) -> Iterator[Place]:
    """vLLM looks expressions up by the fused linear's name."""
    gptq = checkpoint.gptq
    assert gptq is not None
    for first, *others in sibling_sets(checkpoint):
        schemes = {scheme_of(checkpoint, name) for name in (first, *others)}
        parent, _, last = first.rpartition(".")
        fused = f"{parent}.{FUSED[last]}"
        own = schemes.pop()
        # Those that differ are another rule's, and those that are float are told by the list.
        if schemes or own is None:
            continue
        if gptq.scheme_by_dynamic(fused) != own:
            yield (
                first,
                f"has {own} by dynamic: expected an expression there that matches {fused} too, "
                f"which is read with {_said(gptq.scheme_by_dynamic(fused))}",
            )


def lm_head_is_told(checkpoint: Checkpoint) -> Iterator[Place]:
    gptq = checkpoint.gptq
    assert gptq is not None
    for name in checkpoint.modules:
        if _last(name) == "lm_head" and not gptq.config.get("lm_head", False):
            yield name, "is packed: expected lm_head true in quantization_config, got false"


def experts_share_a_scheme(checkpoint: Checkpoint) -> Iterator[Place]:
    sets: dict[str, dict[Scheme | None, str]] = {}
    for name in _linears(checkpoint):
        experts = experts_of(name)
        if experts is not None:
            sets.setdefault(experts, {}).setdefault(scheme_of(checkpoint, name), name)
    for experts, schemes in sets.items():
        if len(schemes) > 1:
            told = "; ".join(f"{name} {_said(own)}" for own, name in schemes.items())
            yield experts, f"expected one scheme for all experts, got {told}"


def groups_divide_features(checkpoint: Checkpoint) -> Iterator[Place]:
    for module, scheme, _, features in _sized(checkpoint):
        if scheme.group_size and features % scheme.group_size:
            yield (
                module.name,
                f"expected features that groups of {scheme.group_size} divide, got {features}",
            )


def codes_fill_words(checkpoint: Checkpoint) -> Iterator[Place]:
    for module, scheme, rows, features in _sized(checkpoint):
        for side, count in (("rows", rows), ("features", features)):
            if count * scheme.bits % 32:
                yield (
                    module.name,
                    f"expected {side} whose codes of {scheme.bits} bits fill words of 32 bits, "
                    f"got {count}",
                )


def sizes_suit_marlin(checkpoint: Checkpoint) -> Iterator[Place]:
    sizes = {module.name: (rows, features) for module, _, rows, features in _sized(checkpoint)}
    for members in sibling_sets(checkpoint):
        if all(name in sizes for name in members):
            rows = sum(sizes[name][0] for name in members)
            sizes |= {name: (rows, sizes[name][1]) for name in members}
    # Those of experts are other kernels, with sizes of their own.
    slow = [
        name
        for name, (rows, features) in sizes.items()
        if (rows % 64 or features % 128) and not experts_of(name)
    ]
    if slow:
        yield (
            slow[0],
            "runs without the Marlin kernels, which want rows divisible by 64 and features by 128"
            + (f"; {len(slow) - 1} more like it" if len(slow) > 1 else ""),
        )


# -- transformers ----------------------------------------------------------------------------------


def dequantize_is_asked_for(checkpoint: Checkpoint) -> Iterator[Place]:
    cause = _why_dequantized(checkpoint)
    if cause is not None:
        yield (
            "config.json",
            f"{cause} load only with quantization_config=CompressedTensorsConfig(dequantize=True)",
        )


def experts_are_symmetric(checkpoint: Checkpoint) -> Iterator[Place]:
    for module, scheme, _, _ in _sized(checkpoint):
        if experts_of(module.name) and not scheme.symmetric:
            yield (
                module.name,
                "is an expert, whose zero points are not read: expected a symmetric grid",
            )
            return


def dense_layers_share_a_scheme(checkpoint: Checkpoint) -> Iterator[Place]:
    """With dequantize=True, one group's scheme serves all of them."""
    if needs_dequantizing(checkpoint):
        yield from _read_with_another(checkpoint, experts=False)


def experts_are_packed_together(checkpoint: Checkpoint) -> Iterator[Place]:
    """The packed ones are fused, and no float one beside them is found."""
    packed = {experts_of(name) for name in checkpoint.modules}
    for name in checkpoint.float_weights:
        experts = experts_of(name)
        if experts and name not in checkpoint.modules and experts in packed:
            yield experts, f"expected experts that are all packed or all float, got {name} float"
            return


def experts_have_their_groups_scheme(checkpoint: Checkpoint) -> Iterator[Place]:
    """They are fused, and one group's scheme serves all of them."""
    yield from _read_with_another(checkpoint, experts=True)


def _read_with_another(checkpoint: Checkpoint, *, experts: bool) -> Iterator[Place]:
    config = checkpoint.compressed
    assert config is not None
    group = _experts_group(config.groups) if experts else _dense_group(config.groups)
    used = config.groups[group][1]
    for module, scheme, _, _ in _sized(checkpoint):
        if bool(experts_of(module.name)) == experts and scheme != used:
            kind = "all experts"
            if not experts:
                kind = f"all dense layers, as {_why_dequantized(checkpoint)} are dequantized"
            yield module.name, f"has {scheme}, and is read with {used}: one scheme serves {kind}"


def blocks_tell_their_floats(checkpoint: Checkpoint) -> Iterator[Place]:
    """transformers does not read `dynamic`."""
    gptq = checkpoint.gptq
    assert gptq is not None
    kinds = {_last(name) for name in checkpoint.modules}
    for name in checkpoint.float_weights:
        if in_block(name) and _last(name) in kinds and gptq.listed(name):
            yield (
                name,
                "is float: expected modules_in_block_to_quantize, which names what is packed, "
                f"without it, got {'no list' if gptq.packed_in_blocks is None else 'it there'}",
            )


def packed_ones_are_in_blocks(checkpoint: Checkpoint) -> Iterator[Place]:
    for name in checkpoint.modules:
        if not in_block(name):
            yield name, "is packed: expected packed linears within blocks alone"


def bits_are_the_same(checkpoint: Checkpoint) -> Iterator[Place]:
    gptq = checkpoint.gptq
    assert gptq is not None
    for module, scheme, _, _ in _sized(checkpoint):
        if scheme != gptq.base:
            yield (
                module.name,
                f"has {scheme}: expected {gptq.base} as the rest, nothing else is read",
            )


def no_conv1d(checkpoint: Checkpoint) -> Iterator[Place]:
    if checkpoint.model_type in CONV1D:
        yield (
            "config.json",
            f"the linears of {checkpoint.model_type} are Conv1D: expected nn.Linear",
        )


def experts_are_no_linears(checkpoint: Checkpoint) -> Iterator[Place]:
    name = next((name for name in checkpoint.modules if experts_of(name)), None)
    if name is not None:
        yield name, "is an expert, which is kept in one tensor with the others: expected it float"


# -- GPTQModel -------------------------------------------------------------------------------------


def dynamic_tells_floats(checkpoint: Checkpoint) -> Iterator[Place]:
    gptq = checkpoint.gptq
    assert gptq is not None
    kinds = {_last(name) for name in checkpoint.modules}
    for name in checkpoint.float_weights:
        if in_block(name) and _last(name) in kinds and not gptq.excluded(name):
            yield name, 'is float: expected an expression "-:" in dynamic that matches it, got none'


def no_experts_of_mixtral(checkpoint: Checkpoint) -> Iterator[Place]:
    if checkpoint.model_type == "mixtral":
        yield from experts_are_no_linears(checkpoint)


def codes_of_3_bits_fill_words(checkpoint: Checkpoint) -> Iterator[Place]:
    """Of 2, 4 and 8 bits the last word may be filled up."""
    for module, scheme, rows, features in _sized(checkpoint):
        for side, count in (("rows", rows), ("features", features)):
            if scheme.bits == 3 and count % 32:
                yield module.name, f"expected {side} divisible by 32 with 3 bits, got {count}"


# -- llama.cpp -------------------------------------------------------------------------------------


def converter_unpacks_words(checkpoint: Checkpoint) -> Iterator[Place]:
    for module, scheme, _, _ in _sized(checkpoint):
        if scheme.bits not in (2, 4, 8):
            yield module.name, f"expected 2, 4 or 8 bits, got {scheme.bits}"
            return


def converter_wants_groups(checkpoint: Checkpoint) -> Iterator[Place]:
    for module, scheme, _, _ in _sized(checkpoint):
        if not scheme.group_size:
            yield module.name, "expected groups (strategy group), got a scale a row"
            return


def converter_wants_one_group(checkpoint: Checkpoint) -> Iterator[Place]:
    config = checkpoint.compressed
    assert config is not None
    if len(config.groups) != 1:
        yield "config.json", f"config_groups: expected one, got {len(config.groups)}"


def groups_are_of_neighbours(checkpoint: Checkpoint) -> Iterator[Place]:
    for name in sorted(checkpoint.reordered):
        yield name, "expected groups of neighbouring columns, got others (weight_g_idx)"


_CT_INTEGRATION = "transformers/integrations/compressed_tensors.py"
_OPTIMUM = "optimum/gptq/quantizer.py, convert_model"
_VLLM = "vllm/model_executor/layers/quantization"
_CONVERTER = "llama.cpp conversion/base.py at 00bd27a621f9, dequant_model"

RULES: tuple[Rule, ...] = (
    Rule(
        *("vLLM", "0.32", "2026-12-01", (COMPRESSED, *GPTQ), "error"),
        f"{_VLLM}/compressed_tensors/utils.py and utils/gptq_utils.py",
        siblings_share_a_scheme,
    ),
    Rule(
        *("vLLM", "0.32", "2026-12-01", GPTQ, "error"),
        f"{_VLLM}/utils/gptq_utils.py, get_dynamic_override",
        dynamic_knows_fused_names,
    ),
    Rule(
        *("vLLM", "0.32", "2026-12-01", GPTQ, "error"),
        f"{_VLLM}/utils/gptq_utils.py, get_linear_quant_method",
        lm_head_is_told,
    ),
    Rule(
        *("vLLM", "0.32", "2026-12-01", (COMPRESSED, *GPTQ), "error"),
        f"{_VLLM}/compressed_tensors/compressed_tensors_moe, get_moe_method; auto_gptq.py",
        experts_share_a_scheme,
    ),
    Rule(
        *("vLLM", "0.32", "2026-12-01", GPTQ, "error"),
        f"{_VLLM}/auto_gptq.py, create_weights: the number of groups is rounded down",
        groups_divide_features,
    ),
    Rule(
        *("vLLM", "0.32", "2026-12-01", GPTQ, "error"),
        f"{_VLLM}/auto_gptq.py, create_weights: packed sizes are rounded down",
        codes_fill_words,
    ),
    Rule(
        *("vLLM", "0.32", "2026-12-01", (COMPRESSED, *GPTQ), "warning"),
        f"{_VLLM}/utils/marlin_utils.py, verify_marlin_supports_shape",
        sizes_suit_marlin,
    ),
    Rule(
        *("transformers", "5.24", "2026-12-01", (COMPRESSED,), "warning"),
        "tried: compressed-tensors 0.20 makes no room for packed zero points, and takes the weight "
        "away that transformers asks an embedding for",
        dequantize_is_asked_for,
    ),
    Rule(
        *("transformers", "5.24", "2026-12-01", (COMPRESSED,), "error"),
        f"{_CT_INTEGRATION}, convert; tried",
        experts_are_symmetric,
    ),
    Rule(
        *("transformers", "5.24", "2026-12-01", (COMPRESSED,), "error"),
        f"{_CT_INTEGRATION}, convert; tried",
        experts_are_packed_together,
    ),
    Rule(
        *("transformers", "5.24", "2026-12-01", (COMPRESSED,), "error"),
        f"{_CT_INTEGRATION}, get_dense_scheme; tried",
        dense_layers_share_a_scheme,
    ),
    Rule(
        *("transformers", "5.24", "2026-12-01", (COMPRESSED,), "error"),
        f"{_CT_INTEGRATION}, get_experts_scheme",
        experts_have_their_groups_scheme,
    ),
    Rule(
        *("transformers", "5.24", "2026-12-01", (COMPRESSED,), "error"),
        "compressed-tensors 0.20 knows nn.Linear and nn.Embedding",
        no_conv1d,
    ),
    Rule(
        *("transformers", "5.24", "2026-12-01", GPTQ, "error"), _OPTIMUM, blocks_tell_their_floats
    ),
    Rule(
        *("transformers", "5.24", "2026-12-01", GPTQ, "error"), _OPTIMUM, packed_ones_are_in_blocks
    ),
    Rule(*("transformers", "5.24", "2026-12-01", GPTQ, "error"), _OPTIMUM, bits_are_the_same),
    Rule(
        *("transformers", "5.24", "2026-12-01", GPTQ, "error"),
        "tried: it initializes a Conv1D's weight, which a packed one has not",
        no_conv1d,
    ),
    Rule(
        *("transformers", "5.24", "2026-12-01", GPTQ, "error"),
        f"{_OPTIMUM}: it makes linears packed, and experts are none",
        experts_are_no_linears,
    ),
    Rule(
        *("transformers", "5.24", "2026-12-01", GPTQ, "error"),
        "tried: it uses GPTQModel's kernels",
        codes_of_3_bits_fill_words,
    ),
    Rule(
        *("compressed-tensors", "0.20", "2026-12-01", (COMPRESSED,), "error"),
        "compressed-tensors 0.20 knows nn.Linear and nn.Embedding",
        no_conv1d,
    ),
    Rule(
        *("GPTQModel", "7.7", "2026-12-01", GPTQ, "error"),
        "gptqmodel/quantization/config.py, dynamic_get",
        dynamic_tells_floats,
    ),
    Rule(
        *("GPTQModel", "7.7", "2026-12-01", GPTQ, "error"),
        "gptqmodel/models/loader.py",
        lm_head_is_told,
    ),
    Rule(
        *("GPTQModel", "7.7", "2026-12-01", GPTQ, "error"),
        "gptqmodel/nn_modules/qlinear/__init__.py, dequantize_weight; tried",
        codes_of_3_bits_fill_words,
    ),
    Rule(*("GPTQModel", "7.7", "2026-12-01", GPTQ, "error"), "tried", no_experts_of_mixtral),
    Rule(
        *("llama.cpp", LLAMA_CPP.versions, "2026-12-01", (COMPRESSED, *GPTQ), "error"),
        f"{_CONVERTER}: 3 bits are not implemented, others would be read as if codes did not "
        "straddle words",
        converter_unpacks_words,
    ),
    Rule(
        *("llama.cpp", LLAMA_CPP.versions, "2026-12-01", (COMPRESSED,), "error"),
        _CONVERTER,
        converter_wants_groups,
    ),
    Rule(
        *("llama.cpp", LLAMA_CPP.versions, "2026-12-01", (COMPRESSED,), "error"),
        _CONVERTER,
        converter_wants_one_group,
    ),
    Rule(
        *("llama.cpp", LLAMA_CPP.versions, "2026-12-01", (COMPRESSED,), "error"),
        f"{_CONVERTER}: it does not read weight_g_idx",
        groups_are_of_neighbours,
    ),
    Rule(
        *("llama.cpp", LLAMA_CPP.versions, "2026-12-01", GPTQ, "error"),
        "llama.cpp conversion/gpt2.py at 5535795beecf transposes what is [outputs, inputs] already",
        no_conv1d,
    ),
    Rule(
        *("llama.cpp", LLAMA_CPP.versions, "2026-12-01", GPTQ, "error"),
        f"{_CONVERTER}: bits are those of the whole file",
        bits_are_the_same,
    ),
    Rule(
        *("llama.cpp", LLAMA_CPP.versions, "2026-12-01", GPTQ, "error"),
        f"{_CONVERTER}: zero points are reshaped to the scales' shape",
        codes_fill_words,
    ),
)


def needs_dequantizing(checkpoint: Checkpoint) -> bool:
    """transformers loads it with CompressedTensorsConfig(dequantize=True) only."""
    return _why_dequantized(checkpoint) is not None


def _why_dequantized(checkpoint: Checkpoint) -> str | None:
    if checkpoint.compressed is None:
        return None
    for module, scheme, _, _ in _sized(checkpoint):
        # Experts are dequantized in any event.
        if not scheme.symmetric and not experts_of(module.name):
            return "grids with zero points"
        if is_table(module.name):
            return "packed embeddings"
    return None


def sibling_sets(checkpoint: Checkpoint) -> Iterator[list[str]]:
    """Linears, packed or float, that loaders hold as one matrix."""
    names = set(_linears(checkpoint))
    for first, *others in SIBLINGS:
        for name in sorted(names):
            parent, _, last = name.rpartition(".")
            # The experts of a layer are one set.
            if last != first or experts_of(name):
                continue
            members = [f"{parent}.{other}" for other in (first, *others)]
            present = [member for member in members if member in names]
            if len(present) > 1:
                yield present


def scheme_of(checkpoint: Checkpoint, name: str) -> Scheme | None:
    module = checkpoint.modules.get(name)
    return None if module is None else module.scheme


def _linears(checkpoint: Checkpoint) -> Iterator[str]:
    yield from checkpoint.modules
    for name in checkpoint.float_weights:
        if name not in checkpoint.modules:
            yield name


def _sized(checkpoint: Checkpoint) -> Iterator[tuple[Module, Scheme, int, int]]:
    for module in checkpoint.modules.values():
        if module.scheme is not None and module.rows is not None and module.features is not None:
            yield module, module.scheme, module.rows, module.features


def _dense_group(groups: list[tuple[list[str], Scheme]]) -> int:
    return next((i for i, (targets, _) in enumerate(groups) if not _of_experts(targets)), 0)


def _experts_group(groups: list[tuple[list[str], Scheme]]) -> int:
    """The one whose expressions name experts, or else the first with a name or a class."""
    for fits in (_of_experts, lambda targets: any(not t.startswith("re:") for t in targets)):
        for index, (targets, _) in enumerate(groups):
            if fits(targets):
                return index
    return 0


def _of_experts(targets: list[str]) -> bool:
    return any(target.startswith("re:") and "experts" in target for target in targets)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _said(scheme: Scheme | None) -> str:
    return "float" if scheme is None else str(scheme)
