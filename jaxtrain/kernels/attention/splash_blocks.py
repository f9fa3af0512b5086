"""Blocks of a ring by jax's Pallas kernel for TPU: queries with a part of the keys that they see.

B batch, T tokens, N query heads, K key/value heads, H head size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import (
    CausalMask,
    FullMask,
    SegmentIds,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

from jaxtrain.kernels.attention.mask import Scoring, TokenPositions
from jaxtrain.kernels.attention.splash import LANES, make_kernel

NO_SEGMENT = -1  # of keys that fill a block


def splash_block(
    scoring: Scoring,
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    q_positions: TokenPositions,
    kv_positions: TokenPositions,
    sinks_N: Array | None,
    *,
    same_order: bool,
    interpret: bool,
) -> tuple[Array, Array]:
    """As `reference.attend`, but that keys of another order are all of earlier tokens, and that a
    query which sees nothing has a result of no weight."""
    assert scoring.window is None
    T = q_BTNH.shape[1]
    kernel = _kernel(T, q_BTNH.shape[2], scoring, same_order, interpret)
    segments = _segments(q_positions, kv_positions)
    q_BTNH = _scale(q_BTNH, scoring)
    attend = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
    out_BNTH, (lse_BNT,) = attend(*map(_heads_first, (q_BTNH, k_BTKH, v_BTKH)), segments, sinks_N)
    # Padding attends to padding there.
    is_token_BT11 = (q_positions.segments != 0)[..., None, None]
    out_BTNH = jnp.where(is_token_BT11, _tokens_first(out_BNTH, T).astype(jnp.float32), 0)
    return out_BTNH, _tokens_first(lse_BNT, T)


def splash_block_backward(
    scoring: Scoring, saved, d_out_BTNH: Array, *, same_order: bool, interpret: bool
) -> tuple[Array, Array, Array]:
    """As `reference.attend_backward`. The kernel has no public function of a result and a log-sum-
    exp that are over more keys than these."""
    q_BTNH, k_BTKH, v_BTKH, q_positions, kv_positions, _, out_BTNH, lse_BTN = saved
    T = q_BTNH.shape[1]
    kernel = _kernel(T, q_BTNH.shape[2], scoring, same_order, interpret)
    how = kernel.kwargs
    masks = kernel.dq_mask_info, kernel.dkv_mask_info
    is_token_BT11 = (q_positions.segments != 0)[..., None, None]
    d_out_BTNH = jnp.where(is_token_BT11, d_out_BTNH, 0)

    def backward(q, k, v, segments: SegmentIds, out, lse, d_out) -> Any:
        return splash._splash_attention_bwd(
            False, how["mask_value"], how["is_mqa"], how["block_sizes"], None,
            how["mask_function"], how["attn_logits_soft_cap"], interpret,
            (q, k, v, segments, None, out, lse, *masks), d_out,
        )[3:6]  # fmt: skip

    arrays = map(_heads_first, (_scale(q_BTNH, scoring), k_BTKH, v_BTKH))
    results = map(_heads_first, (out_BTNH, lse_BTN, d_out_BTNH))
    backward_of_batch = cast("Callable[..., Any]", jax.vmap(backward))
    found = backward_of_batch(*arrays, _segments(q_positions, kv_positions), *results)
    d_q, d_k, d_v = (_tokens_first(d, T).astype(jnp.float32) for d in found)
    return d_q * scoring.scale, d_k, d_v


def _scale(q_BTNH: Array, scoring: Scoring) -> Array:
    return (q_BTNH.astype(jnp.float32) * scoring.scale).astype(q_BTNH.dtype)


def _heads_first(x_BTN: Array) -> Array:
    fill = -x_BTN.shape[1] % LANES
    return jnp.pad(x_BTN, ((0, 0), (0, fill), *((0, 0),) * (x_BTN.ndim - 2))).swapaxes(1, 2)


def _tokens_first(x_BNT: Array, T: int) -> Array:
    return x_BNT.swapaxes(1, 2)[:, :T]


def _segments(q_positions: TokenPositions, kv_positions: TokenPositions) -> SegmentIds:
    fill = -q_positions.segments.shape[1] % LANES
    pad = partial(jnp.pad, pad_width=((0, 0), (0, fill)))
    q_BT = pad(q_positions.segments)
    return SegmentIds(q_BT, pad(kv_positions.segments, constant_values=NO_SEGMENT))


def _kernel(T: int, N: int, scoring: Scoring, same_order: bool, interpret: bool) -> Any:
    T += -T % LANES
    shape = T, T
    mask = CausalMask(shape) if same_order else FullMask(shape)
    return make_kernel(mask, N, scoring, interpret=interpret, returns_lse=True)
