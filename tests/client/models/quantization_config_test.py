"""What config.json says about mixed schemes, asked of the libraries that read it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from certiq import Spec
from certiq.model.errors import UsageError
from certiq.model.quantization_config import (
    compressed_tensors,
    dequantize_reads,
    gptq,
    quantization_config,
)
from certiq.model.siblings import Scheme, experts_of
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.utils.match import is_match
from torch import nn
from transformers.integrations.compressed_tensors import get_dense_scheme, get_experts_scheme

FOUR = Spec(bits=4, group_size=64, format="compressed_tensors")
EIGHT = replace(FOUR, bits=8)
ROWS = replace(FOUR, bits=8, group_size=0, symmetric=False)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# vLLM's, of its models' packed_modules_mapping.
FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
}


def llama(layers: int = 12, prefix: str = "model") -> list[str]:
    return [
        f"{prefix}.layers.{layer}.{part}.{own}"
        for layer in range(layers)
        for part, all_own in (("self_attn", ATTENTION), ("mlp", MLP))
        for own in all_own
    ]


def moe(layers: int = 3, experts: int = 4, projections: Iterable[str] = MLP) -> list[str]:
    return [
        f"model.layers.{layer}.{own}"
        for layer in range(layers)
        for own in (
            *(f"self_attn.{own}" for own in ATTENTION),
            "mlp.gate",
            *(f"mlp.shared_experts.{own}" for own in MLP),
            *(f"mlp.experts.{e}.{own}" for e in range(experts) for own in projections),
        )
    ]


def schemes_of(
    names: Iterable[str], *rules: tuple[str, Spec | None]
) -> tuple[dict[str, Spec], list[str]]:
    """Those quantized and those left float; the last rule that matches wins."""
    found: dict[str, Spec | None] = {}
    for name in names:
        found[name] = next((spec for rule, spec in rules[::-1] if re.search(rule, name)), FOUR)
    schemes = {name: spec for name, spec in found.items() if spec is not None}
    return schemes, [name for name in found if name not in schemes]


def tree(names: Iterable[str], embeddings: Iterable[str] = ()) -> nn.Module:
    root = nn.Module()
    for name in names:
        *parents, own = name.split(".")
        at = root
        for parent in parents:
            if not hasattr(at, parent):
                at.add_module(parent, nn.Module())
            at = at.get_submodule(parent)
        kind = nn.Embedding if name in set(embeddings) else nn.Linear
        at.add_module(own, kind(128, 128, device="meta"))
    return root


def assigned(
    config: Mapping[str, Any], names: Iterable[str], embeddings: Iterable[str] = ()
) -> dict[str, Scheme]:
    """What compressed-tensors itself makes of a model with these modules."""
    model = tree(names, embeddings)
    parsed = QuantizationConfig.model_validate(config)
    apply_quantization_config(model, parsed, show_progress=False)
    found = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            weights = scheme.weights
            found[name] = Scheme(weights.num_bits, weights.symmetric, weights.group_size or 0)
    return found


def wanted(schemes: Mapping[str, Spec]) -> dict[str, Scheme]:
    return {name: Scheme.of(spec) for name, spec in schemes.items()}


CASES = {
    "one scheme": (llama(), []),
    "a bit more in the first and last layers": (
        [*llama(), "lm_head"],
        [("lm_head", None), (r"layers\.(0|11)\.", EIGHT)],
    ),
    "by projection": (llama(), [(r"down_proj|v_proj", EIGHT), (r"layers\.3\.mlp", ROWS)]),
    "attention": ([*llama(), "lm_head"], [("self_attn|lm_head", EIGHT), (r"\.7\.", None)]),
    "experts": (moe(), [("self_attn|shared", EIGHT), (r"mlp\.gate$", None)]),
    "experts by layer": (moe(), [(r"layers\.1.*\.experts", EIGHT), (r"mlp\.gate$", None)]),
    "some experts": (
        moe(projections=("w1", "w2", "w3")),
        [
            (r"mlp\.gate$", None),
            (r"\.experts\.0\.", None),
            (r"layers\.1.*\.experts\.[12]\.w2", EIGHT),
        ],
    ),
    "a layer of experts left float": (moe(), [(r"layers\.2\.", None), (r"mlp\.gate$", None)]),
    "two stacks left float": ([*llama(2), *llama(2, "visual"), "a"], [(r"q_proj|o_proj", None)]),
    "two stacks with the same names": (
        [*llama(3, "model.language_model"), *llama(3, "model.vision"), "model.merger"],
        [("merger", EIGHT), ("vision", None), (r"language_model.*o_proj", EIGHT)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_compressed_tensors_gives_each_module_its_scheme(case: str) -> None:
    names, rules = CASES[case]
    schemes, floats = schemes_of(names, *rules)
    config = compressed_tensors(schemes, floats)
    assert assigned(config, names) == wanted(schemes)
    assert len(config["config_groups"]) == len(set(wanted(schemes).values()))


@pytest.mark.parametrize("case", CASES)
def test_float_modules_are_told_and_no_others(case: str) -> None:
    names, rules = CASES[case]
    schemes, floats = schemes_of(names, *rules)
    ignore = compressed_tensors(schemes, floats)["ignore"]
    assert [name for name in names if is_match(name, nn.Identity(), ignore)] == floats
    assert len(ignore) == len(set(ignore))


def test_one_scheme_is_told_as_it_always_was() -> None:
    schemes, floats = schemes_of([*llama(2), "lm_head"], ("lm_head", None))
    assert compressed_tensors(schemes, floats) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 64,
                    "dynamic": False,
                    "actorder": None,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def test_a_scale_a_row_is_a_strategy() -> None:
    schemes, floats = schemes_of(llama(1), (".", ROWS))
    weights = compressed_tensors(schemes, floats)["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"], weights["symmetric"]) == (
        *("channel", None, False),
    )


def test_lists_stay_short() -> None:
    schemes, floats = schemes_of(
        moe(layers=60, experts=128),
        ("self_attn", EIGHT),
        (r"mlp\.gate$", None),
        (r"layers\.59\.", None),
    )
    config = compressed_tensors(schemes, floats)
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert [len(own) for own in targets] == [4, 4]
    assert len(config["ignore"]) == 1 + len(ATTENTION) + len(MLP) + 1
    # Everything in its place is asked above; here a sample will do.
    for name, of in (("layers.7.mlp.experts.99.up_proj", 0), ("layers.58.self_attn.k_proj", 1)):
        found = [is_match(f"model.{name}", nn.Identity(), own) for own in targets]
        assert found == [number == of for number in range(2)]


class LinearBase(nn.Module):
    """vLLM's linears are of this class, which "Linear" matches."""


