"""The Hugging Face model families that the decoder supports, as data.

A family says what its config.json means. All families name their tensors alike; one table of names
is read in both directions, so that loading and exporting cannot disagree. The dimensions of a
tensor are written in letters: `KGH D` is [K * G * H, D].

D width, K key/value heads, G query heads to each, H head size, F feed-forward, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Tensor(NamedTuple):
    """One tensor of a Hugging Face file, and the part of our parameter that it fills."""

    name: str
    """`{i}` stands for the number of the layer"""
    dims: str
    """dimensions in the file"""
    ours: str
    """the same letters in the order of our parameter; 1 for a dimension that the file lacks, along
    which several tensors are concatenated"""


def _tensors(*tensors: str) -> tuple[Tensor, ...]:
    """Parses `name: dimensions -> ours`; a name that begins with a dot belongs to a layer."""
    parts = (tensor.replace(" -> ", ": ").split(": ") for tensor in tensors)
    full = lambda name: "model.layers.{i}" + name if name.startswith(".") else name
    return tuple(Tensor(full(name), *dims) for name, *dims in parts)


PARAMETER_TENSORS = {
    "embed/embedding": _tensors("model.embed_tokens.weight: V D -> V D"),
    "attention_norm": _tensors(".input_layernorm.weight: D -> D"),
    "attention/qkv": _tensors(
        ".self_attn.q_proj.weight: KGH D -> D K G H",
        ".self_attn.k_proj.weight: KH D -> D K 1 H",
        ".self_attn.v_proj.weight: KH D -> D K 1 H",
    ),
    "attention/qkv_bias": _tensors(
        ".self_attn.q_proj.bias: KGH -> K G H",
        ".self_attn.k_proj.bias: KH -> K 1 H",
        ".self_attn.v_proj.bias: KH -> K 1 H",
    ),
    "attention/q_norm": _tensors(".self_attn.q_norm.weight: H -> H"),
    "attention/k_norm": _tensors(".self_attn.k_norm.weight: H -> H"),
    "attention/out": _tensors(".self_attn.o_proj.weight: D KGH -> K G H D"),
    "attention/out_bias": _tensors(".self_attn.o_proj.bias: D -> D"),
    "mlp_norm": _tensors(".post_attention_layernorm.weight: D -> D"),
    "mlp/gate_up": _tensors(
        ".mlp.gate_proj.weight: F D -> D 1 F", ".mlp.up_proj.weight: F D -> D 1 F"
    ),
    "mlp/down": _tensors(".mlp.down_proj.weight: D F -> F D"),
    "norm": _tensors("model.norm.weight: D -> D"),
    "head": _tensors("lm_head.weight: V D -> D V"),
}
"""Path of a parameter, without the leading L of stacked ones → its tensors; `attention/qkv` is
`layers/<group>/<member>/attention/qkv`."""

HARMLESS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")
"""Tensors of old files that are ignored: they follow from the config."""

NO_EFFECT = frozenset({
    "architectures", "bos_token_id", "dtype", "eos_token_id", "model_type", "pad_token_id",
    "pretraining_tp", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
"""Fields of config.json that do not change any result here."""


@dataclass(frozen=True)
class Family:
    name: str
    """`model_type` in config.json"""
    architecture: str
    defaults: Mapping[str, Any]
    """values of the fields that config.json lacks"""
    windows: Callable[[Mapping[str, Any]], list[int | None]]
    """fields of config.json → attention window of each layer"""
    only: Mapping[str, tuple[Any, ...]]
    """fields that change results → the supported values"""
    traits: Callable[[Mapping[str, Any]], Mapping[str, bool]]
    """fields of config.json → the switches of `DecoderConfig` that this family sets"""


REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
"""Fields that have no default here; transformers would assume those of a 7B model."""

_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_ONLY = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "is_causal": (True,),
    "partial_rotary_factor": (1, None),
    "per_layer_config": (None,),
    "quantization_config": (None,),
}


def _windows_of_upper_layers(hf: Mapping[str, Any]) -> list[int | None]:
    """Windows by `layer_types` if present, else from layer `max_window_layers` up."""
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    depth = hf["num_hidden_layers"]
    if hf["layer_types"] is None:
        return [window if i >= hf["max_window_layers"] else None for i in range(depth)]
    kinds = {"full_attention": None, "sliding_attention": window}
    types = hf["layer_types"]
    if not isinstance(types, list) or len(types) != depth or not all(t in [*kinds] for t in types):
        found = sorted(set(map(str, types if isinstance(types, list) else [types])))
        number = f"{len(types)}: " if isinstance(types, list) else ""
        raise ValueError(
            f"layer_types must name one of {', '.join(kinds)} for each of the {depth} layers, "
            f"found {number}{', '.join(found)}"
        )
    return [kinds[kind] for kind in types]


_QWEN = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

FAMILIES = (
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        defaults={**_DEFAULTS, "max_position_embeddings": 2048, "attention_bias": False},
        windows=lambda hf: [None] * hf["num_hidden_layers"],
        only={**_ONLY, "mlp_bias": (False,)},
        traits=lambda hf: {"qkv_bias": hf["attention_bias"], "out_bias": hf["attention_bias"]},
    ),
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        defaults={
            **_DEFAULTS, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        windows=lambda hf: [hf["sliding_window"]] * hf["num_hidden_layers"],
        only={**_ONLY, "layer_types": (None,)},
        traits=lambda hf: {},
    ),
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        defaults={**_DEFAULTS, **_QWEN},
        windows=_windows_of_upper_layers,
        only=_ONLY,
        traits=lambda hf: {"qkv_bias": True},
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        defaults={**_DEFAULTS, **_QWEN, "head_dim": 128, "attention_bias": False},
        windows=_windows_of_upper_layers,
        only=_ONLY,
        traits=lambda hf: {
            "qk_norm": True, "qkv_bias": hf["attention_bias"], "out_bias": hf["attention_bias"],
        },
    ),
)  # fmt: skip
