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
}


def hf_model(name: str) -> Any:
    """A torch model in which no weight, bias or norm is trivial."""
    kind, fields = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **fields})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
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
