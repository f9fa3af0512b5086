"""Multi-head latent attention (DeepSeek-AI, 2024, arXiv:2405.04434, section 2.1): the keys and
values of all heads are products of one small vector of each token, which alone is cached.

Beside `out` and `out_bias` its parameters are q [L, D, N, H], or q_a [L, D, Q], q_a_bias, q_a_norm
[L, Q] and q_b [L, Q, N, H]; kv_a [L, D, C + R], kv_a_bias [L, C + R], kv_a_norm [L, C], kv_b
[L, C, N, P + X].

B batch, T tokens, S key tokens, D width, N heads, Q numbers of which queries are made, C of which
keys and values are, R rotated channels, P channels that are not, H = P + R channels of a query and
a key, X of a value, L layers.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxtrain.kernels.attention import Exchange, Scoring, attention
from jaxtrain.model.config import ComputeConfig, DecoderConfig, LayerSpec
from jaxtrain.model.layers import (
    AttentionInputs,
    Initializer,
    Weight,
    dense,
    normalize,
    read_weight,
)
from jaxtrain.model.rope import rotate

NORM_EPS = 1e-6  # of the norms of latents, whatever the other norms have


class LatentCache(NamedTuple):
    """What keys and values are made of, of one layer or, with a leading L, of a stack."""

    latent_BSC: Array
    rotated_BSR: Array
    """the channels of keys that are rotated, which all heads share"""


class LatentAttention(nnx.Module):
    q_lora: nnx.Dict | None = None
    q_a_lora: nnx.Dict | None = None
    q_b_lora: nnx.Dict | None = None
    kv_a_lora: nnx.Dict | None = None
    kv_b_lora: nnx.Dict | None = None
    out_lora: nnx.Dict | None = None

    def __init__(
        self,
        config: DecoderConfig,
        spec: LayerSpec,
        compute: ComputeConfig,
        init: Initializer,
        L: int,
    ):
        latent = config.latent
        assert latent is not None and spec.rope is not None
        D, N, Q, C = config.width, config.num_heads, latent.q_rank, latent.kv_rank
        R, P, X = config.head_size, latent.plain_size, latent.value_size
        if Q is None:
            self.q = init.normal(L, D, N, P + R)
        else:
            self.q_a = init.normal(L, D, Q)
            self.q_a_bias = init.zeros(L, Q) if config.qkv_bias else None
            self.q_a_norm = init.norm(L, Q)
            self.q_b = init.normal(L, Q, N, P + R)
        self.kv_a = init.normal(L, D, C + R)
        self.kv_a_bias = init.zeros(L, C + R) if config.qkv_bias else None
        self.kv_a_norm = init.norm(L, C)
        self.kv_b: Weight = init.normal(L, C, N, P + X)
        self.out: Weight = init.normal(L, N, 1, X, D)
        self.out_bias = init.zeros(L, D) if config.out_bias else None
        self.norm = replace(config.norm, eps=NORM_EPS)
        self.sizes, self.has_q_rank = latent, Q is not None
        self.cached = C, R
        self.rotation = config.ropes.index((spec.rope, config.head_size))
        self.is_interleaved = spec.rope.interleaved
        self.scoring = Scoring(config.query_size**-0.5 * spec.rope.score_scale)
        self.implementation = compute.attention
        self.exchange: Exchange | None = compute.exchange

    def __call__(
        self, x_BTD: Array, inputs: AttentionInputs, cache: LatentCache | None
    ) -> tuple[Array, LatentCache | None]:
        rotation = inputs.rotations[self.rotation]
        turn = partial(rotate, rotation=rotation, interleaved=self.is_interleaved)
        plain_BTNP, q_BTNR = jnp.split(self._queries(x_BTD, inputs), [self.sizes.plain_size], -1)
        q_BTNR = turn(q_BTNR[:, :, None])[:, :, 0]
        kv_BTA = dense(x_BTD, self.kv_a, self.kv_a_bias, self.kv_a_lora, inputs.noise_BT)
        latent_BTC, k_BTR = jnp.split(kv_BTA, [self.sizes.kv_rank], -1)
        latent_BTC = normalize(self.norm, latent_BTC, self.kv_a_norm)
        keys = LatentCache(latent_BTC, turn(k_BTR[:, :, None, None])[:, :, 0, 0])
        if cache is not None:
            assert inputs.slot is not None
            put = partial(lax.dynamic_update_slice_in_dim, start_index=inputs.slot, axis=1)
            keys = jax.tree.map(lambda old, new: put(old, new.astype(old.dtype)), cache, keys)
        # For one query it is cheaper to take it to the latents than to make the keys of all tokens.
        few = cache is not None and x_BTD.shape[1] == 1 and self.kv_b_lora is None
        mix = self._attend_to_latents if few else self._attend_to_keys
        mixed_BTNX = mix(plain_BTNP, q_BTNR, keys, inputs)
        y_BTD = dense(
            mixed_BTNX[..., None, :], self.out, self.out_bias, self.out_lora, inputs.noise_BT,
            contract=3,
        )  # fmt: skip
        return y_BTD, (None if cache is None else keys)

    def _queries(self, x_BTD: Array, inputs: AttentionInputs) -> Array:
        """[B, T, N, H]"""
        noise_BT = inputs.noise_BT
        if not self.has_q_rank:
            return dense(x_BTD, self.q, None, self.q_lora, noise_BT)
        q_BTQ = dense(x_BTD, self.q_a, self.q_a_bias, self.q_a_lora, noise_BT)
        q_BTQ = normalize(self.norm, q_BTQ, self.q_a_norm)
        return dense(q_BTQ, self.q_b, None, self.q_b_lora, noise_BT)

    def _attend_to_keys(
        self, plain_BTNP: Array, q_BTNR: Array, keys: LatentCache, inputs: AttentionInputs
    ) -> Array:
        """[B, T, N, X]"""
        latent_BSC, rotated_BSR = keys
        kv = dense(latent_BSC, self.kv_b, None, self.kv_b_lora, inputs.noise_BT)
        k_BSNP, v_BSNX = jnp.split(kv, [self.sizes.plain_size], -1)
        k_BSNR = jnp.broadcast_to(
            rotated_BSR[:, :, None], (*k_BSNP.shape[:-1], rotated_BSR.shape[-1])
        )
        return self._attend(
            jnp.concatenate([plain_BTNP, q_BTNR], -1),
            jnp.concatenate([k_BSNP, k_BSNR], -1),
            v_BSNX,
            inputs,
            # A cache is in any order; flash kernels do not support that.
            self.implementation if inputs.slot is None else "reference",
        )

    def _attend_to_latents(
        self, plain_BTNP: Array, q_BTNR: Array, keys: LatentCache, inputs: AttentionInputs
    ) -> Array:
        """The same, with the matrices of keys and values applied to queries and what they take."""
        latent_BSC, rotated_BSR = keys
        kv_b = read_weight(self.kv_b, plain_BTNP.dtype)
        k_CNP, v_CNX = jnp.split(kv_b, [self.sizes.plain_size], -1)
        q_BTNC = jnp.einsum("btnp,cnp->btnc", plain_BTNP, k_CNP)
        mixed_BTNC = self._attend(
            jnp.concatenate([q_BTNC, q_BTNR], -1),
            jnp.concatenate([latent_BSC, rotated_BSR], -1)[:, :, None],
            latent_BSC[:, :, None],
            inputs,
            "reference",
        )
        return jnp.einsum("btnc,cnx->btnx", mixed_BTNC, v_CNX)

    def _attend(self, q: Array, k: Array, v: Array, inputs: AttentionInputs, how: str) -> Array:
        return attention(
            q, k, v, q_positions=inputs.q_positions, kv_positions=inputs.kv_positions,
            scoring=self.scoring, implementation=how,
            exchange=self.exchange if inputs.slot is None else None,
        )  # fmt: skip

    def empty_cache(self, L: int, B: int, S: int, dtype: str) -> LatentCache:
        """Of a stack of these layers."""
        return LatentCache(*(jnp.zeros((L, B, S, size), dtype) for size in self.cached))
