"""The layers of the decoder. Each holds its parameters stacked over the layers of its group.

A module is built with a leading dimension L on every parameter and called with the slice of one
layer, as `lax.scan` passes it: the graph of a module does not know shapes, so it merges with both.

B batch, T tokens, S key tokens, D width, N query heads, K key/value heads, G = N / K query heads to
a key/value head, Q = G, or 2 G with gates, H head size, F feed-forward, U 2 with a gate and else 1,
V vocabulary, L layers, E experts, M feed-forward of each, C experts of a token, I channels of a
layer's own input, X layers of the decoder.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from jaxtrain.kernels.attention import Exchange, Scoring, TokenPositions, attention
from jaxtrain.kernels.axes import (
    CONTEXT_AXIS,
    context_parts,
    current_platform,
    free_axis_sizes,
)
from jaxtrain.kernels.experts import ExpertWeights, mix_experts
from jaxtrain.kernels.fp8 import fp8_product
from jaxtrain.kernels.product import is_for_unit, keep, mark, multiply
from jaxtrain.kernels.sums import Places, gather_shares, map_with_copies, weight_gradient
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
from jaxtrain.parallel.matrices import MATRICES, Matrix, place_of


class Fp8Weight(nnx.Param):
    """One whose products are of eight-bit floats."""


Weight = nnx.Param | QuantizedWeight
WHOLE_PRODUCTS = {
    "router", "expert_gate_up", "expert_down", "shared_gate", "in_strength", "in_decay",
}  # fmt: skip
"""Names of the matrices of layers whose products are not: those of experts, and small ones that
decide about whole tokens or heads."""
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
    shared: "Mapping[str, Cache] | None" = None
    """of this layer: keys and values of earlier layers, by the names that these write"""
    own_BTI: Array | None = None
    """of this layer: its own input, where layers have one"""


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, of one layer or, with a leading L, of a stack.
    Keys lie as the product with a query reads them: half of its time on CPU."""

    k_BKHS: Array
    v_BKSH: Array


class Output(NamedTuple):
    """What a layer or a stack returns."""

    x_BTD: Array
    cache: Any = None
    """with these tokens added; None without one, but for a layer whose keys others read"""
    routing: Routing | None = None
    """None without experts"""
    written: dict[str, Cache] = {}
    """by a stack: keys and values that later layers read"""


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
    elif isinstance(w, Fp8Weight):
        y = fp8_product(contract, x, w[...].astype(x.dtype))
    else:
        y = _product(contract, getattr(w, "places", None), x, w[...].astype(x.dtype))
    updates = [] if adapters is None else [a(x, y, w, noise_BT) for a in adapters.values()]
    if bias is not None:
        # As many as there are tokens before they are rounded: its gradient is summed in float32.
        y += jnp.broadcast_to(bias[...].astype(jnp.float32), y.shape).astype(y.dtype)
    y = sum(updates, y)
    # With all that is added to it: the updates need not be kept for the backward pass too.
    return keep(y, PRODUCT)


class Adapter(nnx.Module):
    """The low-rank update s x A B of a product with a weight W, or with a part of it (Hu et al.
    2021, arXiv:2106.09685). A B is never made, and the weight has no gradient.

    With DoRA (Liu et al. 2024, arXiv:2402.09353) the columns of W + s A B have trained lengths. A B
    is made then, to find those that they have, through which no gradient goes."""

    def __init__(self, site: AdapterSite, weight: Array, matrix: Matrix):
        first = len(matrix.lead) + len(matrix.inputs)  # of its outputs
        lead, outputs = weight.shape[: len(matrix.lead)], list(weight.shape[first:])
        self.begin, self.joined = site.begin, None
        if site.end > site.begin:
            self.joined, outputs[-2] = outputs[-2], site.end - site.begin
        L, rank = lead[0], max(site.ranks)
        zeros = lambda *shape: nnx.Param(jnp.zeros(shape, weight.dtype))
        self.a = zeros(*weight.shape[:first], rank)
        self.b = zeros(*lead, rank, *outputs)
        self.scale = nnx.Param(jnp.zeros(L, jnp.float32))
        self.magnitude = zeros(*lead, *outputs) if site.is_dora else None
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
                again = lambda x: _product(num_inputs, None, x, self._part(read_weight(w, x.dtype)))
                base = jax.checkpoint(again)(x)
        low = dense(x, self.a, contract=num_inputs) * self.scale[...].astype(x.dtype)
        places = getattr(self.b, "places", None)
        update: Array = _product(1, places, low, self.b[...].astype(x.dtype))
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


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(contract: int, places: Places | None, x: Array, w: Array) -> Array:
    """`places` says how devices split w, if they do."""
    return _product_fwd(contract, places, x, w)[0]


