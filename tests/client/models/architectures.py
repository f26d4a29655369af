"""Architectures of transformers, small and random, and what the command is to make of each.

Their linears are small, and their weights so large that a wrong one shows in the logits.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from models import HEADS, VOCABULARY, WIDTH

TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# What most configurations call these.
BASE = HEADS | TOKENS | {"intermediate_size": 96}
DENSE, PACKED, GPTQ = "dense-f32", "compressed-tensors", "gptq"
BOTH = (DENSE, PACKED)


@dataclass(frozen=True)
class Architecture:
    """A model and its outcome."""

    kind: str
    """The model's class in transformers."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of its configuration, beside BASE; None takes one of BASE away."""
    formats: tuple[str, ...] = BOTH
    """Those in which it is written."""
    refused: str | None = None
    """A part of the sentence that refuses it (in all formats that are not in `formats`)."""
    dtype: str = "float32"
    """Of the checkpoint."""
    float32: str | None = None
    """What these names match stays in float32 in a checkpoint of another dtype."""
    shard_size: str = "1GB"
    quick: bool = False
    """Part of the default run."""
    flags: tuple[str, ...] = ()
    """Further ones of the command."""
    characters: bool = False
    """A tokenizer of characters: transformers takes another class for some types of model, which
    does not keep words."""
    of_type: str = ""
    """The type of its configuration, where the class serves several."""
    of_text: str = ""
    """The part of the configuration that BASE is for, where it has parts."""

    def config(self) -> Any:  # noqa: ANN401
        kind = getattr(transformers, self.kind).config_class
        if self.of_type:
            kind = type(transformers.AutoConfig.for_model(self.of_type))
        own = dict(self.arguments)
        if self.of_text:
            text = own.pop(self.of_text, {})
            own[self.of_text] = _given(BASE | text)
            return kind(**own)
        return kind(**_given(BASE | own))

    def make(self) -> Any:  # noqa: ANN401
        torch.manual_seed(0)
        model = getattr(transformers, self.kind)._from_config(self.config())
        return enlarged(model).eval()


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


@torch.no_grad()
def enlarged(model: Any) -> Any:  # noqa: ANN401
    """Weights of the size that makes a layer's outputs as large as its inputs."""
    made = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            size = 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(size * torch.randn(parameter.shape, generator=made))
        elif not bool(parameter.any()):
            # Biases, and what else begins with nothing.
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=made))
    return model


MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
MLA: dict[str, Any] = MOE | {
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
LINEAR_ATTENTION: dict[str, Any] = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
HEAD = {"head_dim": 16}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
ENCODER = {"num_key_value_heads": None, "num_attention_heads": 4}

ARCHITECTURES: dict[str, Architecture] = {
    # Decoders.
    "llama": Architecture("LlamaForCausalLM"),
    "llama-tied-sharded-bf16": Architecture(
        "LlamaForCausalLM",
        {"tie_word_embeddings": True},
        dtype="bfloat16",
        shard_size="60KB",
        quick=True,
    ),
    "mistral": Architecture("MistralForCausalLM", HEAD | {"sliding_window": 32}),
    "ministral": Architecture("MinistralForCausalLM", HEAD | SLIDING),
    "qwen2": Architecture("Qwen2ForCausalLM", {"tie_word_embeddings": True}, characters=True),
    "qwen3": Architecture("Qwen3ForCausalLM", HEAD),
    "gemma": Architecture("GemmaForCausalLM", HEAD),
    "gemma2": Architecture("Gemma2ForCausalLM", HEAD | SLIDING),
    "gemma3-text": Architecture("Gemma3ForCausalLM", HEAD | SLIDING),
    "gemma3n-text": Architecture(
        "Gemma3nForCausalLM",
        HEAD
        | SLIDING
        | {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "laurel_rank": 8,
            "activation_sparsity_pattern": None,
            "intermediate_size": 96,
        },
        formats=(),
        refused="expected linears that read one input in a forward",
    ),
    "gemma3n-text-ignored": Architecture(
        "Gemma3nForCausalLM",
        HEAD
        | SLIDING
        | {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "laurel_rank": 8,
            "activation_sparsity_pattern": None,
            "intermediate_size": 96,
        },
        flags=("--ignore", "modality_router$"),
        quick=True,
    ),
    "gemma4-text": Architecture(
        "Gemma4ForCausalLM",
        HEAD
        | SLIDING
        | {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "global_head_dim": 16,
        },
    ),
    "phi": Architecture("PhiForCausalLM"),
    "phi3": Architecture("Phi3ForCausalLM", quick=True),
    "falcon": Architecture(
        "FalconForCausalLM",
        {
            "new_decoder_architecture": False,
            "multi_query": True,
            "parallel_attn": True,
            "ffn_hidden_size": 96,
        },
        quick=True,
    ),
    "falcon-new": Architecture(
        "FalconForCausalLM",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 96},
    ),
    "falcon-alibi": Architecture(
        "FalconForCausalLM",
        {
            "new_decoder_architecture": False,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
            "bias": True,
            "ffn_hidden_size": 96,
        },
    ),
    "gpt-neox": Architecture("GPTNeoXForCausalLM"),
    "gpt-neo": Architecture(
        "GPTNeoForCausalLM",
        {
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "num_heads": 4,
            "num_hidden_layers": None,
            "num_attention_heads": None,
        },
    ),
    "gptj": Architecture(
        "GPTJForCausalLM",
        {
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "rotary_dim": 8,
            "num_hidden_layers": None,
            "num_attention_heads": None,
            "hidden_size": None,
        },
    ),
    "codegen": Architecture(
        "CodeGenForCausalLM",
        {
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "rotary_dim": 8,
            "num_hidden_layers": None,
            "num_attention_heads": None,
            "hidden_size": None,
        },
    ),
    "bloom": Architecture("BloomForCausalLM", {"n_layer": 2, "n_head": 4}),
    "mpt": Architecture(
        "MptForCausalLM",
        {
            "d_model": WIDTH,
            "n_heads": 4,
            "n_layers": 2,
            "expansion_ratio": 2,
            "max_seq_len": 256,
            "num_hidden_layers": None,
            "num_attention_heads": None,
            "hidden_size": None,
        },
    ),
    "opt": Architecture("OPTForCausalLM", {"ffn_dim": 96, "word_embed_proj_dim": 32}),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        {
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "hidden_size": None,
            "num_hidden_layers": None,
            "num_attention_heads": None,
        },
        formats=(DENSE, GPTQ),
        quick=True,
    ),
    "gpt-bigcode": Architecture(
        "GPTBigCodeForCausalLM",
        {
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "hidden_size": None,
            "num_hidden_layers": None,
            "num_attention_heads": None,
        },
    ),
    "stablelm": Architecture("StableLmForCausalLM"),
    "cohere": Architecture("CohereForCausalLM"),
    "cohere2": Architecture("Cohere2ForCausalLM", SLIDING),
    "olmo": Architecture("OlmoForCausalLM"),
    "olmo2": Architecture("Olmo2ForCausalLM"),
    "olmo3": Architecture("Olmo3ForCausalLM", SLIDING),
    "olmo-hybrid": Architecture(
        "OlmoHybridForCausalLM", LINEAR_ATTENTION | {"linear_num_key_heads": 4}
    ),
    "granite": Architecture("GraniteForCausalLM"),
    "smollm3": Architecture("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}),
    "starcoder2": Architecture("Starcoder2ForCausalLM"),
    "nemotron": Architecture("NemotronForCausalLM"),
    "glm": Architecture("GlmForCausalLM", HEAD),
    "glm4": Architecture("Glm4ForCausalLM", HEAD),
    "exaone4": Architecture("Exaone4ForCausalLM", SLIDING),
    "persimmon": Architecture("PersimmonForCausalLM"),
    "seed-oss": Architecture("SeedOssForCausalLM", HEAD),
    "apertus": Architecture("ApertusForCausalLM"),
    "arcee": Architecture("ArceeForCausalLM"),
    "helium": Architecture("HeliumForCausalLM", HEAD),
    "diffllama": Architecture("DiffLlamaForCausalLM"),
    "doge": Architecture("DogeForCausalLM"),
    "nanochat": Architecture("NanoChatForCausalLM"),
    "hunyuan": Architecture("HunYuanDenseV1ForCausalLM", HEAD),
    "minicpm3": Architecture(
        "MiniCPM3ForCausalLM",
        {k: v for k, v in MLA.items() if k.endswith(("rank", "dim"))} | {"num_key_value_heads": 4},
    ),
    "ernie4.5": Architecture("Ernie4_5ForCausalLM"),
    "xglm": Architecture(
        "XGLMForCausalLM",
        {
            "d_model": WIDTH,
            "ffn_dim": 96,
            "num_layers": 2,
            "attention_heads": 4,
            "num_hidden_layers": None,
            "num_attention_heads": None,
            "hidden_size": None,
        },
    ),
    "biogpt": Architecture("BioGptForCausalLM"),
    "modernbert-decoder": Architecture("ModernBertDecoderForCausalLM"),
    "hrm-text": Architecture(
        "HrmTextForCausalLM",
        HEAD | {"H_cycles": 1, "L_cycles": 2},
        formats=(),
        refused="has several lists of layers",
    ),
    "lara-mini": Architecture(
        "LaraMiniForCausalLM", MOE | LINEAR_ATTENTION | {"shared_expert_intermediate_size": 32}
    ),
    # State spaces and recurrences.
    "lfm2": Architecture("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "mamba": Architecture("MambaForCausalLM", {"state_size": 8}, flags=("--ignore", "dt_proj$")),
    "mamba-whole": Architecture(
        "MambaForCausalLM",
        {"state_size": 8},
        formats=(),
        refused="mixer.dt_proj: its weight is read without calling the linear",
    ),
    "falcon-mamba": Architecture(
        "FalconMambaForCausalLM", {"state_size": 8}, flags=("--ignore", "dt_proj$")
    ),
    "mamba2": Architecture(
        "Mamba2ForCausalLM",
        {"state_size": 8, "head_dim": 16, "num_heads": 8, "n_groups": 1, "chunk_size": 16},
    ),
    "mamba2-bf16-float32": Architecture(
        "Mamba2ForCausalLM",
        {"state_size": 8, "head_dim": 16, "num_heads": 8, "n_groups": 1, "chunk_size": 16},
        dtype="bfloat16",
        float32="A_log|dt_bias|mixer.D$",
        quick=True,
    ),
    "recurrent-gemma": Architecture(
        "RecurrentGemmaForCausalLM",
        {
            "lru_width": WIDTH,
            "attention_window_size": 32,
            "block_types": ["recurrent", "attention"],
        },
    ),
    "rwkv": Architecture(
        "RwkvForCausalLM", {"context_length": 256, "attention_hidden_size": WIDTH}
    ),
    "xlstm": Architecture(
        "xLSTMForCausalLM",
        {
            "num_heads": 4,
            "num_blocks": 2,
            "chunk_size": 16,
            "qk_dim_factor": 1.0,
            "num_attention_heads": None,
            "num_key_value_heads": None,
        },
    ),
    "jamba": Architecture(
        "JambaForCausalLM",
        MOE
        | {
            "num_experts": 4,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
        flags=("--ignore", "dt_proj$"),
    ),
    "bamba": Architecture("BambaForCausalLM", MAMBA | {"attn_layer_indices": [1]}),
    "falcon-h1": Architecture("FalconH1ForCausalLM", MAMBA | {"mamba_d_ssm": 128}),
    "zamba": Architecture(
        "ZambaForCausalLM",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "mamba_d_state": 8,
            "n_mamba_heads": 2,
            "use_mamba_kernels": False,
            "num_key_value_heads": 4,
        },
    ),
    "zamba2": Architecture(
        "Zamba2ForCausalLM",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "num_mem_blocks": 1,
            "num_key_value_heads": 4,
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "use_mamba_kernels": False,
        },
    ),
    "nemotron-h": Architecture(
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["mamba", "attention", "moe"],
            "num_hidden_layers": None,
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
            "use_mamba_kernels": False,
        },
    ),
    "granite-4": Architecture(
        "GraniteMoeHybridForCausalLM",
        MOE | MAMBA | {"shared_intermediate_size": 64, "layer_types": ["mamba", "attention"]},
    ),
    "qwen3-next": Architecture(
        "Qwen3NextForCausalLM", MOE | LINEAR_ATTENTION | {"shared_expert_intermediate_size": 32}
    ),
    "qwen3.5": Architecture("Qwen3_5ForCausalLM", LINEAR_ATTENTION, characters=True),
    "kimi-linear": Architecture(
        "KimiLinearForCausalLM",
        MLA
        | LINEAR_ATTENTION
        | {"num_local_experts": 4, "linear_head_dim": 16, "linear_num_heads": 4},
        quick=True,
    ),
    # Experts.
    "mixtral": Architecture("MixtralForCausalLM", MOE),
    "qwen2-moe": Architecture("Qwen2MoeForCausalLM", MOE | {"shared_expert_intermediate_size": 32}),
    "qwen3-moe": Architecture("Qwen3MoeForCausalLM", MOE | HEAD),
    "qwen3.5-moe": Architecture(
        "Qwen3_5MoeForCausalLM",
        MOE | LINEAR_ATTENTION | {"shared_expert_intermediate_size": 32},
        characters=True,
    ),
    "deepseek-v2": Architecture("DeepseekV2ForCausalLM", MLA | {"topk_method": "greedy"}),
    "deepseek-v3": Architecture("DeepseekV3ForCausalLM", MLA),
    "deepseek-v3-bf16-float32": Architecture(
        "DeepseekV3ForCausalLM",
        MLA,
        dtype="bfloat16",
        float32="e_score_correction_bias",
        quick=True,
    ),
    "gpt-oss": Architecture("GptOssForCausalLM", MOE | HEAD | SLIDING, quick=True),
    "llama4-text": Architecture(
        "Llama4ForCausalLM",
        HEAD
        | {
            "intermediate_size_mlp": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
        },
        quick=True,
    ),
    "granitemoe": Architecture("GraniteMoeForCausalLM", MOE),
    "granitemoe-shared": Architecture(
        "GraniteMoeSharedForCausalLM", MOE | {"shared_intermediate_size": 64}
    ),
    "jetmoe": Architecture(
        "JetMoeForCausalLM",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "kv_channels": 16,
            "num_key_value_heads": 2,
            "num_attention_heads": None,
        },
        quick=True,
    ),
    "olmoe": Architecture("OlmoeForCausalLM", MOE),
    "phimoe": Architecture("PhimoeForCausalLM", MOE),
    "ernie4.5-moe": Architecture(
        "Ernie4_5_MoeForCausalLM",
        MOE
        | {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
        },
    ),
    "glm4-moe": Architecture("Glm4MoeForCausalLM", MLA | HEAD | {"num_key_value_heads": 2}),
    "dots1": Architecture("Dots1ForCausalLM", MLA | HEAD | {"num_key_value_heads": 2}),
    "minimax": Architecture(
        "MiniMaxForCausalLM",
        MOE | HEAD | {"layer_types": ["linear_attention", "full_attention"], "block_size": 32},
    ),
    "minimax-m2": Architecture("MiniMaxM2ForCausalLM", MOE | HEAD),
    "aria-text": Architecture(
        "AriaTextForCausalLM", {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    ),
    "lfm2-moe": Architecture(
        "Lfm2MoeForCausalLM",
        MOE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    "dbrx": Architecture(
        "DbrxForCausalLM",
        {
            "d_model": WIDTH,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
            "hidden_size": None,
            "num_hidden_layers": None,
            "num_attention_heads": None,
            "intermediate_size": None,
            "num_key_value_heads": None,
            "max_position_embeddings": None,
        },
        quick=True,
    ),
    "hunyuan-moe": Architecture("HunYuanMoEV1ForCausalLM", MOE | HEAD | {"moe_topk": 2}),
    "flex-olmo": Architecture("FlexOlmoForCausalLM", MOE),
    "longcat-flash": Architecture(
        "LongcatFlashForCausalLM",
        MLA
        | HEAD
        | {
            "num_layers": 2,
            "num_hidden_layers": None,
            "intermediate_size": None,
            "moe_intermediate_size": None,
            "num_experts_per_tok": None,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 32,
            "moe_topk": 2,
            "zero_expert_num": 2,
        },
        flags=("--ignore", "classifier$"),
    ),
    "afmoe": Architecture(
        "AfmoeForCausalLM", MOE | HEAD | SLIDING | {"num_dense_layers": 1, "num_shared_experts": 1}
    ),
    "sarvam-moe": Architecture("Glm4MoeForCausalLM", MLA | HEAD, of_type="sarvam_moe", quick=True),
    "exaone-moe": Architecture(
        "ExaoneMoeForCausalLM",
        MLA | HEAD | SLIDING | {"num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "inkling2-text": Architecture(
        "Inkling2ForCausalLM",
        MOE | HEAD | {"unpadded_vocab_size": VOCABULARY, "vocab_size": VOCABULARY + 16},
        formats=(DENSE,),
        refused="transformers (5.24) converts model.llm.unembed.weight",
    ),
    "mimo-v2": Architecture(
        "MiMoV2FlashForCausalLM", MLA | HEAD | SLIDING | {"num_key_value_heads": 2}
    ),
    "solar-open": Architecture("SolarOpenForCausalLM", MLA | HEAD),
    # Encoders.
    "bert": Architecture("BertModel", ENCODER),
    "roberta": Architecture("RobertaModel", ENCODER),
    "xlm-roberta": Architecture("XLMRobertaForMaskedLM", ENCODER),
    "modernbert": Architecture(
        "ModernBertForMaskedLM",
        {
            "global_attn_every_n_layers": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "local_attention": 32,
        },
    ),
    "electra": Architecture("ElectraModel", ENCODER | {"embedding_size": 32}),
    "deberta": Architecture("DebertaModel", ENCODER),
    "deberta-v2": Architecture(
        "DebertaV2Model",
        ENCODER
        | {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 32,
            "share_att_key": True,
        },
        formats=(),
        refused="expected linears that read one input in a forward",
    ),
    "deberta-v2-ignored": Architecture(
        "DebertaV2Model",
        ENCODER
        | {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 32,
            "share_att_key": True,
        },
        flags=("--ignore", "(key_proj|query_proj)$"),
    ),
    "albert": Architecture(
        "AlbertModel",
        ENCODER | {"embedding_size": 32},
        formats=(),
        refused="its forward came to block 0",
        quick=True,
    ),
    "distilbert": Architecture(
        "DistilBertModel",
        {
            "dim": WIDTH,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 96,
            "num_hidden_layers": None,
            "num_attention_heads": None,
            "hidden_size": None,
        },
    ),
    "mpnet": Architecture("MPNetModel", ENCODER),
    "eurobert": Architecture("EuroBertModel"),
    "nomic-bert": Architecture("NomicBertModel", {"num_key_value_heads": None}),
    "jina-v3": Architecture("JinaEmbeddingsV3Model", {"num_key_value_heads": None}),
    "gte": Architecture("GteModel", {"num_key_value_heads": None}),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        {
            "d_model": WIDTH,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "num_hidden_layers": None,
            "hidden_size": None,
            "num_attention_heads": None,
        },
        formats=(),
        refused="is an encoder-decoder",
    ),
    "bart": Architecture(
        "BartForConditionalGeneration",
        {
            "d_model": WIDTH,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "hidden_size": None,
            "num_hidden_layers": None,
            "num_attention_heads": None,
        },
        formats=(),
        refused="is an encoder-decoder",
    ),
    "vit": Architecture(
        "ViTModel",
        ENCODER | {"image_size": 32, "patch_size": 8},
        formats=(),
        refused="reads pixel_values",
    ),
    # Models that see, run on text.
    "gemma3": Architecture(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": HEAD | SLIDING,
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 150,
            "boi_token_index": 151,
            "eoi_token_index": 152,
        },
        of_text="text_config",
    ),
    "qwen2-vl": Architecture(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}
            },
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": WIDTH,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 8,
            },
            "image_token_id": 150,
            "video_token_id": 151,
            "vision_start_token_id": 152,
            "vision_end_token_id": 153,
        },
        of_text="text_config",
    ),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama"},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
                "projection_dim": 32,
            },
            "image_token_index": 150,
        },
        of_text="text_config",
    ),
    "qwen3-vl-moe": Architecture(
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": MOE
            | HEAD
            | {
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [2, 3, 3],
                    "mrope_interleaved": True,
                }
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 48,
                "out_hidden_size": WIDTH,
                "patch_size": 8,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            "image_token_id": 150,
            "video_token_id": 151,
            "vision_start_token_id": 152,
            "vision_end_token_id": 153,
        },
        of_text="text_config",
        quick=True,
    ),
}
