"""The layers of the decoder. Each holds its parameters stacked over the layers of its group.

A module is built with a leading dimension L on every parameter and called with the slice of one
layer, as `lax.scan` passes it: the graph of a module does not know shapes, so it merges with both.

B batch, T tokens, S key tokens, D width, N query heads, K key/value heads, G = N / K query heads to
a key/value head, H head size, F feed-forward, U 2 with a gate and else 1, V vocabulary, L layers,
E experts, M feed-forward of each, C experts of a token.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jaxtrain.kernels.attention import Scoring, TokenPositions, attention
from jaxtrain.kernels.experts import ExpertWeights, mix_experts
from jaxtrain.model.config import (
    Activation,
    AdapterSite,
    ComputeConfig,
    DecoderConfig,
    LayerSpec,
    Norm,
)
from jaxtrain.model.quantized import Form, QuantizedWeight, dequantize
from jaxtrain.model.rope import Rotation, rotate
from jaxtrain.model.routing import Routing, choose_experts
from jaxtrain.parallel.sharding import constrain

Weight = nnx.Param | QuantizedWeight
MAX_THIN = 64  # outputs of a product whose gradient is computed turned
PRODUCT = "product"
"""Name for a rematerialisation policy of what a product with a weight gives."""


class AttentionInputs(NamedTuple):
    """What all layers of a forward pass share: positions of queries and keys, and rotations."""

    q_positions: TokenPositions
    kv_positions: TokenPositions
    rotations: tuple[Rotation, ...]
    """of each of `DecoderConfig.ropes`"""
    slot: Array | None = None
    """int32 []: index in the cache of the first of these tokens; None without a cache"""
    noise_BT: Array | None = None
    """uint32: what dropout draws from; None without it"""


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, of one layer or, with a leading L, of a stack."""

    k_BSKH: Array
    v_BSKH: Array


class Output(NamedTuple):
    """What a layer or a stack returns."""

    x_BTD: Array
    cache: Any = None
    """with these tokens added; None without one"""
    routing: Routing | None = None
    """None without experts"""


def dense(
    x: Array,
    w: Array | Weight,
    bias: nnx.Param | None = None,
    adapters: nnx.Dict | None = None,
    noise_BT: Array | None = None,
    *,
    contract: int = 1,
) -> Array:
    """Product over the last `contract` dimensions of x and the first of w, in the dtype of x; with
    what the adapters add to it, whose dropout draws from `noise_BT`.

    Every product with a layer's weight goes through here. w keeps its layout: no transposed copy.
    """
    if isinstance(w, QuantizedWeight):
        y: Array = _quantized_product(contract, w.form, x, w.parts)
    else:
        y = _product(contract, x, w[...].astype(x.dtype))
    updates = [] if adapters is None else [a(x, y, w, noise_BT) for a in adapters.values()]
    y = sum(updates, y if bias is None else y + bias[...].astype(y.dtype))
    # With all that is added to it: the updates need not be kept for the backward pass too.
    return checkpoint_name(y, PRODUCT)


