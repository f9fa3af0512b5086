"""Reads GGUF files of Llama models like the Hugging Face folders that they were made from.

tokenizer/gguf.py reads the tokenizer in the file.
"""

import math
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.gguf_file import Header, Tensor, read_header
from jaxtrain.model.tensor_file import StoredTensor
from jaxtrain.recipe.errors import WeightError, show

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
    """Rebuilds config.json from the metadata; WeightError for a model other than Llama."""
    return _build_config(path, _read_checked_header(path))


def read_gguf_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors by Hugging Face name, dequantised to float32 each time they are read."""
    header = _read_checked_header(path)
    config = _build_config(path, header)
    heads = {
        "attn_q.weight": config["num_attention_heads"],
        "attn_k.weight": config["num_key_value_heads"] or config["num_attention_heads"],
    }
    tensors = {}
    for name, tensor in header.tensors.items():
        rotated_heads = None
        match name.split(".", 2):
            case ["blk", layer, kind] if kind in PER_LAYER:
                name, rotated_heads = f"model.layers.{layer}.{PER_LAYER[kind]}", heads.get(kind)
            case _:
                name = FIXED.get(name, name)
        read = partial(_dequantize, path, tensor, rotated_heads)
        tensors[name] = StoredTensor(tensor.shape, read)
    return tensors


def _build_config(path: Path, header: Header) -> dict[str, Any]:
    kv = header.metadata
    architecture = kv.get("general.architecture")
    if architecture != "llama":
        raise WeightError(f"{path}: must be of architecture llama, found {show(architecture)}")
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
        "rms_norm_eps": _shorten(kv.get("llama.attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_theta": _shorten(kv.get("llama.rope.freq_base", 10_000.0)),
        "rope_scaling": None
        if scaling == "none"
        else {"rope_type": scaling, "factor": _shorten(kv.get("llama.rope.scaling.factor", 1.0))},
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
    }
    for field, theirs in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        if (token := kv.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            config[f"{field}_token_id"] = token
    return config


def _dequantize(path: Path, tensor: Tensor, rotated_heads: int | None) -> np.ndarray:
    from gguf.quants import dequantize

    kind, (*rows, row_bytes) = _layout(tensor)
    # Blocks lie one behind the other, and `dequantize` takes 16 rows at a time: longer ones halve
    # the time. Not as a memmap, of which each of many views is costly.
    longer = math.gcd(math.prod(rows), 16)
    data = np.memmap(path, np.uint8, "r", tensor.start, (math.prod(rows) * row_bytes,))
    data = data.view(np.ndarray).reshape(-1, longer * row_bytes)
    value = dequantize(data, kind).astype(np.float32, copy=False)
    if rotated_heads is not None:
        # The file interleaves the two halves of a head; Hugging Face concatenates them.
        value = value.reshape(rotated_heads, -1, 2, tensor.shape[1]).swapaxes(1, 2)
    return value.reshape(tensor.shape)


def _layout(tensor: Tensor) -> tuple[Any, tuple[int, ...]]:
    """The quantisation type and the shape in bytes; ValueError for an unsupported type."""
    from gguf.quants import quant_shape_to_byte_shape

    kind = _find_kind(tensor.kind)
    return kind, quant_shape_to_byte_shape(tensor.shape, kind)


@cache
def _find_kind(code: int) -> Any:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(code)
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        raise ValueError(f"the gguf package cannot read type {kind.name}") from None
    return kind


def _shorten(value: float) -> float:
    """The shortest decimal: metadata are float32, which turns 1e-5 into 9.99999974e-06."""
    return float(str(np.float32(value)))


def _read_checked_header(path: Path) -> Header:
    """Reads the header; WeightError if any tensor cannot be read."""
    if find_spec("gguf") is None:
        need = "GGUF files need the gguf package; run pip install 'jaxtrain[demo]'"
        raise WeightError(f"{path}: {need}")
    header, size = read_header(path), path.stat().st_size
    for name, tensor in header.tensors.items():
        try:
            end = tensor.start + math.prod(_layout(tensor)[1])
        except ValueError as error:
            raise WeightError(f"{path}: tensor {name}: {error}") from None
        if end > size:
            raise WeightError(
                f"{path}: {name} ends at byte {end}, the file at {size}; fetch it again"
            )
    return header
