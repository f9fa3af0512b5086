"""Attention with jax's Pallas kernel for TPU (splash attention), mapped over a mesh.

B batch, T tokens, N query heads, K key/value heads, H head size.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

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
    shape, window = (T + fill, T + fill), scoring.window
    mask = CausalMask(shape) if window is None else LocalMask(shape, (window - 1, 0), 0)
    kernel = make_kernel(mask, N, scoring, interpret=interpret, saved_as="attention")

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


def make_kernel(
    mask: Any,
    num_heads: int,
    scoring: Scoring,
    *,
    interpret: bool,
    saved_as: str | None = None,
    returns_lse: bool = False,
) -> Any:
    """The kernel for heads of one mask [T, T]. Its result and log-sum-exp have the name `saved_as`
    for a rematerialisation policy, or the latter is returned too."""
    block = next(b for b in (LARGEST_BLOCK, 256, LANES) if mask.shape[0] % b == 0)
    sizes = "block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"
    return make_splash_mha(
        MultiHeadMask([mask] * num_heads),
        block_sizes=BlockSizes(**dict.fromkeys(sizes, block)),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=scoring.softcap,
        interpret=interpret,
        residual_checkpoint_name=saved_as,
        save_residuals=returns_lse,
    )