class Adapter(nnx.Module):
    """The low-rank update s x A B of a product with a weight W, or with a part of it (Hu et al.
    2021, arXiv:2106.09685). A B is never made, and the weight has no gradient.

    With DoRA (Liu et al. 2024, arXiv:2402.09353) the columns of W + s A B have trained lengths. A B
    is made then, to find those that they have, through which no gradient goes."""

    def __init__(self, site: AdapterSite, weight: Array, contract: int):
        (L, *inputs), outputs = weight.shape[: contract + 1], list(weight.shape[contract + 1 :])
        self.begin, self.joined = site.begin, None
        if site.end > site.begin:
            self.joined, outputs[-2] = outputs[-2], site.end - site.begin
        rank = max(site.ranks)
        self.a = nnx.Param(jnp.zeros((L, *inputs, rank), weight.dtype))
        self.b = nnx.Param(jnp.zeros((L, rank, *outputs), weight.dtype))
        self.scale = nnx.Param(jnp.zeros(L, jnp.float32))
        self.magnitude = nnx.Param(jnp.zeros((L, *outputs), weight.dtype)) if site.is_dora else None
        self.dropout = site.dropout
        if site.dropout:
            self.salt = nnx.Param(jnp.zeros(L, jnp.uint32))

    def __call__(self, x: Array, y: Array, w: Array | Weight, noise_BT: Array | None) -> Array:
        """What is added to the product y of x and w."""
        num_inputs, base = self.a.ndim - 1, None if self.magnitude is None else self._part(y)
        if self.dropout and noise_BT is not None:
            x = drop_out(x, noise_BT ^ self.salt[...], self.dropout)
            if base is not None:
                # What is dropped is dropped from W too; the whole weight is not kept.
                again = lambda x: _product(num_inputs, x, self._part(read_weight(w, x.dtype)))
                base = jax.checkpoint(again)(x)
        low = dense(x, self.a[...], contract=num_inputs)
        b = self.b[...].astype(x.dtype)
        update: Array = _product(1, low * self.scale[...].astype(x.dtype), b)
        if self.magnitude is not None and base is not None:
            lengths = jnp.where(self.scale[...] > 0, self.column_lengths(w), 1)
            stretch = jnp.where(self.scale[...] > 0, self.magnitude[...] / lengths, 1)
            update = (stretch - 1).astype(x.dtype) * base + stretch.astype(x.dtype) * update
        return update if self.joined is None else pad_joined(update, self.begin, self.joined)

    def column_lengths(self, w: Array | Weight) -> Array:
        """Of W + s A B, float32, without a gradient."""
        w, a, b = (read_weight(one, jnp.float32) for one in (w, self.a, self.b))
        whole = self._part(w) + jnp.tensordot(a * self.scale[...], b, axes=1)
        squares = jnp.square(lax.stop_gradient(whole))
        return jnp.sqrt(squares.sum(tuple(range(a.ndim - 1))))

    def _part(self, x: Array) -> Array:
        """The outputs that have this adapter."""
        return (
            x if self.joined is None else x[..., self.begin : self.begin + self.b[...].shape[-2], :]
        )


def drop_out(x: Array, noise_BT: Array, rate: float) -> Array:
    """x [B, T, ...] with this fraction of entries 0 and the others larger, by a hash of the token's
    noise and the entry's place: every device, stage and recomputation drops the same."""
    place = jnp.zeros((1,) * x.ndim, jnp.uint32)
    for dim in range(2, x.ndim):
        place = place * x.shape[dim] + lax.broadcasted_iota(jnp.uint32, x.shape, dim)
    key = mix_bits(noise_BT).reshape(*noise_BT.shape, *(1,) * (x.ndim - 2))
    is_kept = mix_bits(key + place * jnp.uint32(0x9E3779B1)) >= jnp.uint32(rate * 2**32)
    return jnp.where(is_kept, x / (1 - rate), 0).astype(x.dtype)


