"""The Hugging Face model families that the decoder supports, as data: what the config.json of each
means, in Llama's names of the fields, and how its files name their tensors."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtrain.model import rope, tables
from jaxtrain.model.config import Delta, Experts, Latent, LayerSpec
from jaxtrain.model.rope import Rope
from jaxtrain.model.tables import Layout, Table

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
    layers: Callable[[Mapping[str, Any], Mapping[str, Rope]], list[LayerSpec]]
    """fields of config.json, and its rope by type of layer, or `*` → the layers"""
    only: Mapping[str, tuple[Any, ...]]
    """fields that change results → the supported values"""
    traits: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    """fields of config.json → the options of `DecoderConfig` that this family sets"""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """its names of fields → Llama's"""
    ignored: tuple[str, ...] = ()
    """fields that it does not read, though others do"""
    ropes: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {"*": {"rope_theta": 10_000.0}}
    )
    """defaults of the rope fields, by type of layer; see `read_ropes`"""
    interleaved_rope: bool = False
    norm: Mapping[str, Any] = field(default_factory=dict)
    """options of `Norm`"""
    vocabulary: tuple[str, ...] = ("vocab_size",)
    """fields that count its tokens, which are equal"""
    default_ffn_ratio: int = 0
    """`intermediate_size` / `hidden_size` where a file has none; 0: it has to"""
    tensors: Table = field(default_factory=lambda: tables.LLAMA)
    layouts: tuple[Layout, ...] = (Layout(),)
    """ways in which files write tensors; exports without a source have the first"""
    modules: Layout | None = None
    """those of `in_memory`, where not as the first"""

    quantizations: tuple[str, ...] = ()
    """values of `quantization_config.quant_method` whose weights are read, as what they mean"""
    text: str | None = None
    """field of config.json that holds the fields of the text model"""
    carried: str | None = None
    """regular expression of tensors that are no part of the text model, exported as they are"""

    @property
    def in_memory(self) -> Layout:
        """How transformers names modules and parameters in memory."""
        return self.modules or self.layouts[0]

    def layout_of(self, names: Iterable[str]) -> Layout:
        """That of a file with these names of tensors."""
        telling = {"embed/embedding"}.union(*(way.tensors for way in self.layouts))

        def fits(way: Layout) -> bool:
            patterns = (way.pattern(self.table(way)[path][0].name) for path in telling)
            return all(any(re.fullmatch(p, name) for name in names) for p in patterns)

        return next(filter(fits, self.layouts), self.layouts[0])

    def table(self, layout: Layout) -> Table:
        """The tensors of a file of this layout."""
        return {**self.tensors, **layout.tensors}


class FieldError(ValueError):
    """What is wrong with a field of config.json that takes several to see."""

    def __init__(self, field: str, what: str):
        super().__init__(what)
        self.field = field


REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
"""Fields that have no default here; transformers would assume those of a 7B model."""

_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_ONLY = {
    "attention_dropout": (0, None),
    "is_causal": (True,),
    "partial_rotary_factor": (1, None),
    "per_layer_config": (None,),
    "quantization_config": (None,),
}


_PARTIAL_ONLY = {k: v for k, v in _ONLY.items() if k != "partial_rotary_factor"}