@pytest.mark.parametrize(
    "rules",
    [
        [],
        [(r"layers\.(0|2)\.self_attn", EIGHT)],
        [(r"self_attn", EIGHT), (r"layers\.1\.", ROWS)],
    ],
)
def test_vllm_finds_fused_linears_in_one_group(rules: list[tuple[str, Spec]]) -> None:
    schemes, floats = schemes_of(llama(3), *rules)
    groups = compressed_tensors(schemes, floats)["config_groups"].values()
    for layer in range(3):
        for fused, member in (("self_attn.qkv_proj", "q_proj"), ("mlp.gate_up_proj", "up_proj")):
            name = f"model.layers.{layer}.{fused}"
            found = [
                group["weights"]["num_bits"]
                for group in groups
                if is_match(name, LinearBase(), group["targets"], fused=FUSED)
            ]
            spec = schemes[f"{name.rpartition('.')[0]}.{member}"]
            assert found == [spec.bits]


def test_vllm_asks_for_experts_by_names_that_mixtral_has_not() -> None:
    names = moe(projections=("w1", "w2", "w3"))
    schemes, floats = schemes_of(names, ("self_attn|shared", EIGHT), (r"layers\.1\.mlp", None))
    config = compressed_tensors(schemes, floats)
    for layer in (0, 2):
        asked = f"model.layers.{layer}.mlp.experts.0.gate_proj"
        found = [
            is_match(asked, nn.Identity(), group["targets"], config["ignore"])
            for group in config["config_groups"].values()
        ]
        assert found == [True, False]
    assert is_match("model.layers.1.mlp.experts.0.gate_proj", nn.Identity(), config["ignore"])


def test_other_prefixes_than_the_checkpoints_are_found() -> None:
    """vLLM maps names of the checkpoint to its own, but leaves patterns alone."""
    schemes, floats = schemes_of(llama(3, "model.language_model"), ("self_attn", EIGHT))
    names = llama(3, "language_model.model")
    found = assigned(compressed_tensors(schemes, floats), names)
    assert found == {name: Scheme.of(EIGHT if "self_attn" in name else FOUR) for name in names}


@pytest.mark.parametrize("head", [FOUR, EIGHT])
def test_heads_and_embeddings(head: Spec) -> None:
    names = [*llama(2), "lm_head", "model.embed_tokens"]
    embeddings = ["model.embed_tokens"]
    schemes, floats = schemes_of(names, ("lm_head|embed", head))
    config = compressed_tensors(schemes, floats, embeddings=embeddings)
    assert assigned(config, names, embeddings) == wanted(schemes)
    (targets,) = (
        group["targets"]
        for group in config["config_groups"].values()
        if "lm_head" in group["targets"]
    )
    # vLLM's classes of heads are no linears, and its embeddings have no names in some models.
    assert {"lm_head", "model.embed_tokens", "Embedding"} <= set(targets)


