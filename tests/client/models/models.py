"""Models of every kind that is promised, small and random, made from configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 160
WIDTH = 64

COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {
    **COMMON,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
}


def llama() -> Any:  # noqa: ANN401
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**HEADS))


def mistral() -> Any:  # noqa: ANN401
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**HEADS, head_dim=16, sliding_window=32)
    )


def qwen2() -> Any:  # noqa: ANN401
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**HEADS, tie_word_embeddings=True)
    )


def qwen3() -> Any:  # noqa: ANN401
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**HEADS, head_dim=16))


def gpt2() -> Any:  # noqa: ANN401
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=256
        )
    )


def opt() -> Any:  # noqa: ANN401
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **COMMON,
            num_attention_heads=4,
            ffn_dim=96,
            word_embed_proj_dim=32,
            max_position_embeddings=256,
        )
    )


def bert() -> Any:  # noqa: ANN401
    return transformers.BertModel(
        transformers.BertConfig(**COMMON, num_attention_heads=4, intermediate_size=96)
    )


def mixtral(experts: int = 8) -> Any:  # noqa: ANN401
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**HEADS, num_local_experts=experts, num_experts_per_tok=2)
    )


MAKERS: dict[str, Callable[[], Any]] = {
    make.__name__: make for make in (llama, mistral, qwen2, qwen3, gpt2, opt, bert, mixtral)
}


def make(name: str, seed: int = 0) -> Any:  # noqa: ANN401
    torch.manual_seed(seed)
    return MAKERS[name]().eval()


def save(model: Any, tokenizer: Any, folder: Path) -> Path:  # noqa: ANN401
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def starve_experts(model: Any) -> tuple[int, int]:  # noqa: ANN401
    """Routes no token to the last expert and few to the one before; their numbers."""
    routers = [layer.mlp.gate for layer in model.model.layers]
    experts = routers[0].weight.shape[0]
    with torch.no_grad():
        for router in routers:
            # Scores are x times these rows: of many random ones, a row of zeros is rarely among the
            # two best, and two that are large and opposite leave it no chance.
            router.weight[0] = 20 * router.weight[1].abs()
            router.weight[1] = -router.weight[0]
            router.weight[2] = 20 * torch.roll(router.weight[0], 1)
            router.weight[3] = -router.weight[2]
            router.weight[experts - 1] = 0
    return experts - 1, experts - 2
