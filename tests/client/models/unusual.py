"""Small random models whose checkpoints or forwards are unlike Llama's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch
import transformers
from models import HEADS, VOCABULARY


def made(config: str, model: str, **settings: object) -> Any:  # noqa: ANN401
    """A model of transformers, with weights so large that errors show in its logits.

    Settings add to HEADS; None takes one of those away.
    """
    torch.manual_seed(0)
    known = {name: value for name, value in {**HEADS, **settings}.items() if value is not None}
    own = getattr(transformers, model)._from_config(getattr(transformers, config)(**known))
    return enlarged(own)


@torch.no_grad()
def enlarged(model: Any) -> Any:  # noqa: ANN401
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2:
            parameter.copy_(values * (1.5 / parameter.shape[-1] ** 0.5))
        elif "bias" in name and "norm" not in name:
            parameter.copy_(values * 0.1)
    return model.eval()


def llama(**settings: object) -> Any:  # noqa: ANN401
    return made("LlamaConfig", "LlamaForCausalLM", **settings)


def deepseek(**settings: object) -> Any:  # noqa: ANN401
    """The second layer has experts, whose router has a bias that is no parameter's."""
    sizes = {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    }
    return made("DeepseekV3Config", "DeepseekV3ForCausalLM", **{**sizes, **settings})


def mamba2() -> Any:  # noqa: ANN401
    sizes = {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1}
    return made("Mamba2Config", "Mamba2ForCausalLM", **sizes, intermediate_size=None)


def qwen3_moe(experts: int = 4) -> Any:  # noqa: ANN401
    sizes = {"head_dim": 16, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
    return made("Qwen3MoeConfig", "Qwen3MoeForCausalLM", **sizes, num_experts=experts)


def mixtral() -> Any:  # noqa: ANN401
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return made("MixtralConfig", "MixtralForCausalLM", **sizes)


def gpt_oss(**settings: object) -> Any:  # noqa: ANN401
    """Experts are transposed, interleaved, and have biases."""
    sizes = {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
    }
    return made("GptOssConfig", "GptOssForCausalLM", **{**sizes, **settings})


def llama4() -> Any:  # noqa: ANN401
    """Experts are transposed, and get their tokens sorted."""
    sizes = {
        "head_dim": 16,
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
    }
    return made("Llama4TextConfig", "Llama4ForCausalLM", **sizes)


def granite_moe() -> Any:  # noqa: ANN401
    """All experts of a projection are one tensor, each applied to its part of the tokens."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return made("GraniteMoeConfig", "GraniteMoeForCausalLM", **sizes)


def gemma4() -> Any:  # noqa: ANN401
    """Later layers read keys and values of earlier ones, and each has an input of its own."""
    sizes = {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 16,
    }
    return made("Gemma4TextConfig", "Gemma4ForCausalLM", **sizes)


MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}


def bamba() -> Any:  # noqa: ANN401
    """Its blocks return hidden states and weights of attention."""
    return made("BambaConfig", "BambaForCausalLM", **MAMBA, attn_layer_indices=[1], mamba_expand=2)


def rwkv() -> Any:  # noqa: ANN401
    """Its blocks return hidden states, a state and weights of attention."""
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "max_position_embeddings"))
    return made(
        "RwkvConfig", "RwkvForCausalLM", attention_hidden_size=64, context_length=256, **heads
    )


def zamba2() -> Any:  # noqa: ANN401
    """Its attention is one module that several layers use."""
    sizes = {
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "use_mem_rope": False,
        "num_mem_blocks": 1,
        "adapter_rank": 8,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "use_mamba_kernels": False,
    }
    return made("Zamba2Config", "Zamba2ForCausalLM", **sizes)


def saver(tokenizer: Any, folder: Path) -> Callable[..., Path]:  # noqa: ANN401
    """Saves models with this tokenizer below a folder."""

    def save(model: Any, name: str = "model", dtype: str = "float32") -> Path:  # noqa: ANN401
        model.config.dtype = dtype
        return models.save(model.to(getattr(torch, dtype)), tokenizer, folder / name)

    return save