def _biases(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": hf["attention_bias"], "out_bias": hf["attention_bias"]}


def _equal_layers(hf: Mapping[str, Any], ropes: Mapping[str, Rope]) -> list[LayerSpec]:
    return [LayerSpec(hf.get("sliding_window"), ropes["*"])] * hf["num_hidden_layers"]


def _typed_layers(
    hf: Mapping[str, Any], ropes: Mapping[str, Rope], default: Iterable[bool]
) -> list[LayerSpec]:
    """Layers by `layer_types` if present, else by whether each has a window."""
    kinds, depth = ("full_attention", "sliding_attention"), hf["num_hidden_layers"]
    types = hf["layer_types"]
    if types is None:
        types = [kinds[has_window] for has_window in default]
    _check_types(types, kinds, depth)
    return [
        LayerSpec(hf["sliding_window"] if kind == kinds[1] else None, ropes.get("*") or ropes[kind])
        for kind in types
    ]


def _check_types(types: Any, kinds: Sequence[str], depth: int) -> None:
    if not isinstance(types, list) or len(types) != depth or not all(t in kinds for t in types):
        found = sorted(set(map(str, types if isinstance(types, list) else [types])))
        number = f"{len(types)}: " if isinstance(types, list) else ""
        raise ValueError(
            f"layer_types must name one of {', '.join(kinds)} for each of the {depth} layers, "
            f"found {number}{', '.join(found)}"
        )


def _layers_of_qwen(hf: Mapping[str, Any], ropes: Mapping[str, Rope]) -> list[LayerSpec]:
    """From layer `max_window_layers` up the layers have a window, if it is used at all."""
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    has_window = (i >= hf["max_window_layers"] for i in range(hf["num_hidden_layers"]))
    return _typed_layers({**hf, "sliding_window": window}, ropes, has_window)


def _windows_but_every(field: str) -> Callable[..., list[LayerSpec]]:
    """All layers but each n-th have a window; n is a field of config.json."""

    def layers(hf: Mapping[str, Any], ropes: Mapping[str, Rope]) -> list[LayerSpec]:
        has_window = ((i + 1) % hf[field] != 0 for i in range(hf["num_hidden_layers"]))
        return _typed_layers(hf, ropes, has_window)

    return layers


_IN_ONE: Any = {
    "layouts": (Layout(), Layout(tensors=tables.FUSED_EXPERTS)),
    "modules": Layout(tensors=tables.FUSED_EXPERTS),
}
"""Options of a family whose experts have tensors of their own in files, and one in memory."""
_EXPERTS = {
    "num_experts": None,
    "num_experts_per_tok": None,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
}


def _experts(
    hf: Mapping[str, Any], width: str, *, is_normalized: bool, **options: Any
) -> dict[str, Experts]:
    """`width` is the field that says how wide each is."""
    balance = float(hf["router_aux_loss_coef"]) if hf["output_router_logits"] else 0.0
    sizes = hf["num_experts"], hf["num_experts_per_tok"], hf[width]
    return {"experts": Experts(*sizes, is_normalized, balance_loss=balance, **options)}


def _expert_layers(hf: Mapping[str, Any], ropes: Mapping[str, Rope]) -> list[LayerSpec]:
    return [replace(layer, has_experts=True) for layer in _equal_layers(hf, ropes)]


def _layers_of_qwen3_moe(hf: Mapping[str, Any], ropes: Mapping[str, Rope]) -> list[LayerSpec]:
    """Each n-th layer has experts but those of `mlp_only_layers`; all have a window or none."""
    layer = LayerSpec(hf["sliding_window"] if hf["use_sliding_window"] else None, ropes["*"])
    every, dense = hf["decoder_sparse_step"], hf["mlp_only_layers"] or ()
    return [
        replace(layer, has_experts=(i + 1) % every == 0 and i not in dense)
        for i in range(hf["num_hidden_layers"])
    ]


def _layers_after_dense(hf: Mapping[str, Any], ropes: Mapping[str, Rope]) -> list[LayerSpec]:
    """All layers have experts but the first few."""
    dense = hf["first_k_dense_replace"]
    return [LayerSpec(None, ropes["*"], i >= dense) for i in range(hf["num_hidden_layers"])]


def _layers_of_deepseek(hf: Mapping[str, Any], ropes: Mapping[str, Rope]) -> list[LayerSpec]:
    ropes = {"*": replace(ropes["*"], interleaved=hf["rope_interleave"])}
    return [replace(layer, mixer="latent") for layer in _layers_after_dense(hf, ropes)]


def _layers_of_gpt_oss(hf: Mapping[str, Any], ropes: Mapping[str, Rope]) -> list[LayerSpec]:
    """Every other layer, from the first, has a window."""
    layers = _typed_layers(hf, ropes, (i % 2 == 0 for i in range(hf["num_hidden_layers"])))
    return [replace(layer, has_experts=True) for layer in layers]


_QWEN = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA = {
    **_DEFAULTS,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "max_position_embeddings": 8192,
}
_GEMMA_ONLY = {**_ONLY, "use_bidirectional_attention": (False, None)}


def _gemma(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {**_biases(hf), "embedding_scale": hf["hidden_size"] ** 0.5}


def _gemma1(hf: Mapping[str, Any]) -> dict[str, Any]:
    # The first files say gelu and mean its approximation.
    is_gelu = hf["hidden_act"] == "gelu"
    return {**_gemma(hf), **({"activation": "gelu_tanh"} if is_gelu else {})}


def _gemma2(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_gemma(hf),
        "norm_place": "around",
        "attention_scale": hf["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": hf["attn_logit_softcapping"],
        "logit_softcap": hf["final_logit_softcapping"],
    }


def _layers_of_gemma4(hf: Mapping[str, Any], ropes: Mapping[str, Rope]) -> list[LayerSpec]:
    """Every sixth layer and the last have no window; the last ones read keys and values of the last
    one of their type before them, and may have feed-forward layers of twice the width."""
    depth, num_reading, types = (
        hf[name] for name in ("num_hidden_layers", "num_kv_shared_layers", "layer_types")
    )
    if types is None:
        types = ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(depth)]
    if isinstance(types, list):
        types = [*types[:-1], "full_attention"]  # whatever a file says, as in transformers
    layers = _typed_layers({**hf, "layer_types": types}, ropes, ())
    first = depth - num_reading
    if first <= 0 or {*types[first:]} - {*types[:first]}:
        what = f"must leave a layer of each type of the last ones before them, found {num_reading}"
        raise FieldError("num_kv_shared_layers", what)
    if hf["hidden_size_per_layer_input"] and hf[PER_LAYER_TOKENS] != hf["vocab_size"]:
        what = f"must be vocab_size, {hf['vocab_size']}, found {hf[PER_LAYER_TOKENS]}"
        raise FieldError(PER_LAYER_TOKENS, what)
    if hf["enable_moe_block"]:
        for field, name in EXPERTS_OF_GEMMA4.items():
            if hf[name] is None:
                raise FieldError(field, "must be a positive whole number, found null")
        if (taken := hf["moe_experts_per_token"]) > (count := hf["moe_experts"]):
            raise FieldError("top_k_experts", f"must be at most {count}, found {taken}")
    sizes = _sizes_of_gemma4(hf, types)
    wide = 2 * hf["intermediate_size"] if hf["use_double_wide_mlp"] else None
    return [
        replace(
            layer,
            head_size=sizes[kind][0],
            num_kv_heads=sizes[kind][1],
            ffn_width=wide if i >= first else None,
            values_are_keys=hf["attention_k_eq_v"] and kind == "full_attention",
            has_experts=hf["enable_moe_block"],
            writes_keys=kind if i < first and kind in types[first:] else None,
            reads_keys=kind if i >= first else None,
        )
        for i, (kind, layer) in enumerate(zip(types, layers, strict=True))
    ]


def _sizes_of_gemma4(
    hf: Mapping[str, Any], types: Sequence[str]
) -> dict[str, tuple[int | None, int | None]]:
    """Type of layer → head size and number of key/value heads, None where as in the others."""
    by_layer = hf["per_layer_config"]
    if by_layer is None:
        full = {"head_dim": hf["global_head_dim"]}
        if hf["attention_k_eq_v"] and hf["num_global_key_value_heads"] is not None:
            full["num_key_value_heads"] = hf["num_global_key_value_heads"]
        by_layer = {str(i): full for i, kind in enumerate(types) if kind == "full_attention"}
    by_layer = {int(i): fields for i, fields in by_layer.items()}
    found: dict[str, set[tuple[int | None, int | None]]] = {}
    for i, kind in enumerate(types):
        size, heads = (by_layer.get(i, {}).get(name) for name in SIZES_OF_LAYER)
        size = None if size == hf["head_dim"] else size
        found.setdefault(kind, set()).add((size, None if heads == hf[SIZES_OF_LAYER[1]] else heads))
    if any(len(sizes) > 1 for sizes in found.values()) or set(by_layer) - {*range(len(types))}:
        what = f"must have the same for all layers of a type, and only for the {len(types)} layers"
        raise FieldError("per_layer_config", what)
    all_heads = hf["num_attention_heads"]
    for ((size, heads),) in found.values():
        if (size or 2) % 2 or all_heads % (heads or 1):
            what = f"must be even head sizes, and divisors of the {all_heads} attention heads"
            raise FieldError("per_layer_config", f"{what}, found {size} and {heads}")
    return {kind: next(iter(sizes)) for kind, sizes in found.items()}


def _gemma4(hf: Mapping[str, Any]) -> dict[str, Any]:
    experts = None
    if hf["enable_moe_block"]:
        sizes = (hf[name] for name in EXPERTS_OF_GEMMA4.values())
        experts = Experts(*sizes, is_beside_mlp=True)
    return {
        **_gemma(hf),
        "experts": experts,
        "qk_norm": "head",
        "v_norm": True,
        "norm_place": "around",
        "attention_scale": 1.0,
        "logit_softcap": hf["final_logit_softcapping"],
        "per_layer_width": hf["hidden_size_per_layer_input"] or 0,
        "has_layer_scale": True,
    }


EXPERTS_OF_GEMMA4 = {
    "num_experts": "moe_experts",
    "top_k_experts": "moe_experts_per_token",
    "moe_intermediate_size": "moe_width",
}
"""Its names → ours, since they may be null in models without experts."""
PER_LAYER_TOKENS = "vocab_size_per_layer_input"
SIZES_OF_LAYER = ("head_dim", "num_key_value_heads")
"""Fields of `per_layer_config` that are read."""


def _olmo(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {**_biases(hf), "qk_norm": "all_heads", "norm_place": "after"}


def _layers_of_smollm3(hf: Mapping[str, Any], ropes: Mapping[str, Rope]) -> list[LayerSpec]:
    """A layer with 0 in `no_rope_layers`, by default each n-th, has no rope, and may have a window
    in its place."""
    depth, every = hf["num_hidden_layers"], hf["no_rope_layer_interval"]
    has_rope = hf["no_rope_layers"]
    if has_rope is None:
        has_rope = [int((i + 1) % every != 0) for i in range(depth)]
    if not isinstance(has_rope, list) or len(has_rope) < depth:
        raise ValueError(
            f"no_rope_layers must have a 0 or 1 for each of the {depth} layers, found {has_rope}"
        )
    windows = hf["use_sliding_window"] and hf["sliding_window"] is not None
    layers = _typed_layers(hf, ropes, (windows and not rope for rope in has_rope[:depth]))
    return [
        layer if rope else replace(layer, rope=None)
        for layer, rope in zip(layers, has_rope, strict=False)
    ]


def _layers_of_cohere2(hf: Mapping[str, Any], ropes: Mapping[str, Rope]) -> list[LayerSpec]:
    """Layers with a window are rotated, the others are not."""
    layers = _windows_but_every("sliding_window_pattern")(hf, ropes)
    return [layer if layer.window else replace(layer, rope=None) for layer in layers]


_GRANITE = {
    **_DEFAULTS,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
}


def _layers_with_states(
    hf: Mapping[str, Any], ropes: Mapping[str, Rope], kind: str, mixer: Any, default: Iterable[bool]
) -> list[LayerSpec]:
    """Layers of attention and those of another mixer, whose name is `kind`, by `layer_types` if
    present, else by whether each is of attention."""
    types, depth = hf["layer_types"], hf["num_hidden_layers"]
    if types is None:
        types = ["full_attention" if is_full else kind for is_full in default]
    _check_types(types, (kind, "full_attention"), depth)
    full, other = LayerSpec(rope=ropes["*"]), LayerSpec(mixer=mixer)
    return [full if one == "full_attention" else other for one in types]


def _layers_of_qwen3_5(hf: Mapping[str, Any], ropes: Mapping[str, Rope]) -> list[LayerSpec]:
    every, depth = hf["full_attention_interval"], hf["num_hidden_layers"]
    is_full = ((i + 1) % every == 0 for i in range(depth))
    return _layers_with_states(hf, ropes, "linear_attention", "delta", is_full)


def _qwen3_5(hf: Mapping[str, Any]) -> dict[str, Any]:
    names = (
        "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
        "linear_value_head_dim", "linear_conv_kernel_dim",
    )  # fmt: skip
    delta = Delta(*(hf[name] for name in names))
    return {**_biases(hf), "qk_norm": "head", "gated_attention": True, "delta": delta}


def _layers_of_lfm2(hf: Mapping[str, Any], ropes: Mapping[str, Rope]) -> list[LayerSpec]:
    depth, full = hf["num_hidden_layers"], hf["full_attn_idxs"]
    is_full = (full is None or i in full for i in range(depth))
    return _layers_with_states(hf, ropes, "conv", "conv", is_full)


def _lfm2(hf: Mapping[str, Any]) -> dict[str, Any]:
    width = hf["intermediate_size"]
    if hf["block_auto_adjust_ff_dim"]:
        width, unit = int(2 * width / 3), hf["block_multiple_of"]
        width = -(-int(hf["block_ffn_dim_multiplier"] * width) // unit) * unit
    return {
        "ffn_width": width, "qk_norm": "head", "conv_taps": hf["conv_L_cache"],
        "conv_bias": hf["conv_bias"],
    }  # fmt: skip


def _layers_of_granite4(hf: Mapping[str, Any], ropes: Mapping[str, Rope]) -> list[LayerSpec]:
    """Equal layers; those of its hybrids are not supported."""
    depth, types = hf["num_hidden_layers"], hf["layer_types"]
    if types not in ([kind] * depth for kind in ("attention", "full_attention")):
        what = f"must be full_attention for each of the {depth} layers"
        raise ValueError(f"layer_types {what}, found {types}")
    rope = ropes["*"] if hf["position_embedding_type"] == "rope" else None
    return [LayerSpec(rope=rope)] * depth


def _granite(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_biases(hf),
        "mlp_bias": hf["mlp_bias"],
        "embedding_scale": hf["embedding_multiplier"],
        "residual_scale": hf["residual_multiplier"],
        "attention_scale": hf["attention_multiplier"],
        "logit_scale": 1 / hf["logits_scaling"],
    }


_SHARED_EXPERTS = {
    **_EXPERTS,
    "moe_intermediate_size": None,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
}


def _shared_experts(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Chosen by scores with a bias, beside those that every token takes. Its config.json may ask
    for the logits of routers, and no loss of them."""
    width = "moe_intermediate_size"
    experts = _experts(
        {**hf, "output_router_logits": False}, width, is_normalized=hf["norm_topk_prob"],
        scores="sigmoid", has_choice_bias=True, groups=hf["n_group"],
        groups_per_token=hf["topk_group"], share_scale=float(hf["routed_scaling_factor"]),
        shared_width=hf["n_shared_experts"] * hf[width],
    )  # fmt: skip
    return {**experts, "num_layers_behind": hf["num_nextn_predict_layers"]}


def _deepseek(hf: Mapping[str, Any]) -> dict[str, Any]:
    latent = Latent(hf["q_lora_rank"], hf["kv_lora_rank"], hf["qk_nope_head_dim"], hf["v_head_dim"])
    return {**_biases(hf), **_shared_experts(hf), "latent": latent}


def _gpt2(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "gated_mlp": False,
        "learned_positions": True,
        "attention_scale": None if hf["scale_attn_weights"] else 1.0,
    }


def _gpt_neox(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_biases(hf),
        "mlp_bias": True,
        "gated_mlp": False,
        "parallel_block": hf["use_parallel_residual"],
    }


LLAMA_FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    defaults={
        **_DEFAULTS, "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False,
    },
    layers=_equal_layers,
    only={**_ONLY},
    traits=lambda hf: {**_biases(hf), "mlp_bias": hf["mlp_bias"]},
    ignored=("sliding_window",),
)  # fmt: skip
GEMMA3 = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    defaults={
        **_GEMMA, "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
        "max_position_embeddings": 131072, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "sliding_window_pattern": 6, "layer_types": None, "final_logit_softcapping": None,
    },
    layers=_windows_but_every("sliding_window_pattern"),
    only=_GEMMA_ONLY,
    traits=lambda hf: {
        **_gemma(hf), "qk_norm": "head", "norm_place": "around",
        "attention_scale": hf["query_pre_attn_scalar"] ** -0.5,
        "logit_softcap": hf["final_logit_softcapping"],
    },
    aliases={"hidden_activation": "hidden_act"},
    ignored=("hidden_act", "attn_logit_softcapping"),
    ropes={
        "full_attention": {"rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_theta": 10_000.0},
    },
    norm={"zero_centered": True},
    tensors={**tables.LLAMA, **tables.POST_NORMS},
)  # fmt: skip
QWEN3_5 = Family(
    name="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    defaults={
        **_DEFAULTS, "num_key_value_heads": 4, "head_dim": 256, "attention_bias": False,
        "layer_types": None, "full_attention_interval": 4, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    },
    layers=_layers_of_qwen3_5,
    only={**_PARTIAL_ONLY, "attn_output_gate": (True,)},
    traits=_qwen3_5,
    ignored=("sliding_window",),
    ropes={"*": {"rope_theta": 10_000.0, "partial_rotary_factor": 0.25}},
    norm={"zero_centered": True},
    tensors={**tables.LLAMA, **tables.GATED_QKV, **tables.DELTA},
)  # fmt: skip
QWEN3_5_MOE = replace(
    QWEN3_5,
    name="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    defaults={
        **QWEN3_5.defaults, **_EXPERTS, "num_key_value_heads": 2, "moe_intermediate_size": 512,
    },
    layers=lambda hf, ropes: [
        replace(layer, has_experts=True) for layer in _layers_of_qwen3_5(hf, ropes)
    ],
    traits=lambda hf: {
        **_qwen3_5(hf),
        **_experts(
            hf, "moe_intermediate_size", is_normalized=True, has_shared_gate=True,
            shared_width=hf["intermediate_size"],
        ),
    },
    aliases={
        "shared_expert_intermediate_size": "intermediate_size", "num_local_experts": "num_experts",
    },
    ignored=("sliding_window", "intermediate_size"),
    tensors={**QWEN3_5.tensors, **tables.EXPERTS, **tables.SHARED_EXPERT},
    **_IN_ONE,
)  # fmt: skip


GEMMA4 = Family(
    name="gemma4_text",
    architecture="Gemma4ForCausalLM",
    defaults={
        **_GEMMA, "num_key_value_heads": 4, "max_position_embeddings": 131072,
        "sliding_window": 512, "layer_types": None, "final_logit_softcapping": None,
        "per_layer_config": None, "global_head_dim": 512, "num_global_key_value_heads": None,
        "attention_k_eq_v": False, "num_kv_shared_layers": 0, "use_double_wide_mlp": False,
        "enable_moe_block": False, **dict.fromkeys(EXPERTS_OF_GEMMA4.values()),
        "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional", "rope_theta": 1_000_000.0,
                "partial_rotary_factor": 0.25,
            },
            "sliding_attention": {"rope_theta": 10_000.0},
        },
    },
    layers=_layers_of_gemma4,
    only={
        **{k: v for k, v in _ONLY.items() if k != "per_layer_config"},
        "use_bidirectional_attention": (None, "vision"),
    },
    traits=_gemma4,
    aliases={"hidden_activation": "hidden_act", **EXPERTS_OF_GEMMA4},
    ignored=(
        "hidden_act", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor",
        "original_max_position_embeddings",
    ),
    ropes={
        "full_attention": {"rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_theta": 10_000.0},
    },
    vocabulary=("vocab_size", PER_LAYER_TOKENS),
    tensors={**tables.LLAMA, **tables.GEMMA4},
)  # fmt: skip


def _multimodal(text: Family, name: str, carried: str, layouts: tuple[Layout, ...] = ()) -> Family:
    """Folders that hold a text model under `model.language_model`, or as `layouts` say, and other
    parts, whose tensors match `carried`."""
    starts = (("model.", "model.language_model."),)
    inner = tuple(layout._replace(starts=starts) for layout in text.layouts)
    return replace(
        text,
        name=name,
        architecture=text.architecture.replace("CausalLM", "ConditionalGeneration"),
        only={**text.only, "model_type": (text.name, None)},
        layouts=(*layouts, *inner),
        modules=(text.modules or inner[0])._replace(starts=starts),
        text="text_config",
        carried=carried,
    )


FAMILIES: Sequence[Family] = (
    LLAMA_FAMILY,
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        defaults={
            **_DEFAULTS, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        layers=_equal_layers,
        only={**_ONLY, "layer_types": (None,)},
        traits=lambda hf: {},
    ),
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        defaults={**_DEFAULTS, **_QWEN},
        layers=_layers_of_qwen,
        only=_ONLY,
        traits=lambda hf: {"qkv_bias": True},
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        defaults={**_DEFAULTS, **_QWEN, "head_dim": 128, "attention_bias": False},
        layers=_layers_of_qwen,
        only=_ONLY,
        traits=lambda hf: {**_biases(hf), "qk_norm": "head"},
    ),
    Family(
        name="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        defaults={
            **_DEFAULTS, **_EXPERTS, "num_key_value_heads": 4, "attention_bias": False,
            "use_sliding_window": False, "sliding_window": 4096, "decoder_sparse_step": 1,
            "moe_intermediate_size": 768, "norm_topk_prob": False, "mlp_only_layers": None,
        },
        layers=_layers_of_qwen3_moe,
        only=_ONLY,
        traits=lambda hf: {
            **_biases(hf), "qk_norm": "head",
            **_experts(hf, "moe_intermediate_size", is_normalized=hf["norm_topk_prob"]),
        },
        aliases={"num_local_experts": "num_experts"},
        tensors={**tables.LLAMA, **tables.EXPERTS},
        **_IN_ONE,
    ),
    Family(
        name="mixtral",
        architecture="MixtralForCausalLM",
        defaults={
            **_DEFAULTS, **_EXPERTS, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072, "sliding_window": None, "num_experts_per_tok": 2,
        },
        layers=_expert_layers,
        only={**_ONLY, "router_jitter_noise": (0,), "layer_types": (None,)},
        traits=lambda hf: _experts(hf, "intermediate_size", is_normalized=True),
        aliases={"num_local_experts": "num_experts"},
        ropes={"*": {"rope_theta": 1_000_000.0}},
        tensors={**tables.ALL_EXPERTS, **tables.MIXTRAL},
        **_IN_ONE,
    ),
    Family(
        name="olmoe",
        architecture="OlmoeForCausalLM",
        defaults={
            **_DEFAULTS, **_EXPERTS, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "attention_bias": False, "norm_topk_prob": False, "router_aux_loss_coef": 0.01,
        },
        layers=_expert_layers,
        only={**_ONLY, "clip_qkv": (None,), "layer_types": (None,)},
        traits=lambda hf: {
            **_biases(hf), "qk_norm": "all_heads",
            **_experts(hf, "intermediate_size", is_normalized=hf["norm_topk_prob"]),
        },
        aliases={"num_local_experts": "num_experts"},
        ignored=("sliding_window",),
        tensors={**tables.ALL_EXPERTS, **tables.OLMO, **tables.EXPERTS},
        **_IN_ONE,
    ),
    Family(
        name="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        defaults={
            **_DEFAULTS, **_SHARED_EXPERTS, "head_dim": 64, "max_position_embeddings": 4096,
            "attention_bias": False, "num_experts": 256, "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048, "routed_scaling_factor": 2.5, "n_group": 8,
            "topk_group": 4, "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "v_head_dim": 128, "rope_interleave": True,
        },
        layers=_layers_of_deepseek,
        only={
            **_ONLY, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",),
            "moe_layer_freq": (1,),
        },
        traits=_deepseek,
        aliases={
            "n_routed_experts": "num_experts", "num_local_experts": "num_experts",
            "num_mtp_layers": "num_nextn_predict_layers", "qk_rope_head_dim": "head_dim",
        },
        ignored=("head_dim", "num_key_value_heads", "num_experts", "sliding_window"),
        ropes={"*": {"rope_theta": 10_000.0, "mscale_all_dim": 0}},
        tensors={
            **{k: v for k, v in tables.LLAMA.items() if "/qkv" not in k}, **tables.LATENT,
            **tables.SHARED_EXPERTS,
        },
        **_IN_ONE,
        quantizations=("fp8",),
    ),
    Family(
        name="glm4_moe",
        architecture="Glm4MoeForCausalLM",
        defaults={
            **_DEFAULTS, **_SHARED_EXPERTS, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072, "attention_bias": False, "use_qk_norm": False,
            "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408,
            "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        layers=_layers_after_dense,
        only=_PARTIAL_ONLY,
        traits=lambda hf: {
            **_shared_experts(hf), "qkv_bias": hf["attention_bias"],
            "qk_norm": "head" if hf["use_qk_norm"] else None,
        },
        aliases={
            "n_routed_experts": "num_experts", "num_local_experts": "num_experts",
            "num_mtp_layers": "num_nextn_predict_layers",
        },
        ignored=("num_experts", "sliding_window"),
        ropes={"*": {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}},
        tensors={**tables.LLAMA, **tables.SHARED_EXPERTS},
        **_IN_ONE,
    ),
    Family(
        name="gpt_oss",
        architecture="GptOssForCausalLM",
        defaults={
            **_DEFAULTS, **_EXPERTS, "num_key_value_heads": 8, "head_dim": 64,
            "sliding_window": 128, "layer_types": None, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072, "attention_bias": True, "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0, "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 150_000.0, "factor": 32.0, "beta_fast": 32.0,
                "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096,
            },
        },
        layers=_layers_of_gpt_oss,
        only=_ONLY,
        traits=lambda hf: {
            **_biases(hf), "attention_sinks": True,
            **_experts(
                hf, "intermediate_size", is_normalized=True, has_bias=True,
                swiglu_alpha=float(hf["swiglu_alpha"]), swiglu_limit=float(hf["swiglu_limit"]),
            ),
        },
        aliases={"num_local_experts": "num_experts"},
        ignored=("hidden_act",),
        ropes={"*": {"rope_theta": 150_000.0}},
        tensors={**tables.ALL_EXPERTS, **tables.GPT_OSS},
        quantizations=("mxfp4",),
    ),
    GEMMA3,
    _multimodal(
        GEMMA3,
        "gemma3",
        r"(model\.)?(vision_tower|multi_modal_projector)\..*",
        (Layout((("model.", "language_model.model."), ("", "language_model."))),),
    ),
    QWEN3_5,
    _multimodal(QWEN3_5, "qwen3_5", r"(mtp|model\.visual)\..*"),
    QWEN3_5_MOE,
    _multimodal(QWEN3_5_MOE, "qwen3_5_moe", r"(mtp|model\.visual)\..*"),
    Family(
        name="lfm2",
        architecture="Lfm2ForCausalLM",
        defaults={
            **_DEFAULTS, "num_key_value_heads": 8, "max_position_embeddings": 128_000,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "layer_types": None,
            "full_attn_idxs": None, "conv_L_cache": 3, "conv_bias": False,
            "block_auto_adjust_ff_dim": True, "block_multiple_of": 256,
            "block_ffn_dim_multiplier": 1.0,
        },
        layers=_layers_of_lfm2,
        only=_ONLY,
        traits=_lfm2,
        aliases={
            "norm_eps": "rms_norm_eps", "block_ff_dim": "intermediate_size",
            "tie_embedding": "tie_word_embeddings",
        },
        ignored=("rms_norm_eps", "hidden_act", "sliding_window"),
        ropes={"*": {"rope_theta": 1_000_000.0}},
        tensors={**tables.LLAMA, **tables.LFM2},
    ),
    GEMMA4,
    _multimodal(GEMMA4, "gemma4", r"model\.(vision_tower|audio_tower|embed_(vision|audio))\..*"),
    Family(
        name="gemma",
        architecture="GemmaForCausalLM",
        defaults={**_GEMMA, "num_key_value_heads": 16},
        layers=_equal_layers,
        only=_GEMMA_ONLY,
        traits=_gemma1,
        ignored=("hidden_activation", "sliding_window"),
        norm={"zero_centered": True},
    ),
    Family(
        name="gemma2",
        architecture="Gemma2ForCausalLM",
        defaults={
            **_GEMMA, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
            "sliding_window": 4096, "layer_types": None, "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        layers=lambda hf, ropes: _typed_layers(
            hf, ropes, (i % 2 == 0 for i in range(hf["num_hidden_layers"]))
        ),
        only=_GEMMA_ONLY,
        traits=_gemma2,
        aliases={"hidden_activation": "hidden_act"},
        ignored=("hidden_act",),
        norm={"zero_centered": True},
        tensors={**tables.LLAMA, **tables.POST_NORMS},
    ),
    Family(
        name="smollm3",
        architecture="SmolLM3ForCausalLM",
        defaults={
            **_DEFAULTS, "num_key_value_heads": 4, "tie_word_embeddings": True,
            "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
            "sliding_window": None, "no_rope_layers": None, "no_rope_layer_interval": 4,
            "layer_types": None,
        },
        layers=_layers_of_smollm3,
        only=_ONLY,
        traits=lambda hf: {**_biases(hf), "mlp_bias": hf["mlp_bias"]},
        ropes={"*": {"rope_theta": 2_000_000.0}},
    ),
    Family(
        name="olmo2",
        architecture="Olmo2ForCausalLM",
        defaults={
            **_DEFAULTS, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
            "attention_bias": False,
        },
        layers=_equal_layers,
        only=_ONLY,
        traits=_olmo,
        ignored=("sliding_window",),
        tensors={**tables.LLAMA, **tables.POST_NORMS, **tables.OLMO},
    ),
    Family(
        name="olmo3",
        architecture="Olmo3ForCausalLM",
        defaults={
            **_DEFAULTS, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
            "attention_bias": False, "sliding_window": 4096, "layer_types": None,
        },
        layers=lambda hf, ropes: _typed_layers(
            hf, ropes, ((i + 1) % 4 != 0 for i in range(hf["num_hidden_layers"]))
        ),
        only=_ONLY,
        traits=_olmo,
        ropes={
            "full_attention": {"rope_theta": 500_000.0},
            "sliding_attention": {"rope_theta": 500_000.0},
        },
        tensors={**tables.LLAMA, **tables.POST_NORMS, **tables.OLMO},
    ),
    Family(
        name="phi3",
        architecture="Phi3ForCausalLM",
        defaults={
            **_DEFAULTS, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "original_max_position_embeddings": 4096, "sliding_window": None,
        },
        layers=_equal_layers,
        only={
            **_PARTIAL_ONLY, "resid_pdrop": (0,), "embd_pdrop": (0,), "layer_types": (None,),
        },
        traits=lambda hf: {},
        ropes={"*": {"rope_theta": 10_000.0, "partial_rotary_factor": 1.0}},
        tensors={**tables.LLAMA, **tables.FUSED_QKV, **tables.FUSED_GATE},
    ),
    Family(
        name="granite",
        architecture="GraniteForCausalLM",
        defaults=_GRANITE,
        layers=_equal_layers,
        only=_ONLY,
        traits=_granite,
        ignored=("sliding_window",),
    ),
    Family(
        name="granitemoehybrid",
        architecture="GraniteMoeHybridForCausalLM",
        defaults={
            **_GRANITE, "position_embedding_type": None, "layer_types": None,
            "num_local_experts": 8,
        },
        layers=_layers_of_granite4,
        only={
            **_ONLY, "num_local_experts": (0,), "position_embedding_type": ("rope", "nope", None),
        },
        traits=_granite,
        aliases={
            "shared_intermediate_size": "intermediate_size", "layers_block_type": "layer_types",
        },
        ignored=("intermediate_size", "mlp_bias", "sliding_window"),
        tensors={**tables.LLAMA, **tables.SHARED_MLP},
    ),
    Family(
        name="ministral3",
        architecture="Ministral3ForCausalLM",
        defaults={
            **_DEFAULTS, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 262144, "sliding_window": None,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0,
                "original_max_position_embeddings": 16384, "beta_fast": 32.0, "beta_slow": 1.0,
                "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
            },
        },
        layers=_equal_layers,
        only={**_ONLY, "layer_types": (None,)},
        traits=lambda hf: {},
        ropes={"*": {"rope_theta": 10_000.0, "llama_4_scaling_beta": 0}},
    ),
    Family(
        name="glm4",
        architecture="Glm4ForCausalLM",
        defaults={
            **_DEFAULTS, "num_key_value_heads": 2, "head_dim": 128, "attention_bias": True,
            "max_position_embeddings": 131072, "rms_norm_eps": 0.00000015625,
        },
        layers=_equal_layers,
        only=_PARTIAL_ONLY,
        traits=lambda hf: {"qkv_bias": hf["attention_bias"], "norm_place": "around"},
        ignored=("sliding_window",),
        ropes={"*": {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}},
        interleaved_rope=True,
        tensors={**tables.LLAMA, **tables.FUSED_GATE, **tables.GLM_NORMS},
    ),
    Family(
        name="cohere2",
        architecture="Cohere2ForCausalLM",
        defaults={
            **_DEFAULTS, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True, "attention_bias": False, "logit_scale": 0.0625,
            "sliding_window": 4096, "sliding_window_pattern": 4, "layer_types": None,
        },
        layers=_layers_of_cohere2,
        only=_ONLY,
        traits=lambda hf: {
            **_biases(hf), "logit_scale": hf["logit_scale"], "parallel_block": True,
            "shared_norm": True,
        },
        aliases={"layer_norm_eps": "rms_norm_eps"},
        ignored=("rms_norm_eps", "head_dim"),
        interleaved_rope=True,
        norm={"kind": "layer"},
    ),
    Family(
        name="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        defaults={
            **_DEFAULTS, "hidden_act": "gelu", "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5, "attention_bias": True, "use_parallel_residual": True,
        },
        layers=_equal_layers,
        only={**_PARTIAL_ONLY, "hidden_dropout": (0,), "head_dim": (None,)},
        traits=_gpt_neox,
        aliases={
            "layer_norm_eps": "rms_norm_eps", "rotary_pct": "partial_rotary_factor",
            "rotary_emb_base": "rope_theta",
        },
        ignored=(
            "rms_norm_eps", "num_key_value_heads", "sliding_window", "rope_theta",
            "partial_rotary_factor",
        ),
        ropes={"*": {"rope_theta": 10_000.0, "partial_rotary_factor": 0.25}},
        norm={"kind": "layer", "has_bias": True},
        tensors=tables.GPT_NEOX,
        layouts=(Layout((("model.", "gpt_neox."), ("lm_head.", "embed_out."))),),
    ),
    Family(
        name="gpt2",
        architecture="GPT2LMHeadModel",
        defaults={
            **_DEFAULTS, "hidden_act": "gelu_new", "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "scale_attn_weights": True,
        },
        default_ffn_ratio=4,
        layers=lambda hf, ropes: [LayerSpec()] * hf["num_hidden_layers"],
        only={
            **_PARTIAL_ONLY, "resid_pdrop": (0,), "embd_pdrop": (0,), "attn_pdrop": (0,),
            "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
        },
        traits=_gpt2,
        aliases={
            "n_embd": "hidden_size", "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads", "n_positions": "max_position_embeddings",
            "n_inner": "intermediate_size", "layer_norm_epsilon": "rms_norm_eps",
            "activation_function": "hidden_act",
        },
        ignored=(
            "rms_norm_eps", "hidden_act", "head_dim", "num_key_value_heads", "intermediate_size",
            *rope.FIELDS,
        ),
        norm={"kind": "layer", "has_bias": True},
        tensors=tables.GPT2,
        layouts=(
            Layout((("model.", "transformer."),)),
            Layout((("lm_head.", "lm_head."), ("model.", ""))),
        ),
    ),
)  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}
