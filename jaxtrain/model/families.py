"""The families of Hugging Face models that the decoder covers, as data.

A family says what its config.json means and how its tensors map to our parameters; the table of
tensors is read in both directions, so that loading and exporting cannot disagree. The dimensions of
a tensor are written in letters: `KGH D` is [K * G * H, D].

D width, K key/value heads, G query heads to each, H head size, F feed-forward, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Tensor(NamedTuple):
    """One tensor of a Hugging Face file, and the part of our parameter that it fills."""

    name: str
    """With `{i}` for the number of the layer."""
    dims: str
    """As in the file."""
    ours: str
    """The same letters in the order of our parameter; 1 for a dimension that the file lacks."""


class Row(NamedTuple):
    """One parameter, without the leading L of stacked ones."""

    path: str
    """`attention/qkv` stands for `layers/<group>/<member>/attention/qkv`."""
    tensors: tuple[Tensor, ...]
    joined: int | None = None
    """The dimension along which several tensors stand one after another."""


def _attention(kind: str, ours: tuple[str, str, str], dims: tuple[str, str]) -> tuple[Tensor, ...]:
    q, kv = dims
    return tuple(
        Tensor(f"model.layers.{{i}}.self_attn.{letter}_proj.{kind}", form, mine)
        for letter, form, mine in zip("qkv", (q, kv, kv), ours, strict=True)
    )


def _layer(name: str, dims: str, ours: str) -> Tensor:
    return Tensor(f"model.layers.{{i}}.{name}", dims, ours)


ROWS = (
    Row("embed/embedding", (Tensor("model.embed_tokens.weight", "V D", "V D"),)),
    Row("attention_norm", (_layer("input_layernorm.weight", "D", "D"),)),
    Row(
        "attention/qkv",
        _attention("weight", ("D K G H", "D K 1 H", "D K 1 H"), ("KGH D", "KH D")),
        2,
    ),
    Row("attention/out", (_layer("self_attn.o_proj.weight", "D KGH", "K G H D"),)),
    Row("mlp_norm", (_layer("post_attention_layernorm.weight", "D", "D"),)),
    Row(
        "mlp/gate_up",
        (
            _layer("mlp.gate_proj.weight", "F D", "D 1 F"),
            _layer("mlp.up_proj.weight", "F D", "D 1 F"),
        ),
        1,
    ),
    Row("mlp/down", (_layer("mlp.down_proj.weight", "D F", "F D"),)),
    Row("norm", (Tensor("model.norm.weight", "D", "D"),)),
    Row("head", (Tensor("lm_head.weight", "V D", "D V"),)),
)
QKV_BIAS = Row(
    "attention/qkv_bias", _attention("bias", ("K G H", "K 1 H", "K 1 H"), ("KGH", "KH")), 1
)
OUT_BIAS = Row("attention/out_bias", (_layer("self_attn.o_proj.bias", "D", "D"),))
QK_NORM = (
    Row("attention/q_norm", (_layer("self_attn.q_norm.weight", "H", "H"),)),
    Row("attention/k_norm", (_layer("self_attn.k_norm.weight", "H", "H"),)),
)

HARMLESS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")
"""Tensors of old files that nobody needs: they are computed from the config."""

NO_EFFECT = frozenset({
    "architectures", "bos_token_id", "dtype", "eos_token_id", "model_type", "pad_token_id",
    "pretraining_tp", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
"""Fields of config.json that change nothing that is computed here."""


@dataclass(frozen=True)
class Family:
    name: str
    """`model_type` in config.json"""
    architecture: str
    rows: tuple[Row, ...]
    defaults: Mapping[str, Any]
    """What a field means when config.json lacks it."""
    windows: Callable[[Mapping[str, Any]], list[int | None]]
    """Attention window of each layer, from the fields of config.json."""
    only: Mapping[str, tuple[Any, ...]]
    """Fields that change results, with the values that are built in."""
    traits: Callable[[Mapping[str, Any]], Mapping[str, bool]]
    """The switches of `DecoderConfig` that this family sets."""


REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
"""Fields without which there is no model; transformers would take those of a 7B one."""

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
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}


def _everywhere(hf: Mapping[str, Any]) -> list[int | None]:
    return [hf["sliding_window"]] * hf["num_hidden_layers"]


def _upper_layers(hf: Mapping[str, Any]) -> list[int | None]:
    """By `layer_types` if there, else from layer `max_window_layers` up; only where switched on."""
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    depth = hf["num_hidden_layers"]
    if hf["layer_types"] is None:
        return [window if i >= hf["max_window_layers"] else None for i in range(depth)]
    kinds = {"full_attention": None, "sliding_attention": window}
    if len(hf["layer_types"]) != depth or not set(hf["layer_types"]) <= set(kinds):
        raise ValueError(
            f"layer_types must give one of {', '.join(kinds)} for each of the {depth} layers, "
            f"found {len(hf['layer_types'])}: {', '.join(sorted(set(map(str, hf['layer_types']))))}"
        )
    return [kinds[kind] for kind in hf["layer_types"]]


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
        rows=(*ROWS, QKV_BIAS, OUT_BIAS),
        defaults={**_DEFAULTS, "max_position_embeddings": 2048, "attention_bias": False},
        windows=lambda hf: [None] * hf["num_hidden_layers"],
        only={**_ONLY, "mlp_bias": (False,)},
        traits=lambda hf: {"qkv_bias": hf["attention_bias"], "out_bias": hf["attention_bias"]},
    ),
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        rows=ROWS,
        defaults={
            **_DEFAULTS, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        windows=_everywhere,
        only={**_ONLY, "layer_types": (None,)},
        traits=lambda hf: {},
    ),
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        rows=(*ROWS, QKV_BIAS),
        defaults={**_DEFAULTS, **_QWEN},
        windows=_upper_layers,
        only=_ONLY,
        traits=lambda hf: {"qkv_bias": True},
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        rows=(*ROWS, QKV_BIAS, OUT_BIAS, *QK_NORM),
        defaults={**_DEFAULTS, **_QWEN, "head_dim": 128, "attention_bias": False},
        windows=_upper_layers,
        only=_ONLY,
        traits=lambda hf: {
            "qk_norm": True, "qkv_bias": hf["attention_bias"], "out_bias": hf["attention_bias"],
        },
    ),
)  # fmt: skip
