"""Linears that loaders fuse, by the names that checkpoints have."""

from dataclasses import replace

import pytest
from certiq import Spec
from certiq.model.recipe import Recipe
from certiq.model.siblings import Scheme, disagreements, experts_of, fused_sets

SPEC = Spec(bits=4, group_size=64, format="compressed_tensors")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def names(prefix: str, *own: str) -> list[str]:
    return [f"{prefix}.{name}" for name in own]


def sets(*of: list[str]) -> dict[str, tuple[str, ...]]:
    every = [name for part in of for name in part]
    return {fused.fused: fused.members for fused in fused_sets(every)}


def test_llama() -> None:
    attention = names("model.layers.0.self_attn", *ATTENTION)
    mlp = names("model.layers.0.mlp", *MLP)
    other = names("model.layers.1.self_attn", *ATTENTION)
    assert sets(attention, mlp, other, ["lm_head", "model.embed_tokens"]) == {
        "model.layers.0.self_attn.qkv_proj": tuple(attention[:3]),
        "model.layers.0.mlp.gate_up_proj": tuple(mlp[:2]),
        "model.layers.1.self_attn.qkv_proj": tuple(other[:3]),
    }


def test_mixtral() -> None:
    experts = [
        f"model.layers.0.block_sparse_moe.experts.{expert}.{own}"
        for expert in range(3)
        for own in ("w1", "w2", "w3")
    ]
    gate = ["model.layers.0.block_sparse_moe.gate"]
    assert sets(gate, experts) == {"model.layers.0.block_sparse_moe.experts": tuple(experts)}


def test_qwen3_moe_has_experts_a_layer_and_a_dense_layer_in_between() -> None:
    experts = {
        layer: [f"model.layers.{layer}.mlp.experts.{e}.{own}" for e in range(2) for own in MLP]
        for layer in (0, 2)
    }
    dense = names("model.layers.1.mlp", *MLP)
    assert sets(experts[0], dense, experts[2]) == {
        "model.layers.0.mlp.experts": tuple(experts[0]),
        "model.layers.1.mlp.gate_up_proj": tuple(dense[:2]),
        "model.layers.2.mlp.experts": tuple(experts[2]),
    }


def test_deepseek() -> None:
    attention = names(
        "model.layers.5.self_attn",
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    )
    shared = names("model.layers.5.mlp.shared_experts", *MLP)
    experts = [f"model.layers.5.mlp.experts.{e}.{own}" for e in range(2) for own in MLP]
    assert sets(attention, shared, experts) == {
        "model.layers.5.self_attn.fused_qkv_a_proj": (attention[0], attention[2]),
        "model.layers.5.mlp.shared_experts.gate_up_proj": tuple(shared[:2]),
        "model.layers.5.mlp.experts": tuple(experts),
    }
    # The Lite ones have a q_proj in q_a_proj's place, which is fused with nothing.
    assert sets(names("model.layers.5.self_attn", "q_proj", "kv_a_proj_with_mqa")) == {}


def test_qwen3_5_and_qwen3_next_have_other_linear_attentions() -> None:
    stem = "model.layers.0.linear_attn"
    split = names(stem, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
    assert sets(split) == {
        f"{stem}.in_proj_qkvz": tuple(split[:2]),
        f"{stem}.in_proj_ba": tuple(split[2:4]),
    }
    assert sets(names(stem, "in_proj_qkvz", "in_proj_ba", "out_proj")) == {}


def test_a_name_may_be_of_different_sets() -> None:
    assert sets(
        names("layers.0.attn", "wq_a", "wkv"), names("layers.0.compressor", "wkv", "wgate")
    ) == {
        "layers.0.attn.fused_wqa_wkv": ("layers.0.attn.wq_a", "layers.0.attn.wkv"),
        "layers.0.compressor.fused_wkv_wgate": (
            "layers.0.compressor.wkv",
            "layers.0.compressor.wgate",
        ),
    }


def test_experts_of() -> None:
    assert experts_of("model.layers.0.mlp.experts.3.up_proj") == "model.layers.0.mlp.experts"
    assert experts_of("model.layers.0.mlp.experts.gate_up_proj") == "model.layers.0.mlp.experts"
    assert experts_of("experts.3.w1") == "experts"
    assert experts_of("model.layers.0.mlp.shared_experts.up_proj") is None
    assert experts_of("model.layers.0.mlp.experts") is None


def test_one_scheme_for_all_disagrees_with_nothing() -> None:
    recipe = Recipe.of_flags(SPEC, ["o_proj", "down_proj"])
    every = names("model.layers.0.self_attn", *ATTENTION) + names("model.layers.0.mlp", *MLP)
    assert disagreements(every, recipe.spec_of) == []


def test_one_of_a_fused_linear_left_float_is_told() -> None:
    recipe = Recipe.of_flags(SPEC, ["q_proj"])
    every = names("model.layers.0.self_attn", *ATTENTION) + names("model.layers.0.mlp", *MLP)
    assert disagreements(every, recipe.spec_of) == [
        "loaders such as vLLM make model.layers.0.self_attn.qkv_proj one layer, but its members "
        "differ: q_proj (float); k_proj, v_proj (4 bits, symmetric, groups of 64)"
    ]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(SPEC, bits=8), "(8 bits, symmetric, groups of 64)"),
        (replace(SPEC, group_size=None), "(4 bits, symmetric, a scale a row)"),
        (replace(SPEC, symmetric=False), "(4 bits, asymmetric, groups of 64)"),
        (
            replace(SPEC, format="gptq"),
            "gate_proj (4 bits, symmetric, groups of 64, compressed_tensors); up_proj (4 bits, "
            "symmetric, groups of 64, gptq)",
        ),
        (
            replace(SPEC, order="decreasing_norm", group_scales="dynamic"),
            "(4 bits, symmetric, groups of 64, groups in the order of work)",
        ),
    ],
)
def test_what_has_to_be_shared(other: Spec, said: str) -> None:
    schemes = {"a.gate_proj": SPEC, "a.up_proj": other}
    (told,) = disagreements(schemes, schemes.get)
    assert said in told


@pytest.mark.parametrize(
    "other",
    [
        replace(SPEC, symmetric=True),
        replace(SPEC, method="qronos", damping="held_out", seed=3, polish=2),
        replace(SPEC, order="decreasing_norm"),
    ],
)
def test_what_need_not_be_shared(other: Spec) -> None:
    schemes = {"a.gate_proj": SPEC, "a.up_proj": other}
    assert disagreements(schemes, schemes.get) == []


def test_defaults_are_as_good_as_said() -> None:
    assert Scheme.of(Spec()) == Scheme.of(Spec(bits=4, symmetric=True, group_size=0))


def test_many_experts_are_counted() -> None:
    every = [f"model.layers.1.mlp.experts.{e}.{own}" for e in range(128) for own in MLP]
    (told,) = disagreements(every, Recipe.of_flags(SPEC, [r"experts\.5\."]).spec_of)
    assert told == (
        "loaders such as vLLM make model.layers.1.mlp.experts one layer, but its members differ: "
        "0.gate_proj, 0.up_proj, 0.down_proj and 378 more (4 bits, symmetric, groups of 64); "
        "5.gate_proj, 5.up_proj, 5.down_proj (float)"
    )