def test_embeddings_of_two_schemes_are_found_by_name() -> None:
    names = [*llama(1), "model.embed_tokens", "model.per_layer"]
    schemes, floats = schemes_of(names, ("embed_tokens", EIGHT), ("per_layer", ROWS))
    config = compressed_tensors(schemes, floats, embeddings=names[-2:])
    assert assigned(config, names, names[-2:]) == wanted(schemes)
    groups = config["config_groups"].values()
    assert not any("Embedding" in group["targets"] for group in groups)


READS = {
    "one scheme": True,
    "a bit more in the first and last layers": False,
    "by projection": False,
    "attention": False,
    "experts": True,
    "experts by layer": False,
    "some experts": False,
    "a layer of experts left float": False,
    "two stacks left float": True,
    "two stacks with the same names": False,
}


@pytest.mark.parametrize("case", CASES)
def test_what_transformers_dequantizes_right(case: str) -> None:
    names, rules = CASES[case]
    schemes, floats = schemes_of(names, *rules)
    config = compressed_tensors(schemes, floats)
    parsed = QuantizationConfig.model_validate(config)
    taken = {
        True: get_experts_scheme(parsed).weights,
        False: get_dense_scheme(parsed).weights,
    }
    bits_taken = {
        name: Scheme(one.num_bits, one.symmetric, one.group_size or 0)
        for name in schemes
        for one in [taken[experts_of(name) is not None]]
    }
    float_experts = any(experts_of(name) for name in floats)
    assert (bits_taken == wanted(schemes) and not float_experts) == READS[case]
    assert dequantize_reads(config) == READS[case]
    assert dequantize_reads(config, schemes) == READS[case]
    assert dequantize_reads(config, schemes, floats) == READS[case]


def test_float_experts_are_found_in_one_tensor_a_layer() -> None:
    schemes, floats = schemes_of(moe(), (r"\.experts|mlp\.gate$", None))
    config = compressed_tensors(schemes, floats)
    assert not dequantize_reads(config, schemes, floats)
    fused = [
        f"model.layers.{layer}.mlp.experts.{own}"
        for layer in range(3)
        for own in ("gate_up_proj", "down_proj")
    ]
    assert dequantize_reads(compressed_tensors(schemes, fused), schemes, fused)


def test_experts_with_zero_points_are_not_dequantized() -> None:
    asymmetric = replace(FOUR, symmetric=False)
    schemes, floats = schemes_of(moe(), ("self_attn|shared", EIGHT), (r"\.experts", asymmetric))
    assert not dequantize_reads(compressed_tensors(schemes, floats))
    schemes, floats = schemes_of(moe(), (".", asymmetric))
    assert not dequantize_reads(compressed_tensors(schemes, floats), schemes)
    schemes, floats = schemes_of(llama(), (".", asymmetric))
    assert dequantize_reads(compressed_tensors(schemes, floats), schemes)


def test_a_module_of_no_group_is_named() -> None:
    schemes, floats = schemes_of(llama(2), ("self_attn", EIGHT))
    with pytest.raises(UsageError, match=r"expected one that targets model\.other, got none"):
        dequantize_reads(compressed_tensors(schemes, floats), ["model.other"])


# GPTQ.

G = {spec: replace(spec, format="gptq_v2") for spec in (FOUR, EIGHT, ROWS)}


def of_gptq(
    names: Iterable[str], rules: Iterable[tuple[str, Spec | None]]
) -> tuple[dict[str, Spec], list[str]]:
    schemes, floats = schemes_of(names, *rules)
    return {name: G[spec] for name, spec in schemes.items()}, floats


def looked_up(config: Mapping[str, Any], name: str) -> Scheme | None:
    """As GPTQModel and vLLM do: the first pattern that matches counts."""
    for pattern, override in config.get("dynamic", {}).items():
        if re.match(pattern[2:], name):
            return None if pattern.startswith("-:") else _scheme(config | override)
    return _scheme(config)


def _scheme(config: Mapping[str, Any]) -> Scheme:
    return Scheme(config["bits"], config["sym"], max(config["group_size"], 0))


def expected(
    schemes: Mapping[str, Spec], floats: Iterable[str], usual: Scheme
) -> dict[str, Scheme | None]:
    """Outside of blocks nothing is taken for packed, so nothing need be told there."""
    in_blocks = {name: None for name in floats if re.search(r"\.\d+\.", name)}
    outside = {name: usual for name in floats if name not in in_blocks}
    return {**wanted(schemes), **in_blocks, **outside}


@pytest.mark.parametrize("case", CASES)
def test_gptq_gives_each_module_its_scheme(case: str) -> None:
    names, rules = CASES[case]
    schemes, floats = of_gptq(names, rules)
    config = gptq(schemes, floats, desc_act=False)
    assert {name: looked_up(config, name) for name in names} == expected(
        schemes, floats, _scheme(config)
    )


