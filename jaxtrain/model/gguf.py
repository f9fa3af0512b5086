"""GGUF files of Llama models, shown as the Hugging Face folder they were made from.

The tokenizer in the file is read elsewhere.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.model.tensor_file import Stored
from jaxtrain.recipe.errors import WeightError, shown

FIXED = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
PER_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def read_gguf_config(path: Path) -> dict[str, Any]:
    """config.json, rebuilt from the file's metadata; WeightError for a model that is no Llama."""
    return _config(path, _open(path))


def read_gguf_tensors(path: Path) -> dict[str, Stored]:
    """Hugging Face names and shapes; a tensor is dequantised to float32 each time it is read."""
    reader = _open(path)
    config = _config(path, reader)
    heads = {
        "attn_q.weight": config["num_attention_heads"],
        "attn_k.weight": config["num_key_value_heads"] or config["num_attention_heads"],
    }
    tensors = {}
    for tensor in reader.tensors:
        name, rotated_heads = tensor.name, None
        match name.split(".", 2):
            case ["blk", layer, kind] if kind in PER_LAYER:
                name, rotated_heads = f"model.layers.{layer}.{PER_LAYER[kind]}", heads.get(kind)
            case _:
                name = FIXED.get(name, name)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        tensors[name] = Stored(shape, partial(_read, path, tensor, shape, rotated_heads))
    return tensors


def _config(path: Path, reader: Any) -> dict[str, Any]:
    kv = {name: field.contents() for name, field in reader.fields.items()}
    architecture = kv.get("general.architecture")
    if architecture != "llama":
        raise WeightError(f"{path}: must be of architecture llama, found {shown(architecture)}")
    scaling = kv.get("llama.rope.scaling.type", "none")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": kv.get("llama.vocab_size", len(kv.get("tokenizer.ggml.tokens", ()))),
        "hidden_size": kv.get("llama.embedding_length"),
        "intermediate_size": kv.get("llama.feed_forward_length"),
        "num_hidden_layers": kv.get("llama.block_count"),
        "num_attention_heads": kv.get("llama.attention.head_count"),
        "num_key_value_heads": kv.get("llama.attention.head_count_kv"),
        "head_dim": kv.get("llama.attention.key_length", kv.get("llama.rope.dimension_count")),
        "hidden_act": "silu",
        "max_position_embeddings": kv.get("llama.context_length"),
        "rms_norm_eps": _short(kv.get("llama.attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_theta": _short(kv.get("llama.rope.freq_base", 10_000.0)),
        "rope_scaling": None
        if scaling == "none"
        else {"rope_type": scaling, "factor": _short(kv.get("llama.rope.scaling.factor", 1.0))},
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
    }
    for field, theirs in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        if (token := kv.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            config[f"{field}_token_id"] = token
    return config


def _read(path: Path, tensor: Any, shape: tuple[int, ...], rotated_heads: int | None) -> np.ndarray:
    from gguf.quants import dequantize

    try:
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    except NotImplementedError:
        what = f"has type {tensor.tensor_type.name}, which the gguf package cannot read"
        raise WeightError(f"{path}: tensor {tensor.name} {what}") from None
    if rotated_heads is not None:
        # The file lists the two halves of a head in turn; Hugging Face has one behind the other.
        value = value.reshape(rotated_heads, -1, 2, shape[1]).swapaxes(1, 2)
    return value.reshape(shape)


def _short(value: float) -> float:
    """The decimal that was meant: metadata are float32, and 1e-5 comes back as 9.99999974e-06."""
    return float(str(np.float32(value)))


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        need = "GGUF files need the gguf package; pip install 'jaxtrain[demo]'"
        raise WeightError(f"{path}: {need}") from None
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise WeightError(f"{path}: not a GGUF file: {error}; fetch it again") from None