def mix_bits(x: Array) -> Array:
    """A uint32 in which every bit depends on every bit of x: the last step of MurmurHash3 (Appleby,
    public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def pad_joined(y: Array, begin: int, size: int) -> Array:
    """Puts y at index `begin` of `size` entries along the last dimension but one, among zeros."""
    end = size - begin - y.shape[-2]
    return jnp.pad(y, [(0, 0)] * (y.ndim - 2) + [(begin, end), (0, 0)])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(contract: int, x: Array, w: Array) -> Array:
    return _product_fwd(contract, x, w)[0]


def _product_fwd(contract: int, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    dims = (_last(x, contract), tuple(range(contract)))
    return lax.dot_general(x, w, (dims, ((), ()))), (x, w)


def _product_bwd(contract: int, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """The gradients of autodiff, with dw in the layout of w: saves a twentieth of a step on CPU.

    Autodiff computes dw transposed and turns it, and contracts B and T as two dimensions, for
    which the compiler first transposes dy.
    """
    x, w = saved
    dx, outputs = _product_dx(contract, w, dy), w.ndim - contract
    x = x.reshape(-1, *x.shape[x.ndim - contract :])
    dy = dy.reshape(-1, *dy.shape[dy.ndim - outputs :])
    sum_tokens = lambda a, b: lax.dot_general(a, b, (((0,), (0,)), ((), ())))
    if outputs == 1 and dy.shape[1] <= min(MAX_THIN, prod(x.shape[1:]) // 8):
        # An adapter's: turned, it takes a third of the time on CPU. The barrier is there since XLA
        # would turn it back.
        dw_turned = lax.optimization_barrier(sum_tokens(dy, x))
        return dx, jnp.moveaxis(dw_turned, 0, -1)
    return dx, sum_tokens(x, dy)


def _product_dx(contract: int, w: Array, dy: Array) -> Array:
    to_outputs = tuple(range(contract, w.ndim))
    return lax.dot_general(dy, w, ((_last(dy, len(to_outputs)), to_outputs), ((), ())))


_product.defvjp(_product_fwd, _product_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _quantized_product(contract: int, form: Form, x: Array, parts: dict[str, Array]) -> Array:
    """The same with a frozen weight, which is made whole here and again in the backward pass."""
    return _product_fwd(contract, x, dequantize(form, parts, x.dtype))[0]


def _quantized_product_fwd(contract: int, form: Form, x: Array, parts: dict[str, Array]):
    y, _ = _product_fwd(contract, x, dequantize(form, parts, x.dtype))
    return y, parts


def _quantized_product_bwd(contract: int, form: Form, parts: dict[str, Array], dy: Array):
    w = dequantize(form, parts, dy.dtype)
    return _product_dx(contract, w, dy), None


_quantized_product.defvjp(_quantized_product_fwd, _quantized_product_bwd)


def read_weight(w: Array | Weight, dtype: DTypeLike) -> Array:
    """The whole weight."""
    if isinstance(w, QuantizedWeight):
        return dequantize(w.form, w.parts, dtype)
    return w[...].astype(dtype)


def _last(x: Array, count: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - count, x.ndim))


ACTIVATIONS: Mapping[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def normalize(
    norm: Norm, x: Array, scale: nnx.Param | None, bias: nnx.Param | None = None
) -> Array:
    """RMS norm (Zhang and Sennrich, 2019, arXiv:1910.07467) or layer norm, in float32, over the
    dimensions that `scale` has; x itself without one."""
    if scale is None:
        return x
    dims = _last(x, scale.ndim)
    x32, scale32 = x.astype(jnp.float32), scale[...].astype(jnp.float32)
    if norm.kind == "layer":
        x32 = x32 - jnp.mean(x32, dims, keepdims=True)
    x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), dims, keepdims=True) + norm.eps)
    x32 = x32 * (1 + scale32 if norm.zero_centered else scale32)
    return (x32 if bias is None else x32 + bias[...].astype(jnp.float32)).astype(x.dtype)


class Initializer:
    """Makes initial parameters; drawn in float32, so that another dtype only rounds them."""

    def __init__(self, config: DecoderConfig, key: Array, dtype: str):
        self._std, self._rngs, self._dtype = config.initializer_range, nnx.Rngs(params=key), dtype
        self.norm = self.zeros if config.norm.zero_centered else self.ones

    def normal(self, *shape: int) -> nnx.Param:
        value = self._std * jax.random.normal(self._rngs.params(), shape, jnp.float32)
        return nnx.Param(value.astype(self._dtype))

    def ones(self, *shape: int) -> nnx.Param:
        return nnx.Param(jnp.ones(shape, self._dtype))

    def zeros(self, *shape: int) -> nnx.Param:
        return nnx.Param(jnp.zeros(shape, self._dtype))


class Attention(nnx.Module):
    qkv_lora: nnx.Dict | None = None
    out_lora: nnx.Dict | None = None

    def __init__(
        self,
        config: DecoderConfig,
        spec: LayerSpec,
        compute: ComputeConfig,
        init: Initializer,
        L: int,
    ):
        D, K, H = config.width, config.num_kv_heads, config.head_size
        G = config.num_heads // K
        # The queries, the key and the value of each key/value head: one product, split over K.
        self.qkv: Weight = init.normal(L, D, K, G + 2, H)
        self.qkv_bias = init.zeros(L, K, G + 2, H) if config.qkv_bias else None
        self.out: Weight = init.normal(L, K, G, H, D)
        self.out_bias = init.zeros(L, D) if config.out_bias else None
        self.sinks = init.normal(L, K, G) if config.attention_sinks else None
        q_heads, k_heads = ((K, G), (K, 1)) if config.qk_norm == "all_heads" else ((), ())
        self.q_norm = init.norm(L, *q_heads, H) if config.qk_norm else None
        self.k_norm = init.norm(L, *k_heads, H) if config.qk_norm else None
        self.norm = config.norm
        self.rope = spec.rope
        self.rotation = None if spec.rope is None else config.ropes.index(spec.rope)
        self.scoring = Scoring(
            H**-0.5 if config.attention_scale is None else config.attention_scale,
            config.attention_softcap,
            spec.window,
        )
        self.implementation = compute.attention

    def __call__(
        self, x_BTD: Array, inputs: AttentionInputs, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        noise_BT = inputs.noise_BT
        qkv = dense(x_BTD, self.qkv, self.qkv_bias, self.qkv_lora, noise_BT)  # [B, T, K, G + 2, H]
        q_BTKGH, k_BTK1H, v_BTK1H = qkv[..., :-2, :], qkv[..., -2:-1, :], qkv[..., -1:, :]
        q_BTKGH = normalize(self.norm, q_BTKGH, self.q_norm)
        k_BTK1H = normalize(self.norm, k_BTK1H, self.k_norm)
        if self.rope is not None and self.rotation is not None:
            rotation = inputs.rotations[self.rotation]
            q_BTKGH = rotate(q_BTKGH, rotation, interleaved=self.rope.interleaved)
            k_BTK1H = rotate(k_BTK1H, rotation, interleaved=self.rope.interleaved)
            if rotation.query_scale is not None:
                q_BTKGH = (q_BTKGH * rotation.query_scale).astype(q_BTKGH.dtype)
        keys = Cache(k_BTK1H[:, :, :, 0], v_BTK1H[:, :, :, 0])
        if cache is not None:
            assert inputs.slot is not None
            put = partial(lax.dynamic_update_slice_in_dim, start_index=inputs.slot, axis=1)
            keys = jax.tree.map(lambda old, new: put(old, new.astype(old.dtype)), cache, keys)
        B, T, K, G, H = q_BTKGH.shape
        mixed_BTNH = attention(
            q_BTKGH.reshape(B, T, K * G, H),
            *keys,
            q_positions=inputs.q_positions,
            kv_positions=inputs.kv_positions,
            scoring=self.scoring,
            sinks_N=None if self.sinks is None else self.sinks[...].reshape(-1),
            # A cache is in any order and often read by one query; flash kernels support neither.
            implementation=self.implementation if cache is None else "reference",
        )
        mixed = mixed_BTNH.reshape(B, T, K, G, H)
        y_BTD = dense(mixed, self.out, self.out_bias, self.out_lora, noise_BT, contract=3)
        return y_BTD, (None if cache is None else keys)


class MLP(nnx.Module):
    """down(act(gate x) * up x) (Shazeer, 2020, arXiv:2002.05202), or down(act(up x))."""

    gate_up_lora: nnx.Dict | None = None
    down_lora: nnx.Dict | None = None

    def __init__(self, config: DecoderConfig, compute: ComputeConfig, init: Initializer, L: int):
        D, F, U = config.width, config.ffn_width, 2 if config.gated_mlp else 1
        self.gate_up: Weight = init.normal(L, D, U, F)
        self.gate_up_bias = init.zeros(L, U, F) if config.mlp_bias else None
        self.down: Weight = init.normal(L, F, D)
        self.down_bias = init.zeros(L, D) if config.mlp_bias else None
        self.activation: Activation = config.activation
        self.tile_tokens = D if compute.tiled_mlp else None

    def __call__(self, x_BTD: Array, noise_BT: Array | None = None) -> Array:
        def mlp(inputs: tuple[Array, Array | None]) -> Array:
            x_BtD, noise_Bt = inputs
            wide = dense(x_BtD, self.gate_up, self.gate_up_bias, self.gate_up_lora, noise_Bt)
            act = ACTIVATIONS[self.activation](wide[..., 0, :])
            act = act if wide.shape[-2] == 1 else act * wide[..., 1, :]
            return dense(act, self.down, self.down_bias, self.down_lora, noise_Bt)

        if self.tile_tokens is None:
            return mlp((x_BTD, noise_BT))
        return run_in_tiles(mlp, (x_BTD, noise_BT), self.tile_tokens)


def run_in_tiles(layer: Callable[[Any], Array], inputs: Any, tile_tokens: int) -> Array:
    """Runs `layer` on one tile of the tokens of its inputs [B, T, ...] at a time, and again in the
    backward pass: activations are in memory for one tile only."""
    B, T = jax.tree.leaves(inputs)[0].shape[:2]
    tiles = -(-T // tile_tokens)
    if tiles == 1:
        return layer(inputs)
    tile_tokens = -(-T // tiles)  # equal tiles, so that the last has little padding

    def cut(a: Array) -> Array:
        a = jnp.pad(a, [(0, 0), (0, tiles * tile_tokens - T), *[(0, 0)] * (a.ndim - 2)])
        return a.reshape(B, tiles, tile_tokens, *a.shape[2:]).swapaxes(0, 1)

    # XLA does not merge a loop's body with that of the forward pass, so no barrier is needed.
    y_tiles = lax.map(jax.checkpoint(layer, prevent_cse=False), jax.tree.map(cut, inputs))
    return y_tiles.swapaxes(0, 1).reshape(B, tiles * tile_tokens, -1)[:, :T]


class ExpertMLP(nnx.Module):
    """A feed-forward layer of which each token takes the experts that a router chooses (Shazeer et
    al., 2017, arXiv:1701.06538), none dropped."""

    def __init__(self, config: DecoderConfig, compute: ComputeConfig, init: Initializer, L: int):
        assert config.experts is not None
        D, E, M = config.width, config.experts.count, config.experts.width
        has_bias = config.experts.has_bias
        self.router = init.normal(L, D, E)
        self.router_bias = init.zeros(L, E) if has_bias else None
        self.expert_gate_up: Weight = init.normal(L, E, D, 2, M)
        self.expert_gate_up_bias = init.zeros(L, E, 2, M) if has_bias else None
        self.expert_down: Weight = init.normal(L, E, M, D)
        self.expert_down_bias = init.zeros(L, E, D) if has_bias else None
        self.experts = config.experts
        self.activation: Activation = config.activation
        self.tile_tokens = D if compute.tiled_mlp else None

    def __call__(self, x_BTD: Array, segments_BT: Array) -> tuple[Array, Routing]:
        # In float32, since a rounded score may choose another expert.
        logits_BTE = dense(x_BTD.astype(jnp.float32), self.router[...], self.router_bias)
        chosen, routing = choose_experts(self.experts, logits_BTE, segments_BT)
        bias = self.expert_gate_up_bias

        def mix(inputs: Any) -> Array:
            weights = ExpertWeights(
                read_weight(self.expert_gate_up, x_BTD.dtype),
                None if bias is None else bias[...],
                read_weight(self.expert_down, x_BTD.dtype),
            )
            return mix_experts(weights, *inputs, activate=self._activate)

        if isinstance(self.expert_down, QuantizedWeight):
            mix = jax.checkpoint(mix)  # does not keep the whole weights
        inputs = (x_BTD, *chosen)
        if self.tile_tokens is None:
            y_BTD = mix(inputs)
        else:
            y_BTD = run_in_tiles(mix, inputs, self.tile_tokens)
        if self.expert_down_bias is not None:
            y_BTD += dense(chosen.shares(self.experts.count), self.expert_down_bias[...]).astype(
                y_BTD.dtype
            )
        return y_BTD, routing

    def _activate(self, wide_RUM: Array) -> Array:
        gate_RM, up_RM = wide_RUM[:, 0], wide_RUM[:, 1]
        if (limit := self.experts.swiglu_limit) is None:
            return ACTIVATIONS[self.activation](gate_RM) * up_RM
        gate_RM, up_RM = jnp.minimum(gate_RM, limit), jnp.clip(up_RM, -limit, limit)
        return (up_RM + 1) * gate_RM * jax.nn.sigmoid(self.experts.swiglu_alpha * gate_RM)


CONTRACTED = {"qkv": 1, "out": 3, "gate_up": 1, "down": 1}
"""Parameter that may have adapters → how many of its first dimensions are its input."""


def attach_adapters(module: nnx.Module, name: str, sites: Sequence[AdapterSite]) -> None:
    """Gives adapters to a product with the parameter of this name."""
    weight = getattr(module, name)[...]
    adapters = {site.name: Adapter(site, weight, CONTRACTED[name]) for site in sites}
    setattr(module, f"{name}_lora", nnx.Dict(adapters))


class Block(nnx.Module):
    """Attention and feed-forward, each reading the residual stream and added to it, with norms."""

    def __init__(
        self,
        config: DecoderConfig,
        spec: LayerSpec,
        compute: ComputeConfig,
        init: Initializer,
        L: int,
    ):
        D, place = config.width, config.norm_place
        has_mlp_norm = place != "after" and not config.shared_norm
        has_bias = config.norm.has_bias
        self.attention_norm = init.norm(L, D) if place != "after" else None
        self.attention_norm_bias = init.zeros(L, D) if has_bias else None
        self.attention = Attention(config, spec, compute, init, L)
        self.attention_post_norm = init.norm(L, D) if place != "before" else None
        self.mlp_norm = init.norm(L, D) if has_mlp_norm else None
        self.mlp_norm_bias = init.zeros(L, D) if has_bias and has_mlp_norm else None
        self.mlp = (ExpertMLP if spec.has_experts else MLP)(config, compute, init, L)
        self.mlp_post_norm = init.norm(L, D) if place != "before" else None
        self.config = config

    def __call__(self, x_BTD: Array, inputs: AttentionInputs, cache: Cache | None = None) -> Output:
        config, routing = self.config, None
        norm = partial(normalize, config.norm)
        read_BTD = norm(x_BTD, self.attention_norm, self.attention_norm_bias)
        mixed_BTD, cache = self.attention(read_BTD, inputs, cache)
        y_BTD = x_BTD + config.residual_scale * norm(mixed_BTD, self.attention_post_norm)
        if not config.shared_norm:
            read_BTD = x_BTD if config.parallel_block else y_BTD
            read_BTD = norm(read_BTD, self.mlp_norm, self.mlp_norm_bias)
        if isinstance(self.mlp, ExpertMLP):
            wide_BTD, routing = self.mlp(read_BTD, inputs.q_positions.segments)
        else:
            wide_BTD = self.mlp(read_BTD, inputs.noise_BT)
        y_BTD += config.residual_scale * norm(wide_BTD, self.mlp_post_norm)
        return Output(constrain(y_BTD, "batch", None, None), cache, routing)