def _product_fwd(
    contract: int, places: Places | None, x: Array, w: Array
) -> tuple[Array, tuple[Array, Array]]:
    whole = w if places is None else gather_shares(w, places)
    return multiply(x, whole, _last(x, contract), tuple(range(contract))), (x, w)


def _product_bwd(
    contract: int, places: Places | None, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    """The gradients of autodiff, with dw in the layout of w: saves a twentieth of a step on CPU.

    Autodiff computes dw transposed and turns it, and contracts B and T as two dimensions, for
    which the compiler first transposes dy.
    """
    x, w = saved
    whole = w if places is None else gather_shares(w, places)
    dx, outputs = _product_dx(contract, whole, dy), w.ndim - contract
    if places is not None and (dw := weight_gradient(x, dy, places)) is not None:
        # The barrier keeps the sum in float32.
        return dx, lax.optimization_barrier(dw).astype(w.dtype)
    lead = tuple(range(x.ndim - contract))
    if free_axis_sizes().get(CONTEXT_AXIS, 1) > 1:
        # B and T, both cut, make no dimension that is.
        return dx, lax.dot_general(x, dy, ((lead, lead), ((), ())))
    x = x.reshape(-1, *x.shape[x.ndim - contract :])
    dy = dy.reshape(-1, *dy.shape[dy.ndim - outputs :])
    sum_tokens = lambda a, b: multiply(a, b, (0,), (0,))
    if outputs == 1 and dy.shape[1] <= min(MAX_THIN, prod(x.shape[1:]) // 8):
        # An adapter's: turned, it takes a third of the time on CPU. The barrier is there since XLA
        # would turn it back.
        dw_turned = lax.optimization_barrier(sum_tokens(dy, x))
        return dx, jnp.moveaxis(dw_turned, 0, -1)
    return dx, sum_tokens(x, dy)


def _product_dx(contract: int, w: Array, dy: Array) -> Array:
    to_outputs = tuple(range(contract, w.ndim))
    return multiply(dy, w, _last(dy, len(to_outputs)), to_outputs)


_product.defvjp(_product_fwd, _product_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _quantized_product(contract: int, form: Form, x: Array, parts: dict[str, Array]) -> Array:
    """The same with a frozen weight, which is made whole here and again in the backward pass."""
    return _product_fwd(contract, None, x, dequantize(form, parts, x.dtype))[0]


def _quantized_product_fwd(contract: int, form: Form, x: Array, parts: dict[str, Array]):
    y, _ = _product_fwd(contract, None, x, dequantize(form, parts, x.dtype))
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


def activate(activation: Activation, wide: Array) -> Array:
    """act(gate) * up of [..., 2, F], or act(up) of [..., 1, F]: in float32, rounded once."""
    # XLA for GPU would write a float32 array of a gate between forward and backward pass.
    is_on_gpu = current_platform() in ("gpu", "cuda", "rocm")
    return _activate(activation, _rows(wide)) if is_on_gpu else _activate_at_once(activation, wide)


def _activate(activation: Activation, rows: Sequence[Array]) -> Array:
    gate, *up = _to_float32(rows)
    return reduce(jnp.multiply, up, ACTIVATIONS[activation](gate)).astype(rows[0].dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _activate_at_once(activation: Activation, wide: Array) -> Array:
    return _activate(activation, _rows(wide))


def _activate_fwd(activation: Activation, wide: Array) -> tuple[Array, list[Array]]:
    rows = _rows(wide)
    if is_for_unit(wide):  # kept apart in place of the product, which the backward pass would cut
        rows = [mark(row, PRODUCT) for row in rows]
    return _activate(activation, rows), rows


def _activate_bwd(activation: Activation, rows: list[Array], dy: Array) -> tuple[Array]:
    """Of both rows at once, where autodiff adds two padded arrays and rounds each step: less than
    half the time in bfloat16 on CPU."""
    gate, *up = _to_float32(rows)
    act, pull = jax.vjp(ACTIVATIONS[activation], gate)
    dy = dy.astype(jnp.float32)
    d_rows = [*pull(reduce(jnp.multiply, up, dy)), *(act * dy for _ in up)]
    return (jnp.stack(d_rows, -2).astype(rows[0].dtype),)


_activate_at_once.defvjp(_activate_fwd, _activate_bwd)


def _rows(wide: Array) -> list[Array]:
    return [wide[..., row, :] for row in range(wide.shape[-2])]


def _to_float32(rows: Sequence[Array]) -> list[Array]:
    return [row.astype(jnp.float32) for row in rows]


def normalize(
    norm: Norm, x: Array, scale: nnx.Param | None, bias: nnx.Param | None = None
) -> Array:
    """RMS norm (Zhang and Sennrich, 2019, arXiv:1910.07467) or layer norm, in float32, over the
    dimensions that `scale` has; x itself without one."""
    if scale is None:
        return x
    x32, scale32 = standardize(norm, x, scale.ndim), scale[...].astype(jnp.float32)
    x32 = x32 * (1 + scale32 if norm.zero_centered else scale32)
    return (x32 if bias is None else x32 + bias[...].astype(jnp.float32)).astype(x.dtype)


def standardize(norm: Norm, x: Array, num_dims: int = 1) -> Array:
    """The norm over the last dimensions before any scale, in float32."""
    dims, x32 = _last(x, num_dims), x.astype(jnp.float32)
    if norm.kind == "layer":
        x32 = x32 - jnp.mean(x32, dims, keepdims=True)
    return x32 * lax.rsqrt(jnp.mean(jnp.square(x32), dims, keepdims=True) + norm.eps)


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

    def logs(self, low: float, high: float, *shape: int) -> nnx.Param:
        """Logarithms of numbers between these."""
        value = jax.random.uniform(self._rngs.params(), shape, jnp.float32, low, high)
        return nnx.Param(jnp.log(value).astype(self._dtype))


class Attention(nnx.Module):
    """Softmax attention over keys and values that are its own, or those of an earlier layer."""

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
        ropes, config = config.ropes, config.of_layer(spec)
        D, K, H = config.width, config.num_kv_heads, config.head_size
        G = config.num_heads // K
        Q = 2 * G if config.gated_attention else G
        # The queries, the key and the value of each key/value head: one product, split over K.
        rows = Q + spec.num_kv_projections
        self.qkv: Weight = init.normal(L, D, K, rows, H)
        self.qkv_bias = init.zeros(L, K, rows, H) if config.qkv_bias else None
        self.out: Weight = init.normal(L, K, G, H, D)
        self.out_bias = init.zeros(L, D) if config.out_bias else None
        self.sinks = init.normal(L, K, G) if config.attention_sinks else None
        q_heads, k_heads = ((K, G), (K, 1)) if config.qk_norm == "all_heads" else ((), ())
        self.q_norm = init.norm(L, *q_heads, H) if config.qk_norm else None
        has_keys = spec.reads_keys is None
        self.k_norm = init.norm(L, *k_heads, H) if config.qk_norm and has_keys else None
        self.v_norm, self.norm = config.v_norm, config.norm
        self.is_gated, self.num_query_rows = config.gated_attention, Q
        self.kv_shape = (K, H)
        self.reads_keys, self.writes_keys = spec.reads_keys, spec.writes_keys
        self.rope = spec.rope
        self.rotation = None if spec.rope is None else ropes.index((spec.rope, H))
        self.scoring = Scoring(
            H**-0.5 if config.attention_scale is None else config.attention_scale,
            config.attention_softcap,
            spec.window,
        )
        self.implementation = compute.attention
        self.exchange: Exchange | None = compute.exchange

    def __call__(
        self, x_BTD: Array, inputs: AttentionInputs, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        noise_BT = inputs.noise_BT
        # [B, T, K, Q + 2, H], or without keys and values
        qkv = dense(x_BTD, self.qkv, self.qkv_bias, self.qkv_lora, noise_BT)
        q_BTKGH, kv = jnp.split(qkv, [self.num_query_rows], axis=-2)
        gate_BTKGH = None
        if self.is_gated:  # each query is followed by its gate
            q_BTKGH, gate_BTKGH = q_BTKGH[..., ::2, :], q_BTKGH[..., 1::2, :]
        q_BTKGH = self._rotate(normalize(self.norm, q_BTKGH, self.q_norm), inputs, is_query=True)
        q_BTKGH = self._keep(q_BTKGH)
        if self.reads_keys is None:
            keys = self._keys(kv, inputs)
        else:
            assert inputs.shared is not None
            keys = inputs.shared[self.reads_keys]
        if cache is not None:
            assert inputs.slot is not None
            put = partial(lax.dynamic_update_slice_in_dim, start_index=inputs.slot)
            keys = Cache(
                put(cache.k_BKHS, keys.k_BKHS.astype(cache.k_BKHS.dtype), axis=3),
                put(cache.v_BKSH, keys.v_BKSH.astype(cache.v_BKSH.dtype), axis=2),
            )
        B, T, K, G, H = q_BTKGH.shape
        mixed_BTNH = attention(
            q_BTKGH.reshape(B, T, K * G, H),
            keys.k_BKHS.transpose(0, 3, 1, 2),
            keys.v_BKSH.swapaxes(1, 2),
            q_positions=inputs.q_positions,
            kv_positions=inputs.kv_positions,
            scoring=self.scoring,
            sinks_N=None if self.sinks is None else self.sinks[...].reshape(-1),
            # A cache is in any order and often read by one query; flash kernels support neither.
            implementation=self.implementation if inputs.slot is None else "reference",
            exchange=self.exchange if inputs.slot is None else None,
        )
        mixed = mixed_BTNH.reshape(B, T, K, G, H)
        if gate_BTKGH is not None:
            mixed *= jax.nn.sigmoid(gate_BTKGH)
        y_BTD = dense(mixed, self.out, self.out_bias, self.out_lora, noise_BT, contract=3)
        return y_BTD, (None if cache is None and self.writes_keys is None else keys)

    def _keys(self, kv: Array, inputs: AttentionInputs) -> Cache:
        """The keys and values of these tokens, from their products [B, T, K, 1 or 2, H]."""
        k_BTK1H, v_BTK1H = kv[..., :1, :], kv[..., -1:, :]
        k_BTK1H = self._keep(self._rotate(normalize(self.norm, k_BTK1H, self.k_norm), inputs))
        if self.v_norm:
            v_BTK1H = standardize(self.norm, v_BTK1H).astype(v_BTK1H.dtype)
        v_BTK1H = self._keep(v_BTK1H)
        return Cache(k_BTK1H[..., 0, :].transpose(0, 2, 3, 1), v_BTK1H[..., 0, :].swapaxes(1, 2))

    def _keep(self, x: Array) -> Array:
        """Keeps x in place of the product that it is made of, so that x is not rotated again. The
        backward pass of a norm or of a gate reads the product itself."""
        return x if self.q_norm is not None or self.is_gated else keep(x, PRODUCT)

    def _rotate(self, x: Array, inputs: AttentionInputs, *, is_query: bool = False) -> Array:
        if self.rope is None or self.rotation is None:
            return x
        rotation = inputs.rotations[self.rotation]
        x = rotate(x, rotation, interleaved=self.rope.interleaved)
        if is_query and rotation.query_scale is not None:
            x = (x * rotation.query_scale).astype(x.dtype)
        return x

    def empty_cache(self, L: int, B: int, S: int, dtype: str) -> Cache | None:
        """That of a stack of these layers; None where they read the keys of others."""
        if self.reads_keys is not None:
            return None
        K, H = self.kv_shape
        return Cache(jnp.zeros((L, B, K, H, S), dtype), jnp.zeros((L, B, K, S, H), dtype))


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
        def mlp(weights: Sequence[Any], inputs: tuple[Array, Array | None]) -> Array:
            gate_up, gate_up_bias, down, down_bias = weights
            x_BtD, noise_Bt = inputs
            wide = dense(x_BtD, gate_up, gate_up_bias, self.gate_up_lora, noise_Bt)
            act: Any = activate(self.activation, wide)
            return dense(act, down, down_bias, self.down_lora, noise_Bt)

        weights: Any = self.gate_up, self.gate_up_bias, self.down, self.down_bias
        tokens = x_BTD.shape[1] // context_parts(x_BTD.shape[1])
        tile_tokens = self.tile_tokens or tokens
        if tokens <= tile_tokens:
            return mlp(weights, (x_BTD, noise_BT))
        run_mlp = lambda weights, inputs: run_in_tiles(partial(mlp, weights), inputs, tile_tokens)
        is_plain = type(self.gate_up) is type(self.down) is nnx.Param
        if not is_plain or self.gate_up_lora is not None or self.down_lora is not None:
            return run_mlp(weights, (x_BTD, noise_BT))
        # A tile at a time, their gradients would be summed over the devices for each tile.
        return map_with_copies(
            lambda weights, x_BTD: run_mlp(weights, (x_BTD, None)),
            [None if w is None else (w[...], _places(w)) for w in weights],
            x_BTD,
            dtype=x_BTD.dtype,
        )


def _places(w: nnx.Param) -> Places:
    """That of a bias is whole on every device."""
    return getattr(w, "places", (None,) * w[...].ndim)


def run_in_tiles(layer: Callable[[Any], Array], inputs: Any, tile_tokens: int) -> Array:
    """Runs `layer` on one tile of the tokens of its inputs [B, T, ...] at a time, and again in the
    backward pass: activations are in memory for one tile only. Where a mesh cuts the tokens, a tile
    has some of every part."""
    B, T = jax.tree.leaves(inputs)[0].shape[:2]
    parts = context_parts(T)
    T //= parts
    tiles = -(-T // tile_tokens)
    if tiles == 1:
        return layer(inputs)
    tile_tokens = -(-T // tiles)  # equal tiles, so that the last has little padding
    tile_tokens += tile_tokens % 2 if parts > 1 else 0  # which a mesh cuts too

    def cut(a: Array) -> Array:
        a = a.reshape(B, parts, T, *a.shape[2:])
        a = jnp.pad(a, [(0, 0)] * 2 + [(0, tiles * tile_tokens - T)] + [(0, 0)] * (a.ndim - 3))
        a = jnp.moveaxis(a.reshape(B, parts, tiles, tile_tokens, *a.shape[3:]), 2, 0)
        return a.reshape(tiles, B, parts * tile_tokens, *a.shape[4:])

    # XLA does not merge a loop's body with that of the forward pass, so no barrier is needed.
    y = lax.map(jax.checkpoint(layer, prevent_cse=False), jax.tree.map(cut, inputs))
    y = jnp.moveaxis(y.reshape(tiles, B, parts, tile_tokens, -1), 0, 2)
    return y.reshape(B, parts, tiles * tile_tokens, -1)[:, :, :T].reshape(B, parts * T, -1)


class ExpertMLP(nnx.Module):
    """A feed-forward layer of which each token takes the experts that a router chooses (Shazeer et
    al., 2017, arXiv:1701.06538), none dropped."""

    router_lora: nnx.Dict | None = None
    expert_gate_up_lora: nnx.Dict | None = None
    expert_down_lora: nnx.Dict | None = None
    shared_gate_lora: nnx.Dict | None = None

    def __init__(self, config: DecoderConfig, compute: ComputeConfig, init: Initializer, L: int):
        assert config.experts is not None
        D, E, M = config.width, config.experts.count, config.experts.width
        has_bias = config.experts.has_bias
        self.router = init.normal(L, D, E)
        self.router_bias = init.zeros(L, E) if has_bias else None
        is_beside = config.experts.is_beside_mlp
        self.router_scale = init.ones(L, D) if is_beside else None
        self.share_scale = init.ones(L, E) if is_beside else None
        self.expert_gate_up: Weight = init.normal(L, E, D, 2, M)
        self.expert_gate_up_bias = init.zeros(L, E, 2, M) if has_bias else None
        self.expert_down: Weight = init.normal(L, E, M, D)
        self.expert_down_bias = init.zeros(L, E, D) if has_bias else None
        has_choice_bias, shared = config.experts.has_choice_bias, config.experts.shared_width
        # In float32 whatever the recipe says: experts may differ by less than bfloat16 can tell.
        self.choice_bias = nnx.Param(jnp.zeros((L, E), jnp.float32)) if has_choice_bias else None
        wide = replace(config, ffn_width=shared)
        self.shared = MLP(wide, compute, init, L) if shared else None
        has_gate = config.experts.has_shared_gate
        self.shared_gate: Weight | None = init.normal(L, D, 1) if has_gate else None
        self.experts, self.norm = config.experts, config.norm
        self.activation: Activation = config.activation
        self.tile_tokens = D if compute.tiled_mlp else None

    def __call__(
        self, x_BTD: Array, inputs: AttentionInputs, routed_BTD: Array | None = None
    ) -> tuple[Array, Routing]:
        """`routed_BTD` is what the router reads, where it is not x."""
        segments_BT, noise_BT = inputs.q_positions.segments, inputs.noise_BT
        # In float32, since a rounded score may choose another expert.
        read_BTD: Array = (x_BTD if routed_BTD is None else routed_BTD).astype(jnp.float32)
        if self.router_scale is not None:
            scale_D = self.router_scale[...].astype(jnp.float32) * x_BTD.shape[-1] ** -0.5
            read_BTD = standardize(self.norm, read_BTD) * scale_D
        logits_BTE = dense(read_BTD, self.router, self.router_bias, self.router_lora, noise_BT)
        choice_bias_E = None if self.choice_bias is None else self.choice_bias[...]
        chosen, routing = choose_experts(self.experts, logits_BTE, segments_BT, choice_bias_E)
        if self.share_scale is not None:
            scale_BTC = self.share_scale[...].astype(jnp.float32)[chosen.choices_BTC]
            chosen = chosen._replace(shares_BTC=chosen.shares_BTC * scale_BTC)
        bias = self.expert_gate_up_bias

        def mix(inputs: Any) -> Array:
            weights = ExpertWeights(
                read_weight(self.expert_gate_up, x_BTD.dtype),
                None if bias is None else bias[...],
                read_weight(self.expert_down, x_BTD.dtype),
                *_factors(self.expert_gate_up_lora),
                *_factors(self.expert_down_lora),
            )
            return mix_experts(weights, *inputs, activate=self._activate)

        if isinstance(self.expert_down, QuantizedWeight):
            mix = jax.checkpoint(mix)  # does not keep the whole weights
        tokens = (x_BTD, *chosen)
        if self.tile_tokens is None:
            y_BTD = mix(tokens)
        else:
            y_BTD = run_in_tiles(mix, tokens, self.tile_tokens)
        if self.expert_down_bias is not None:
            y_BTD += dense(chosen.shares(self.experts.count), self.expert_down_bias[...]).astype(
                y_BTD.dtype
            )
        return y_BTD if self.shared is None else y_BTD + self._share(x_BTD, noise_BT), routing

    def _share(self, x_BTD: Array, noise_BT: Array | None) -> Array:
        assert self.shared is not None
        y_BTD = self.shared(x_BTD, noise_BT)
        if self.shared_gate is None:
            return y_BTD
        gate_BT1 = dense(x_BTD, self.shared_gate, None, self.shared_gate_lora, noise_BT)
        return y_BTD * jax.nn.sigmoid(gate_BT1)

    def _activate(self, wide_RUM: Array) -> Array:
        if (limit := self.experts.swiglu_limit) is None:
            return activate(self.activation, wide_RUM)
        gate_RM = jnp.minimum(wide_RUM[:, 0], limit)
        up_RM = jnp.clip(wide_RUM[:, 1], -limit, limit)
        return (up_RM + 1) * gate_RM * jax.nn.sigmoid(self.experts.swiglu_alpha * gate_RM)


def _factors(adapters: nnx.Dict | None) -> tuple[Array | None, Array | None]:
    """Those of the adapter of all experts, with its scale in the second."""
    if adapters is None:
        return None, None
    (adapter,) = adapters.values()
    return adapter.a[...], adapter.b[...] * adapter.scale[...]


def attach_adapters(module: nnx.Module, path: str, sites: Sequence[AdapterSite]) -> None:
    """Gives adapters to a product with the parameter at this path, which is in this module."""
    name = path.rsplit("/", 1)[-1]
    weight, matrix = getattr(module, name)[...], MATRICES[place_of(path)]
    adapters = {site.name: Adapter(site, weight, matrix) for site in sites}
    setattr(module, f"{name}_lora", nnx.Dict(adapters))


class LayerInput(nnx.Module):
    """Adds the own input of a layer: gated by the residual stream, widened, normalised."""

    narrow_lora: nnx.Dict | None = None
    widen_lora: nnx.Dict | None = None

    def __init__(self, config: DecoderConfig, init: Initializer, L: int):
        D, I = config.width, config.per_layer_width
        self.narrow = init.normal(L, D, I)
        self.widen = init.normal(L, I, D)
        self.post_norm = init.norm(L, D)
        self.norm = config.norm
        self.activation: Activation = config.activation

    def __call__(self, x_BTD: Array, own_BTI: Array, noise_BT: Array | None) -> Array:
        gate_BTI = dense(x_BTD, self.narrow, None, self.narrow_lora, noise_BT)
        own_BTI = ACTIVATIONS[self.activation](gate_BTI) * own_BTI
        y_BTD = dense(own_BTI, self.widen, None, self.widen_lora, noise_BT)
        return normalize(self.norm, y_BTD, self.post_norm)


class LayerInputs(nnx.Module):
    """Makes the own inputs of all layers, from a token's embedding and its row of their table."""

    project_lora: nnx.Dict | None = None

    def __init__(self, config: DecoderConfig, init: Initializer, L: int):
        D, I = config.width, config.per_layer_width
        self.project = init.normal(L, D, config.num_layers, I)
        self.project_norm = init.norm(L, I)
        self.norm = config.norm

    def __call__(self, x_BTD: Array, table_BTXI: Array, noise_BT: Array | None) -> Array:
        """Float [B, T, X, I] for the X layers of the decoder."""
        made = dense(x_BTD, self.project, None, self.project_lora, noise_BT)
        made = normalize(self.norm, made * x_BTD.shape[-1] ** -0.5, self.project_norm)
        return (made + table_BTXI * table_BTXI.shape[-1] ** 0.5) * 2**-0.5