# A process of its own, because GPTQModel changes transformers when it is imported.
ASK_GPTQMODEL = """
import json, sys
from gptqmodel.quantization.config import dynamic_get

asked = json.load(sys.stdin)
found = {
    case: {name: dynamic_get(dynamic, name) for name in names}
    for case, (dynamic, names) in asked.items()
}
print("\\n" + json.dumps(found))
"""


@pytest.mark.slow
def test_gptqmodel_finds_the_same() -> None:
    configs = {}
    asked = {}
    for case, (names, rules) in CASES.items():
        schemes, floats = of_gptq(names, rules)
        configs[case] = gptq(schemes, floats, desc_act=False)
        asked[case] = (configs[case].get("dynamic"), names)
    done = subprocess.run(
        [sys.executable, "-c", ASK_GPTQMODEL],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
    )
    for case, found in json.loads(done.stdout.splitlines()[-1]).items():
        config = configs[case]
        for name, override in found.items():
            one = None if override is False else _scheme(config | (override or {}))
            assert one == looked_up(config, name)


def test_one_scheme_of_gptq_is_told_as_it_always_was() -> None:
    schemes, floats = of_gptq([*llama(2), "lm_head"], [("lm_head", None)])
    assert gptq(schemes, floats, desc_act=True) == {
        "bits": 4,
        "group_size": 64,
        "desc_act": True,
        "sym": True,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["certiq"]},
    }


def test_floats_in_blocks_are_told_twice() -> None:
    schemes, floats = of_gptq([*llama(2), "lm_head"], [("lm_head", None), ("o_proj", None)])
    config = gptq(schemes, floats, desc_act=False)
    assert list(config["dynamic"].values()) == [{}]
    assert config["modules_in_block_to_quantize"] == [list(schemes)]


def test_mixed_schemes_alone_need_no_list_of_modules() -> None:
    schemes, floats = of_gptq(llama(2), [("o_proj", ROWS)])
    config = gptq(schemes, floats, desc_act=False)
    assert list(config["dynamic"].values()) == [{"bits": 8, "group_size": -1, "sym": False}]
    assert "modules_in_block_to_quantize" not in config


def test_a_quantized_head_is_told() -> None:
    schemes, floats = of_gptq([*llama(2), "lm_head"], [("lm_head", EIGHT)])
    config = gptq(schemes, floats, desc_act=False)
    assert config["lm_head"] is True
    assert looked_up(config, "lm_head") == Scheme.of(EIGHT)
    assert gptq(schemes, floats, desc_act=False, head="output")["lm_head"] is False


def test_vllm_finds_fused_linears_of_gptq_by_their_own_names() -> None:
    rules: list[tuple[str, Spec | None]] = [
        (r"layers\.0\.self_attn", EIGHT),
        (r"layers\.1\.mlp", None),
    ]
    schemes, floats = of_gptq(llama(3), rules)
    config = gptq(schemes, floats, desc_act=False)
    for layer, attention, mlp in ((0, EIGHT, FOUR), (1, FOUR, None), (2, FOUR, FOUR)):
        stem = f"model.layers.{layer}"
        assert looked_up(config, f"{stem}.self_attn.qkv_proj") == Scheme.of(attention)
        assert looked_up(config, f"{stem}.mlp.gate_up_proj") == (mlp and Scheme.of(mlp))
    experts = gptq(*of_gptq(moe(), [(r"layers\.1\.mlp", EIGHT)]), desc_act=False)
    assert looked_up(experts, "model.layers.1.mlp.experts") == Scheme.of(EIGHT)
    assert looked_up(experts, "model.layers.2.mlp.experts") == Scheme.of(FOUR)


# Either.


def test_the_format_chooses() -> None:
    names = llama(1)
    told = {
        format: quantization_config({name: Spec(format=format) for name in names}, [])
        for format in ("compressed_tensors", "gptq", "dense_bf16")
    }
    assert told["compressed_tensors"]["quant_method"] == "compressed-tensors"
    assert told["gptq"]["checkpoint_format"] == "gptq"
    assert (told["gptq"]["bits"], told["gptq"]["group_size"], told["gptq"]["sym"]) == (4, -1, True)
    assert told["dense_bf16"] is None
    assert quantization_config({}, names) is None


def test_what_no_checkpoint_can_be_is_refused() -> None:
    mixed = {"a": Spec(format="gptq"), "b": Spec(format="gptq_v2")}
    with pytest.raises(UsageError, match=r"format: expected one .* got gptq, gptq_v2"):
        quantization_config(mixed, [])
    with pytest.raises(UsageError, match=r"^wte: expected a linear"):
        quantization_config({"wte": Spec(format="gptq")}, [], embeddings=["wte"])
