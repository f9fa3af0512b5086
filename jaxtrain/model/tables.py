"""The tensors of Hugging Face files, as tables that are read in both directions, so that loading
and exporting cannot disagree. The dimensions of a tensor are written in letters: `KGH D` is
[K * G * H, D].

D width, K key/value heads, G query heads to each, Q = G, or 2 G with gates, H head size, F feed-
forward, E experts, M feed-forward of each, S of those shared, P positions, V vocabulary,
X layers, I channels of a layer's own input.

Of latent attention: Q and C numbers of which queries and the rest are made, A these and the rotated
channels, H channels of a query, X of a value, W of a key and a value together that are not rotated.
Of the delta rule and of convolutions: J key heads, W value heads to each, A key size, C value size,
X = W C, S taps, Y channels of a convolution.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple


class Tensor(NamedTuple):
    """One tensor of a Hugging Face file, or rows of it, and the part of our parameter it fills."""

    name: str
    """`{i}` stands for the number of the layer, `{e}` for that of the expert; where a name occurs
    again, its next rows follow"""
    dims: str
    """dimensions in the file"""
    ours: str
    """the same letters in the order of our parameter; 1 for a dimension that the file lacks, along
    which several tensors are concatenated, else along the last; E where each expert has a tensor of
    its own; a dimension of length 1 in the file may lack"""


Table = Mapping[str, tuple[Tensor, ...]]
"""Path of a parameter, without the leading L of stacked ones → its tensors; `attention/qkv` is
`layers/<group>/<member>/attention/qkv`."""


def tensors(*lines: str, layer: str = "model.layers.{i}") -> tuple[Tensor, ...]:
    """Parses `name: dimensions -> ours`; a name that begins with a dot belongs to a layer."""
    parts = (line.replace(" -> ", ": ").split(": ") for line in lines)
    full = lambda name: layer + name if name.startswith(".") else name
    return tuple(Tensor(full(name), *dims) for name, *dims in parts)


LLAMA: Table = {
    "embed/embedding": tensors("model.embed_tokens.weight: V D -> V D"),
    "attention_norm": tensors(".input_layernorm.weight: D -> D"),
    "attention/qkv": tensors(
        ".self_attn.q_proj.weight: KGH D -> D K G H",
        ".self_attn.k_proj.weight: KH D -> D K 1 H",
        ".self_attn.v_proj.weight: KH D -> D K 1 H",
    ),
    "attention/qkv_bias": tensors(
        ".self_attn.q_proj.bias: KGH -> K G H",
        ".self_attn.k_proj.bias: KH -> K 1 H",
        ".self_attn.v_proj.bias: KH -> K 1 H",
    ),
    "attention/q_norm": tensors(".self_attn.q_norm.weight: H -> H"),
    "attention/k_norm": tensors(".self_attn.k_norm.weight: H -> H"),
    "attention/out": tensors(".self_attn.o_proj.weight: D KGH -> K G H D"),
    "attention/out_bias": tensors(".self_attn.o_proj.bias: D -> D"),
    "mlp_norm": tensors(".post_attention_layernorm.weight: D -> D"),
    "mlp/gate_up": tensors(
        ".mlp.gate_proj.weight: F D -> D 1 F", ".mlp.up_proj.weight: F D -> D 1 F"
    ),
    "mlp/gate_up_bias": tensors(".mlp.gate_proj.bias: F -> 1 F", ".mlp.up_proj.bias: F -> 1 F"),
    "mlp/down": tensors(".mlp.down_proj.weight: D F -> F D"),
    "mlp/down_bias": tensors(".mlp.down_proj.bias: D -> D"),
    "norm": tensors("model.norm.weight: D -> D"),
    "head": tensors("lm_head.weight: V D -> D V"),
}
POST_NORMS: Table = {
    "attention_post_norm": tensors(".post_attention_layernorm.weight: D -> D"),
    "mlp_norm": tensors(".pre_feedforward_layernorm.weight: D -> D"),
    "mlp_post_norm": tensors(".post_feedforward_layernorm.weight: D -> D"),
}

GEMMA4: Table = {
    **POST_NORMS,
    "embed/layer_inputs": tensors("model.embed_tokens_per_layer.weight: V XI -> V X I"),
    "layer_inputs/project": tensors("model.per_layer_model_projection.weight: XI D -> 1 D X I"),
    "layer_inputs/project_norm": tensors("model.per_layer_projection_norm.weight: I -> 1 I"),
    "layer_input/narrow": tensors(".per_layer_input_gate.weight: I D -> D I"),
    "layer_input/widen": tensors(".per_layer_projection.weight: D I -> I D"),
    "layer_input/post_norm": tensors(".post_per_layer_input_norm.weight: D -> D"),
    "mlp_own_norm": tensors(".post_feedforward_layernorm_1.weight: D -> D"),
    "experts_norm": tensors(".pre_feedforward_layernorm_2.weight: D -> D"),
    "experts_post_norm": tensors(".post_feedforward_layernorm_2.weight: D -> D"),
    "experts/router": tensors(".router.proj.weight: E D -> D E"),
    "experts/router_scale": tensors(".router.scale: D -> D"),
    "experts/share_scale": tensors(".router.per_expert_scale: E -> E"),
    "experts/expert_gate_up": tensors(".experts.gate_up_proj: E 2M D -> E D 2 M"),
    "experts/expert_down": tensors(".experts.down_proj: E D M -> E M D"),
    "layer_scale": tensors(".layer_scalar: 1 -> 1"),
}
OLMO: Table = {
    "attention/q_norm": tensors(".self_attn.q_norm.weight: KGH -> K G H"),
    "attention/k_norm": tensors(".self_attn.k_norm.weight: KH -> K 1 H"),
}
FUSED_GATE: Table = {"mlp/gate_up": tensors(".mlp.gate_up_proj.weight: 2F D -> D 2 F")}
GATED_QKV: Table = {
    "attention/qkv": tensors(
        ".self_attn.q_proj.weight: KQH D -> D K Q H",
        ".self_attn.k_proj.weight: KH D -> D K 1 H",
        ".self_attn.v_proj.weight: KH D -> D K 1 H",
    ),
    "attention/qkv_bias": tensors(
        ".self_attn.q_proj.bias: KQH -> K Q H",
        ".self_attn.k_proj.bias: KH -> K 1 H",
        ".self_attn.v_proj.bias: KH -> K 1 H",
    ),
}
DELTA: Table = {
    "mixer/in_qkv": tensors(
        ".linear_attn.in_proj_qkv.weight: JA D -> D J A",
        ".linear_attn.in_proj_qkv.weight: JA D -> D J A",
        ".linear_attn.in_proj_qkv.weight: JX D -> D J X",
    ),
    "mixer/in_gate": tensors(".linear_attn.in_proj_z.weight: JWC D -> D J W C"),
    "mixer/in_strength": tensors(".linear_attn.in_proj_b.weight: JW D -> D J W"),
    "mixer/in_decay": tensors(".linear_attn.in_proj_a.weight: JW D -> D J W"),
    "mixer/decay_bias": tensors(".linear_attn.dt_bias: JW -> J W"),
    "mixer/log_decay_scale": tensors(".linear_attn.A_log: JW -> J W"),
    "mixer/qkv_conv": tensors(
        ".linear_attn.conv1d.weight: JA 1 S -> S J A",
        ".linear_attn.conv1d.weight: JA 1 S -> S J A",
        ".linear_attn.conv1d.weight: JX 1 S -> S J X",
    ),
    "mixer/out_norm": tensors(".linear_attn.norm.weight: C -> C"),
    "mixer/out": tensors(".linear_attn.out_proj.weight: D JWC -> J W C D"),
}
LFM2: Table = {
    "attention_norm": tensors(".operator_norm.weight: D -> D"),
    "attention/q_norm": tensors(".self_attn.q_layernorm.weight: H -> H"),
    "attention/k_norm": tensors(".self_attn.k_layernorm.weight: H -> H"),
    "attention/out": tensors(".self_attn.out_proj.weight: D KGH -> K G H D"),
    "mixer/in_bcx": tensors(".conv.in_proj.weight: 3Y D -> D 3 Y"),
    "mixer/in_bcx_bias": tensors(".conv.in_proj.bias: 3Y -> 3 Y"),
    "mixer/conv": tensors(".conv.conv.weight: Y 1 S -> S Y"),
    "mixer/conv_bias": tensors(".conv.conv.bias: Y -> Y"),
    "mixer/conv_out": tensors(".conv.out_proj.weight: D Y -> Y D"),
    "mixer/conv_out_bias": tensors(".conv.out_proj.bias: D -> D"),
    "mlp_norm": tensors(".ffn_norm.weight: D -> D"),
    "mlp/gate_up": tensors(
        ".feed_forward.w1.weight: F D -> D 1 F", ".feed_forward.w3.weight: F D -> D 1 F"
    ),
    "mlp/down": tensors(".feed_forward.w2.weight: D F -> F D"),
    "norm": tensors("model.embedding_norm.weight: D -> D"),
}
SHARED_MLP: Table = {
    "mlp/gate_up": tensors(".shared_mlp.input_linear.weight: 2F D -> D 2 F"),
    "mlp/down": tensors(".shared_mlp.output_linear.weight: D F -> F D"),
}
FUSED_QKV: Table = {
    "attention/qkv": tensors(
        ".self_attn.qkv_proj.weight: KGH D -> D K G H",
        ".self_attn.qkv_proj.weight: KH D -> D K 1 H",
        ".self_attn.qkv_proj.weight: KH D -> D K 1 H",
    )
}
GLM_NORMS: Table = {
    "attention_post_norm": tensors(".post_self_attn_layernorm.weight: D -> D"),
    "mlp_post_norm": tensors(".post_mlp_layernorm.weight: D -> D"),
}
GPT2: Table = {
    "embed/embedding": tensors("model.wte.weight: V D -> V D"),
    "embed/positions": tensors("model.wpe.weight: P D -> P D"),
    "norm": tensors("model.ln_f.weight: D -> D"),
    "norm_bias": tensors("model.ln_f.bias: D -> D"),
    "head": tensors("lm_head.weight: V D -> D V"),
    **{
        name: tensors(tensor, layer="model.h.{i}")
        for name, tensor in {
            "attention_norm": ".ln_1.weight: D -> D",
            "attention_norm_bias": ".ln_1.bias: D -> D",
            "attention/qkv": ".attn.c_attn.weight: D 3KH -> D K 3 H",
            "attention/qkv_bias": ".attn.c_attn.bias: 3KH -> K 3 H",
            "attention/out": ".attn.c_proj.weight: KGH D -> K G H D",
            "attention/out_bias": ".attn.c_proj.bias: D -> D",
            "mlp_norm": ".ln_2.weight: D -> D",
            "mlp_norm_bias": ".ln_2.bias: D -> D",
            "mlp/gate_up": ".mlp.c_fc.weight: D F -> D 1 F",
            "mlp/gate_up_bias": ".mlp.c_fc.bias: F -> 1 F",
            "mlp/down": ".mlp.c_proj.weight: F D -> F D",
            "mlp/down_bias": ".mlp.c_proj.bias: D -> D",
        }.items()
    },
}
GPT_NEOX: Table = {
    "embed/embedding": tensors("model.embed_in.weight: V D -> V D"),
    "attention_norm": LLAMA["attention_norm"],
    "attention_norm_bias": tensors(".input_layernorm.bias: D -> D"),
    "attention/qkv": tensors(".attention.query_key_value.weight: K3H D -> D K 3 H"),
    "attention/qkv_bias": tensors(".attention.query_key_value.bias: K3H -> K 3 H"),
    "attention/out": tensors(".attention.dense.weight: D KGH -> K G H D"),
    "attention/out_bias": tensors(".attention.dense.bias: D -> D"),
    "mlp_norm": LLAMA["mlp_norm"],
    "mlp_norm_bias": tensors(".post_attention_layernorm.bias: D -> D"),
    "mlp/gate_up": tensors(".mlp.dense_h_to_4h.weight: F D -> D 1 F"),
    "mlp/gate_up_bias": tensors(".mlp.dense_h_to_4h.bias: F -> 1 F"),
    "mlp/down": tensors(".mlp.dense_4h_to_h.weight: D F -> F D"),
    "mlp/down_bias": tensors(".mlp.dense_4h_to_h.bias: D -> D"),
    "norm": tensors("model.final_layer_norm.weight: D -> D"),
    "norm_bias": tensors("model.final_layer_norm.bias: D -> D"),
    "head": LLAMA["head"],
}

ROUTER: Table = {"mlp/router": tensors(".mlp.gate.weight: E D -> D E")}
ALL_EXPERTS: Table = {k: v for k, v in LLAMA.items() if not k.startswith("mlp/")}
"""Of models with experts in every layer: none has an MLP."""
EXPERTS: Table = {
    **ROUTER,
    "mlp/expert_gate_up": tensors(
        ".mlp.experts.{e}.gate_proj.weight: M D -> E D 1 M",
        ".mlp.experts.{e}.up_proj.weight: M D -> E D 1 M",
    ),
    "mlp/expert_down": tensors(".mlp.experts.{e}.down_proj.weight: D M -> E M D"),
}
SHARED_EXPERTS: Table = {
    **EXPERTS,
    "mlp/choice_bias": tensors(".mlp.gate.e_score_correction_bias: E -> E"),
    "mlp/shared/gate_up": tensors(
        ".mlp.shared_experts.gate_proj.weight: S D -> D 1 S",
        ".mlp.shared_experts.up_proj.weight: S D -> D 1 S",
    ),
    "mlp/shared/down": tensors(".mlp.shared_experts.down_proj.weight: D S -> S D"),
}
SHARED_EXPERT: Table = {
    "mlp/shared/gate_up": tensors(
        ".mlp.shared_expert.gate_proj.weight: F D -> D 1 F",
        ".mlp.shared_expert.up_proj.weight: F D -> D 1 F",
    ),
    "mlp/shared/down": tensors(".mlp.shared_expert.down_proj.weight: D F -> F D"),
    "mlp/shared_gate": tensors(".mlp.shared_expert_gate.weight: 1 D -> D 1"),
}
MIXTRAL: Table = {
    "mlp/router": tensors(".block_sparse_moe.gate.weight: E D -> D E"),
    "mlp/expert_gate_up": tensors(
        ".block_sparse_moe.experts.{e}.w1.weight: M D -> E D 1 M",
        ".block_sparse_moe.experts.{e}.w3.weight: M D -> E D 1 M",
    ),
    "mlp/expert_down": tensors(".block_sparse_moe.experts.{e}.w2.weight: D M -> E M D"),
}
FUSED_EXPERTS: Table = {
    **ROUTER,
    "mlp/expert_gate_up": tensors(".mlp.experts.gate_up_proj: E 2M D -> E D 2 M"),
    "mlp/expert_down": tensors(".mlp.experts.down_proj: E D M -> E M D"),
}
GPT_OSS: Table = {
    "attention/sinks": tensors(".self_attn.sinks: KG -> K G"),
    "mlp/router": tensors(".mlp.router.weight: E D -> D E"),
    "mlp/router_bias": tensors(".mlp.router.bias: E -> E"),
    "mlp/expert_gate_up": tensors(".mlp.experts.gate_up_proj: E D M2 -> E D 2 M"),
    "mlp/expert_gate_up_bias": tensors(".mlp.experts.gate_up_proj_bias: E M2 -> E 2 M"),
    "mlp/expert_down": tensors(".mlp.experts.down_proj: E M D -> E M D"),
    "mlp/expert_down_bias": tensors(".mlp.experts.down_proj_bias: E D -> E D"),
}

LATENT: Table = {
    "attention/q": tensors(".self_attn.q_proj.weight: KH D -> D K H"),
    "attention/q_a": tensors(".self_attn.q_a_proj.weight: Q D -> D Q"),
    "attention/q_a_bias": tensors(".self_attn.q_a_proj.bias: Q -> Q"),
    "attention/q_a_norm": tensors(".self_attn.q_a_layernorm.weight: Q -> Q"),
    "attention/q_b": tensors(".self_attn.q_b_proj.weight: KH Q -> Q K H"),
    "attention/kv_a": tensors(".self_attn.kv_a_proj_with_mqa.weight: A D -> D A"),
    "attention/kv_a_bias": tensors(".self_attn.kv_a_proj_with_mqa.bias: A -> A"),
    "attention/kv_a_norm": tensors(".self_attn.kv_a_layernorm.weight: C -> C"),
    "attention/kv_b": tensors(".self_attn.kv_b_proj.weight: KW C -> C K W"),
    "attention/out": tensors(".self_attn.o_proj.weight: D KGX -> K G X D"),
}

FLOAT32 = ("choice_bias",)
"""Last parts of the paths of parameters that are float32 here and in every file."""


def stored_dtype(name: str, dtype: str) -> str:
    """The dtype of a parameter, by the last part of its path, where that of others is `dtype`."""
    return "float32" if name in FLOAT32 else dtype


HARMLESS = (
    r"model\.(layers\.\d+\.(self_attn|attention)\.)?rotary_emb\.inv_freq",
    r"model\.(h|layers)\.\d+\.(attn|attention)\.(bias|masked_bias)",
)
"""Tensors of old files that are ignored: they follow from the config."""


class Layout(NamedTuple):
    """How files differ from a family's table."""

    starts: tuple[tuple[str, str], ...] = ()
    """starts of the names in the table, and what they are in a file; the first that fits counts"""
    tensors: Table = {}
    """what replaces rows of the table"""

    def pattern(self, name: str) -> str:
        """A regular expression of the names in a file of a tensor of the table."""
        return re.sub(r"\\{[ie]\\}", r"\\d+", re.escape(name_in_file(self, name)))


def name_in_file(layout: Layout, name: str) -> str:
    """The name in a file of a tensor of the tables."""
    for start, theirs in layout.starts:
        if name.startswith(start):
            return theirs + name.removeprefix(start)
    return name


def name_in_tables(layout: Layout, name: str) -> str:
    """The inverse of `name_in_file`, the same for every other name."""
    for start, theirs in layout.starts:
        if name.startswith(theirs):
            return start + name.removeprefix(theirs)
    return name
