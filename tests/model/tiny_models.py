"""Small random models of every family, as transformers writes them, with no default among the
values that change a result."""

from pathlib import Path
from typing import Any

import jax
import pytest

from jaxtrain.model.config import ComputeConfig, DecoderConfig
from jaxtrain.model.decoder import Model, abstract
from jaxtrain.model.hf_config import read_config
from jaxtrain.model.weights import load_params
from jaxtrain.recipe.model import ModelConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "rms_norm_eps": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 30.0,  # one pair turns fast, one in between, two slowly
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.3, 1.6, 2.0],
    "long_factor": [1.0, 2.0, 3.0, 5.0],
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
DELTA = {
    "head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e3,
        "partial_rotary_factor": 0.5,
        "mrope_interleaved": True,
        "mrope_section": [1, 1, 1],
    },
}
DELTA_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
WHOLE: dict[str, dict[str, Any]] = {
    "Gemma3Whole": {
        "vision_config": VISION, "mm_tokens_per_image": 4,
        "image_token_index": 95, "eoi_token_index": 94, "boi_token_index": 93,
    },
    "Gemma4Whole": {
        "vision_config": {
            **VISION, "model_type": "gemma4_vision", "num_key_value_heads": 2, "head_dim": 8,
            "patch_size": 2, "position_embedding_size": 16,
        },
    },
    "Qwen3_5Whole": {"vision_config": DELTA_VISION},
}  # fmt: skip
"""Of multimodal models: the fields beside those of the text model."""
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama31": ("Llama", {"rope_parameters": LLAMA3}),
    "linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    ),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "num_attention_heads": 8}),
    "biased": ("Llama", {"attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "num_hidden_layers": 4}),
    "qwen2-windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2-alternating": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "num_hidden_layers": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 12, "attention_bias": True}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_hidden_layers": 5,
            "head_dim": 12,
            "attention_bias": True,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 7,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 6, "head_dim": 12, "sliding_window": 7}),
    "olmoe": (
        "Olmoe",
        {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False},
    ),
    "deepseek-v3-plain": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 20,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "v_head_dim": 24,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 20,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "rope_interleave": False,
        },
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "attention_bias": True,
            "q_lora_rank": 24,
            "kv_lora_rank": 20,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "v_head_dim": 10,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 2,
            "moe_intermediate_size": 20,
            "routed_scaling_factor": 1.7,
            "first_k_dense_replace": 1,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
        },
    ),
    "glm4-moe": (
        "Glm4Moe",
        {
            "head_dim": 12,
            "attention_bias": True,
            "use_qk_norm": True,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 20,
            "routed_scaling_factor": 1.7,
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            "num_hidden_layers": 4,
            "head_dim": 12,
            "intermediate_size": 64,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "sliding_window": 5,
            "swiglu_alpha": 1.3,
            "swiglu_limit": 0.4,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "num_hidden_layers": 4,
            "head_dim": 12,
            "attention_bias": True,
            "rms_norm_eps": 1e-3,
            "sliding_window": 5,
            "query_pre_attn_scalar": 9,
            "final_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
            },
        },
    ),
    "gemma3-whole": ("Gemma3Whole", {"head_dim": 12, "sliding_window": 5}),
    "qwen3-5": (
        "Qwen3_5",
        {
            **DELTA,
            "num_hidden_layers": 4,
            "attention_bias": True,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
    "qwen3-5-moe": (
        "Qwen3_5Moe",
        {
            **DELTA,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 28,
        },
    ),
    "qwen3-5-whole": (
        "Qwen3_5Whole",
        {**DELTA, "layer_types": ["linear_attention"] * 2 + ["full_attention"]},
    ),
    "lfm2": (
        "Lfm2",
        {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention"] * 2,
            "norm_eps": 0.02,
            "conv_bias": True,
            "conv_L_cache": 4,
            "block_multiple_of": 8,
            "block_ffn_dim_multiplier": 1.3,
            "tie_word_embeddings": True,
        },
    ),
    "gemma4": (
        "Gemma4",
        {
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 12,
            "num_global_key_value_heads": 2,
            "global_head_dim": 16,
            "attention_k_eq_v": True,
            "attention_bias": True,
            "rms_norm_eps": 1e-3,
            "sliding_window": 5,
            "final_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "full_attention"] * 4,
            "num_kv_shared_layers": 4,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 10,
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 3,
            "moe_intermediate_size": 20,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "proportional",
                    "rope_theta": 1e3,
                    "partial_rotary_factor": 0.5,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
            },
        },
    ),
    "gemma4-equal": (
        "Gemma4",
        {
            "num_hidden_layers": 4,
            "head_dim": 12,
            "global_head_dim": 12,
            "sliding_window": 5,
            "hidden_size_per_layer_input": 0,
            "tie_word_embeddings": False,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gemma4-small": (
        "Gemma4",
        {
            "num_hidden_layers": 6,
            "head_dim": 12,
            "global_head_dim": 16,
            "sliding_window": 5,
            "hidden_size_per_layer_input": 10,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
    ),
    "gemma4-whole": (
        "Gemma4Whole",
        {
            "head_dim": 12,
            "global_head_dim": 16,
            "sliding_window": 5,
            "num_hidden_layers": 6,
            "hidden_size_per_layer_input": 6,
        },
    ),
    "gemma": ("Gemma", {"head_dim": 12, "num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
    "gemma2": (
        "Gemma2",
        {
            "num_hidden_layers": 4,
            "head_dim": 12,
            "sliding_window": 5,
            "rms_norm_eps": 1e-3,
            "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 1.5,
        },
    ),
    "smollm3": (
        "SmolLM3",
        {
            "num_hidden_layers": 4,
            "no_rope_layer_interval": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e3, "factor": 3.0},
            "max_position_embeddings": 16,
        },
    ),
    "olmo2": ("Olmo2", {"attention_bias": True, "rms_norm_eps": 1e-3}),
    "olmo3": (
        "Olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 5,
            "attention_bias": True,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {**YARN, "attention_factor": 1.2},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    "phi3": (
        "Phi3",
        {"sliding_window": 7, "rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    ),
    "phi4": (
        "Phi3",
        {
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e3,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "granite": (
        "Granite",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
            "tie_word_embeddings": True,
        },
    ),
    "granite4": (
        "GraniteMoeHybrid",
        {
            "mamba_n_heads": 8,
            "num_local_experts": 0,
            "shared_intermediate_size": 40,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.3,
            "logits_scaling": 4.0,
            "layer_types": ["full_attention"] * 3,
            "position_embedding_type": "rope",
            "attention_bias": True,
        },
    ),
    "ministral3": (
        "Ministral3",
        {"head_dim": 12, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.3}},
    ),
    "glm4": ("Glm4", {"head_dim": 12}),
    "cohere2": (
        "Cohere2",
        {
            "num_hidden_layers": 4,
            "sliding_window": 5,
            "attention_bias": True,
            "logit_scale": 0.3,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gpt-neox": ("GPTNeoX", {"rotary_pct": 0.5}),
    "gpt-neox-serial": (
        "GPTNeoX",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_fast",
            "tie_word_embeddings": True,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False},
        },
    ),
    "gpt2": ("GPT2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "n_inner": 56}),
}
LIKE_OTHERS = {
    "llama2", "llama3", "linear", "biased", "mistral", "qwen2", "qwen2-windows", "gemma", "olmo3",
    "phi3", "granite", "gpt-neox-serial", "deepseek-v3-plain", "glm4-moe", "qwen3-5-whole",
    "qwen3-5-moe", "gemma4", "gemma4-equal", "gemma4-whole",
}  # fmt: skip
"""Rows whose every option, or nearly, another row has too; tried with the slow tests."""
ROWS = [
    pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name for name in FAMILIES
]
CONFIGS = {
    "Gemma3": "Gemma3Text", "Gemma3Whole": "Gemma3", "Qwen3_5": "Qwen3_5Text",
    "Qwen3_5Whole": "Qwen3_5", "Qwen3_5Moe": "Qwen3_5MoeText",
    "Gemma4": "Gemma4Text", "Gemma4Whole": "Gemma4",
}  # fmt: skip
"""Start of a class of models → that of its config, where it is another."""

NOT_TRAINED = ("layer_scalar", "e_score_correction_bias")
"""End of the names of weights that are no parameters."""


def hf_config(name: str, **changes: Any) -> Any:
    kind, fields = FAMILIES[name]
    fields = {**SIZES, **fields, **changes}
    if "Gemma4" in kind:
        fields["vocab_size_per_layer_input"] = fields["vocab_size"]
    if kind in WHOLE:
        fields = {"text_config": fields, **WHOLE[kind]}
    config = getattr(transformers, f"{CONFIGS.get(kind, kind)}Config")(**fields)
    config._attn_implementation = "eager"  # the one with soft caps
    return config


def hf_model(name: str, **changes: Any) -> Any:
    """A torch model in which no weight, bias or norm is trivial."""
    torch.manual_seed(0)
    is_whole = FAMILIES[name][0].endswith("Whole")
    kind = (
        transformers.AutoModelForImageTextToText if is_whole else transformers.AutoModelForCausalLM
    )
    model = kind.from_config(hf_config(name, **changes)).eval()
    scales = [pair for pair in model.named_buffers() if pair[0].endswith(NOT_TRAINED)]
    for name, parameter in [*model.named_parameters(), *scales]:
        if parameter.ndim == 1 or name.endswith("bias"):
            parameter.data += 0.2 * torch.randn_like(parameter)
        if name.endswith("A_log"):  # slow decays, whose sums transformers rounds less
            parameter.data -= 2
    return model


def save_model(name: str, folder: Path, dtype: str = "float32", **options: Any) -> Path:
    hf_model(name).to(getattr(torch, dtype)).save_pretrained(folder, **options)
    return folder


def describe_model(folder: Path, **fields: Any) -> tuple[DecoderConfig, dict[str, Any], Model]:
    config, hf = read_config(folder, ModelConfig(name_or_path=str(folder), **fields))
    return config, hf, abstract(config, ComputeConfig())


def on_one_device(shapes: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: device, shapes)


def load_model(folder: Path, **options: Any) -> tuple[DecoderConfig, dict[str, Any], Model, Any]:
    config, hf, model = describe_model(folder)
    params = load_params(folder, config, model.shapes, on_one_device(model.shapes), **options)
    return config, hf, model, params
