"""Layers that mix tokens through a state of fixed size: the gated delta rule, short convolutions.

A module is called as those of layers.py are.

B batch, T tokens, D width, K key heads, G value heads to each, A key size, C value size, R = 2 A +
G C channels of a key head's query, key and values, S taps of a convolution, X channels, L layers.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxtrain.kernels.delta_rule import delta_rule, delta_step, last_tokens, short_convolution
from jaxtrain.model.config import Activation, ComputeConfig, DecoderConfig, LayerSpec
from jaxtrain.model.layers import (
    ACTIVATIONS,
    AttentionInputs,
    Initializer,
    dense,
    normalize,
)

L2_EPS = 1e-6  # of the norm of queries and keys
DECAY_RATES = (0.01, 16.0)  # of new layers, per token


class State(NamedTuple):
    """What a layer knows of the tokens so far, of one layer or, with a leading L, of a stack."""

    past_BSX: Array
    """the last inputs of its convolution, one less than it has taps"""
    memory_BKGAC: Array | None = None
    """float32: the state of the delta rule"""


class DeltaRule(nnx.Module):
    """Linear attention by the gated delta rule (Yang et al., 2024, arXiv:2412.06464), as in Qwen
    3.5: queries, keys and values pass a short convolution, and what is read is normalised and
    gated."""

    in_qkv_lora: nnx.Dict | None = None
    in_gate_lora: nnx.Dict | None = None
    in_strength_lora: nnx.Dict | None = None
    in_decay_lora: nnx.Dict | None = None
    out_lora: nnx.Dict | None = None

    def __init__(
        self,
        config: DecoderConfig,
        spec: LayerSpec,
        compute: ComputeConfig,
        init: Initializer,
        L: int,
    ):
        assert config.delta is not None
        D, (K, G, _, C) = config.width, config.delta.sizes
        self.in_qkv = init.normal(L, D, K, config.delta.channels)
        self.in_gate = init.normal(L, D, K, G, C)
        self.in_strength = init.normal(L, D, K, G)
        self.in_decay = init.normal(L, D, K, G)
        self.decay_bias = init.ones(L, K, G)
        self.log_decay_scale = init.logs(*DECAY_RATES, L, K, G)
        self.qkv_conv = init.normal(L, config.delta.conv_taps, K, config.delta.channels)
        self.out_norm = init.ones(L, C)
        self.out = init.normal(L, K, G, C, D)
        self.sizes = config.delta
        self.norm = replace(config.norm, zero_centered=False)
        self.activation: Activation = config.activation

    def __call__(
        self, x_BTD: Array, inputs: AttentionInputs, cache: State | None
    ) -> tuple[Array, State | None]:
        noise_BT, segments_BT = inputs.noise_BT, inputs.q_positions.segments
        project = partial(dense, x_BTD, noise_BT=noise_BT)
        before_BTKR = project(self.in_qkv, adapters=self.in_qkv_lora)
        mixed_BTKR, past = mix_nearby(before_BTKR, self.qkv_conv[...], segments_BT, cache)
        A, (B, T, K, _) = self.sizes.key_size, mixed_BTKR.shape
        mixed_BTKR = ACTIVATIONS[self.activation](mixed_BTKR)
        q_BTKA, k_BTKA, v = jnp.split(mixed_BTKR, [A, 2 * A], axis=-1)
        v_BTKGC = v.reshape(B, T, K, -1, self.sizes.value_size)
        # Padding neither decays nor writes: the state after a prompt is that of its last token.
        is_token_BT11 = (segments_BT != 0)[..., None, None]
        strength = project(self.in_strength, adapters=self.in_strength_lora)
        time = project(self.in_decay, adapters=self.in_decay_lora).astype(jnp.float32)
        time = jax.nn.softplus(time + self.decay_bias[...].astype(jnp.float32))
        rate = jnp.exp(self.log_decay_scale[...].astype(jnp.float32))
        tokens = (
            unit(q_BTKA) * A**-0.5,
            unit(k_BTKA),
            v_BTKGC,
            jnp.where(is_token_BT11, -rate * time, 0.0),
            jnp.where(is_token_BT11, jax.nn.sigmoid(strength.astype(jnp.float32)), 0.0),
        )
        if cache is None:
            y_BTKGC, _ = delta_rule(*tokens, segments_BT=segments_BT)
        else:
            assert past is not None and cache.memory_BKGAC is not None
            step = delta_step if T == 1 else delta_rule
            y_BTKGC, memory = step(*tokens, state_BKGAC=cache.memory_BKGAC)
            cache = State(past, memory)
        gate_BTKGC = project(self.in_gate, adapters=self.in_gate_lora).astype(jnp.float32)
        y_BTKGC = normalize(self.norm, y_BTKGC, self.out_norm) * jax.nn.silu(gate_BTKGC)
        y_BTKGC = y_BTKGC.astype(x_BTD.dtype)
        return dense(y_BTKGC, self.out, None, self.out_lora, noise_BT, contract=3), cache

    def empty_cache(self, L: int, B: int, S: int, dtype: str) -> State:
        """Of a stack of these layers; S slots for tokens change nothing."""
        (K, G, A, C), R = self.sizes.sizes, self.sizes.channels
        past = jnp.zeros((L, B, self.sizes.conv_taps - 1, K, R), dtype)
        return State(past, jnp.zeros((L, B, K, G, A, C), jnp.float32))


class ShortConvolution(nnx.Module):
    """A convolution over the last few tokens between two gates, as in LFM2 (Liquid AI, 2025,
    arXiv:2511.23404)."""

    in_bcx_lora: nnx.Dict | None = None
    conv_out_lora: nnx.Dict | None = None

    def __init__(
        self,
        config: DecoderConfig,
        spec: LayerSpec,
        compute: ComputeConfig,
        init: Initializer,
        L: int,
    ):
        D, taps, has_bias = config.width, config.conv_taps, config.conv_bias
        self.in_bcx = init.normal(L, D, 3, D)
        self.in_bcx_bias = init.zeros(L, 3, D) if has_bias else None
        self.conv = init.normal(L, taps, D)
        self.conv_bias = init.zeros(L, D) if has_bias else None
        self.conv_out = init.normal(L, D, D)
        self.conv_out_bias = init.zeros(L, D) if has_bias else None

    def __call__(
        self, x_BTD: Array, inputs: AttentionInputs, cache: State | None
    ) -> tuple[Array, State | None]:
        noise_BT, segments_BT = inputs.noise_BT, inputs.q_positions.segments
        bcx = dense(x_BTD, self.in_bcx, self.in_bcx_bias, self.in_bcx_lora, noise_BT)
        in_gate_BTD, out_gate_BTD, x_BTD = bcx[..., 0, :], bcx[..., 1, :], bcx[..., 2, :]
        y_BTD, past = mix_nearby(in_gate_BTD * x_BTD, self.conv[...], segments_BT, cache)
        if self.conv_bias is not None:
            y_BTD += self.conv_bias[...].astype(y_BTD.dtype)
        y_BTD = out_gate_BTD * y_BTD
        out = self.conv_out, self.conv_out_bias, self.conv_out_lora
        y_BTD = dense(y_BTD, *out, noise_BT)
        return y_BTD, None if past is None else State(past)

    def empty_cache(self, L: int, B: int, S: int, dtype: str) -> State:
        """Of a stack of these layers; S slots for tokens change nothing."""
        taps, D = self.conv[...].shape[-2:]
        return State(jnp.zeros((L, B, taps - 1, D), dtype))


def mix_nearby(
    x_BTX: Array, weight_SX: Array, segments_BT: Array, cache: State | None
) -> tuple[Array, Array | None]:
    """The short convolution of documents, or of the one that a cache has begun, with the past of
    the tokens after these."""
    if cache is None:
        return short_convolution(x_BTX, weight_SX, segments_BT=segments_BT), None
    y_BTX = short_convolution(x_BTX, weight_SX, past_BSX=cache.past_BSX)
    return y_BTX, last_tokens(x_BTX, cache.past_BSX, segments_BT)


def unit(x: Array) -> Array:
    """Vectors of length 1, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + L2_EPS)
