"""The layers of the decoder. Each holds its parameters stacked over the layers of its group.

A module is built with a leading dimension L on every parameter, and called with one layer of it, as
`lax.scan` cuts it: the graph of a module does not know shapes, so merging it with either is legal.

B batch, T tokens, S key tokens, D width, N query heads, K key/value heads, G = N / K query heads to
a key/value head, H head size, F feed-forward, V vocabulary, L layers.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxtrain.kernels.attention import TokenPositions, attention
from jaxtrain.model.config import ComputeConfig, DecoderConfig, LayerSpec
from jaxtrain.model.rope import rotate
from jaxtrain.parallel.sharding import constrain


class AttentionInputs(NamedTuple):
    """What all layers of a forward pass share: where the queries and the keys stand."""

    q_places: TokenPositions
    kv_places: TokenPositions
    cos: Array
    sin: Array
    slot: Array | None = None
    """int32 []: where in the cache the keys of these tokens go; None without a cache"""


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, of one layer or, with a leading L, of a stack."""

    k_BSKH: Array
    v_BSKH: Array


def dense(x: Array, w: Array, *, contract: int = 1) -> Array:
    """Product over the last `contract` dimensions of x and the first of w, in the dtype of x.

    Every product with a layer's weight goes through here. w keeps its layout: no transposed copy.
    """
    return _product(contract, x, w.astype(x.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(contract: int, x: Array, w: Array) -> Array:
    return _product_fwd(contract, x, w)[0]


def _product_fwd(contract: int, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    # The product stands here in the open, where a rematerialisation policy can see it.
    dims = (_last(x, contract), tuple(range(contract)))
    return lax.dot_general(x, w, (dims, ((), ()))), (x, w)


def _product_bwd(contract: int, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """As autodiff, but dw comes out in the layout of w: a twentieth of a step on CPU.

    Autodiff makes the transpose of dw and turns it, and contracts B and T as two dimensions, for
    which the compiler first turns dy.
    """
    x, w = saved
    outputs = w.ndim - contract
    to_outputs = tuple(range(contract, w.ndim))
    dx = lax.dot_general(dy, w, ((_last(dy, outputs), to_outputs), ((), ())))
    x = x.reshape(-1, *x.shape[x.ndim - contract :])
    dy = dy.reshape(-1, *dy.shape[dy.ndim - outputs :])
    return dx, lax.dot_general(x, dy, (((0,), (0,)), ((), ())))


_product.defvjp(_product_fwd, _product_bwd)


def _last(x: Array, count: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - count, x.ndim))


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Over the last dimension, in float32 (Zhang and Sennrich, 2019, arXiv:1910.07467)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


class Initial:
    """First values of parameters; drawn in float32, so that another dtype is only a rounding."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, dtype: str):
        self._std, self._rngs, self._dtype = config.initializer_range, rngs, dtype

    def normal(self, *shape: int) -> nnx.Param:
        value = self._std * jax.random.normal(self._rngs.params(), shape, jnp.float32)
        return nnx.Param(value.astype(self._dtype))

    def ones(self, *shape: int) -> nnx.Param:
        return nnx.Param(jnp.ones(shape, self._dtype))

    def zeros(self, *shape: int) -> nnx.Param:
        return nnx.Param(jnp.zeros(shape, self._dtype))


class Embed(nnx.Module):
    def __init__(self, config: DecoderConfig, initial: Initial):
        self.embedding = initial.normal(config.vocab_size, config.width)

    def __call__(self, tokens_BT: Array, dtype: str) -> Array:
        return jnp.take(self.embedding[...], tokens_BT, axis=0, mode="clip").astype(dtype)


class Attention(nnx.Module):
    def __init__(
        self,
        config: DecoderConfig,
        spec: LayerSpec,
        compute: ComputeConfig,
        initial: Initial,
        L: int,
    ):
        D, K, H = config.width, config.num_kv_heads, config.head_size
        G = config.num_heads // K
        # For each key/value head its queries, its key, its value: one product, split over K.
        self.qkv = initial.normal(L, D, K, G + 2, H)
        self.qkv_bias = initial.zeros(L, K, G + 2, H) if config.qkv_bias else None
        self.out = initial.normal(L, K, G, H, D)
        self.out_bias = initial.zeros(L, D) if config.out_bias else None
        self.q_norm = initial.ones(L, H) if config.qk_norm else None
        self.k_norm = initial.ones(L, H) if config.qk_norm else None
        self.eps = config.rms_eps
        self.window = spec.window
        self.implementation = compute.attention

    def __call__(
        self, x_BTD: Array, view: AttentionInputs, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        qkv = dense(x_BTD, self.qkv[...])  # [B, T, K, G + 2, H]
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...].astype(qkv.dtype)
        q_BTKGH, k_BTK1H, v_BTK1H = qkv[..., :-2, :], qkv[..., -2:-1, :], qkv[..., -1:, :]
        if self.q_norm is not None and self.k_norm is not None:
            q_BTKGH = rms_norm(q_BTKGH, self.q_norm[...], self.eps)
            k_BTK1H = rms_norm(k_BTK1H, self.k_norm[...], self.eps)
        q_BTKGH = rotate(q_BTKGH, view.cos, view.sin)
        k_BTKH = rotate(k_BTK1H, view.cos, view.sin)[:, :, :, 0]
        v_BTKH = v_BTK1H[:, :, :, 0]
        keys = Cache(k_BTKH, v_BTKH)
        if cache is not None:
            assert view.slot is not None
            keys = Cache(*(
                lax.dynamic_update_slice_in_dim(kept, new.astype(kept.dtype), view.slot, axis=1)
                for kept, new in zip(cache, keys, strict=True)
            ))  # fmt: skip
        B, T, K, G, H = q_BTKGH.shape
        mixed_BTNH = attention(
            q_BTKGH.reshape(B, T, K * G, H),
            *keys,
            q_places=view.q_places,
            kv_places=view.kv_places,
            window=self.window,
            # A cache is in any order and often met by one query: flash kernels do neither.
            implementation=self.implementation if cache is None else "reference",
        )
        y_BTD = dense(mixed_BTNH.reshape(B, T, K, G, H), self.out[...], contract=3)
        if self.out_bias is not None:
            y_BTD = y_BTD + self.out_bias[...].astype(y_BTD.dtype)
        return y_BTD, (None if cache is None else keys)


class GatedMLP(nnx.Module):
    """down(silu(gate x) * up x) (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig, compute: ComputeConfig, initial: Initial, L: int):
        D, F = config.width, config.ffn_width
        self.gate_up = initial.normal(L, D, 2, F)
        self.down = initial.normal(L, F, D)
        self.tile_tokens = D if compute.tiled_mlp else None

    def __call__(self, x_BTD: Array) -> Array:
        gate_up, down = self.gate_up[...], self.down[...]

        def mlp(x_BtD: Array) -> Array:
            wide = dense(x_BtD, gate_up)  # [B, t, 2, F]
            return dense(jax.nn.silu(wide[..., 0, :]) * wide[..., 1, :], down)

        return mlp(x_BTD) if self.tile_tokens is None else tiled(mlp, x_BTD, self.tile_tokens)


def tiled(layer: Callable[[Array], Array], x_BTD: Array, tile_tokens: int) -> Array:
    """`layer` on pieces of a row, one after another, each made again in the backward pass: what a
    layer makes on its way is held for one piece."""
    B, T, D = x_BTD.shape
    tiles = -(-T // tile_tokens)
    if tiles == 1:
        return layer(x_BTD)
    tile_tokens = -(-T // tiles)  # equal pieces, so that little padding fills the last
    x_BTD = jnp.pad(x_BTD, ((0, 0), (0, tiles * tile_tokens - T), (0, 0)))
    pieces = x_BTD.reshape(B, tiles, tile_tokens, D).swapaxes(0, 1)
    # Inside a loop nothing is merged with the forward pass, so the check against that can go.
    done = lax.map(jax.checkpoint(layer, prevent_cse=False), pieces)
    return done.swapaxes(0, 1).reshape(x_BTD.shape)[:, :T]


class Block(nnx.Module):
    """Attention and feed-forward, each on a norm of the stream and added to it."""

    def __init__(
        self,
        config: DecoderConfig,
        spec: LayerSpec,
        compute: ComputeConfig,
        initial: Initial,
        L: int,
    ):
        self.attention_norm = initial.ones(L, config.width)
        self.attention = Attention(config, spec, compute, initial, L)
        self.mlp_norm = initial.ones(L, config.width)
        self.mlp = GatedMLP(config, compute, initial, L)
        self.eps = config.rms_eps

    def __call__(
        self, x_BTD: Array, view: AttentionInputs, cache: Cache | None = None
    ) -> tuple[Array, Cache | None]:
        mixed_BTD, cache = self.attention(
            rms_norm(x_BTD, self.attention_norm[...], self.eps), view, cache
        )
        x_BTD = x_BTD + mixed_BTD
        x_BTD = x_BTD + self.mlp(rms_norm(x_BTD, self.mlp_norm[...], self.eps))
        return constrain(x_BTD, "batch", None, None), cache
