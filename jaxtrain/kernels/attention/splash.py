"""Attention with jax's Pallas kernel for TPU (splash attention), mapped over a mesh.

B batch, T tokens, N query heads, K key/value heads, H head size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)

from jaxtrain.kernels.attention.each_device import map_over_devices
from jaxtrain.kernels.attention.mask import Scoring, TokenPositions

LANES = 128  # block sizes of the kernel are multiples of this
LARGEST_BLOCK = 512


def splash_attention(
    scoring: Scoring,
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    q_positions: TokenPositions,
    kv_positions: TokenPositions,
    sinks_N: Array | None,
    *,
    interpret: bool,
) -> Array:
    """Self-attention; a window counts indices, so positions must rise by one per token."""
    T, S = q_BTNH.shape[1], k_BTKH.shape[1]
    if T != S:
        raise NotImplementedError(
            f"splash attention supports only self-attention, found {T} queries and {S} keys; "
            "use implementation 'reference' with a cache"
        )
    if not interpret and (fault := splash_fault(q_BTNH.shape[-1:])):
        raise NotImplementedError(fault)
    local = partial(_local_attention, scoring=scoring, interpret=interpret)
    return map_over_devices(local, q_BTNH, k_BTKH, v_BTKH, q_positions, kv_positions, sinks_N)


def splash_fault(head_sizes: Sequence[int]) -> str | None:
    """Why the kernel does not support these sizes of queries, if so."""
    if odd := [size for size in head_sizes if size % 64]:
        return f"splash attention needs a head size that is a multiple of 64, found {odd[0]}"
    return None


def _local_attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    positions: TokenPositions,
    kv_positions: TokenPositions,
    sinks_N: Array | None,
    *,
    scoring: Scoring,
    interpret: bool,
) -> Array:
    del kv_positions  # the same tokens
    (T, N), segments_BT = q_BTNH.shape[1:3], positions.segments
    fill = -T % LANES
    kernel = _kernel(T + fill, N, scoring, interpret)

    def pad(x_BTNH: Array) -> Array:
        return jnp.pad(x_BTNH, ((0, 0), (0, fill), (0, 0), (0, 0))).swapaxes(1, 2)

    # In float32: a scale rounded to bfloat16 would bias every score by the same factor.
    q_BTNH = (q_BTNH.astype(jnp.float32) * scoring.scale).astype(q_BTNH.dtype)
    # Padding forms a segment of its own, so that no row of scores is empty.
    filled_BT = jnp.pad(segments_BT, ((0, 0), (0, fill)))
    out_BNTH = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(
        pad(q_BTNH),
        pad(k_BTKH),
        pad(v_BTKH),
        SegmentIds(filled_BT, filled_BT),
        sinks_N,
    )
    out_BTNH = out_BNTH.swapaxes(1, 2)[:, :T]
    return jnp.where((segments_BT != 0)[:, :, None, None], out_BTNH, 0)


def _kernel(T: int, N: int, scoring: Scoring, interpret: bool) -> Callable[..., Array]:
    block = next(b for b in (LARGEST_BLOCK, 256, LANES) if T % b == 0)
    shape, window = (T, T), scoring.window
    mask = CausalMask(shape) if window is None else LocalMask(shape, (window - 1, 0), 0)
    kernel = make_splash_mha(
        MultiHeadMask([mask] * N),
        block_sizes=BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=scoring.softcap,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    return cast(Callable[..., Array], kernel)  # residuals are not requested
