"""Attention with jax's Pallas kernel for TPU (splash attention), mapped over a mesh.

B batch, T tokens, N query heads, K key/value heads, H head size.
"""

from collections.abc import Callable
from functools import partial
from math import prod
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
from jax.sharding import PartitionSpec

from jaxtrain.kernels.attention.mask import Scoring, TokenPositions
from jaxtrain.kernels.axes import BATCH_AXES, TENSOR_AXIS, free_axis_sizes

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
    if not interpret and (fault := splash_fault(head_size=q_BTNH.shape[-1])):
        raise NotImplementedError(fault)
    del kv_positions  # the same tokens as q_positions
    local = partial(_local_attention, scoring=scoring, interpret=interpret)
    return _map_over_mesh(local, q_BTNH, k_BTKH, v_BTKH, q_positions.segments, sinks_N)


def splash_fault(*, head_size: int) -> str | None:
    """Why the kernel does not support this shape, if so."""
    if head_size % 64:
        return f"splash attention needs a head size that is a multiple of 64, found {head_size}"
    return None


def _map_over_mesh(
    local,
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segments_BT: Array,
    sinks_N: Array | None,
) -> Array:
    """Runs the kernel on each device's part of batch and heads.

    The compiler cannot partition Mosaic kernels, so every axis becomes manual here. The mesh is
    that of the context, since inside a pipeline stage one axis is manual already.
    """
    sizes = free_axis_sizes()
    if jax.sharding.get_abstract_mesh().size == 1 or not sizes:
        return local(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N)

    # Axes of size 1 join the batch: an axis that no input names costs a sum in the backward pass.
    batch = tuple(a for a in sizes if a != TENSOR_AXIS and (a in BATCH_AXES or sizes[a] == 1))
    shards = prod(sizes[a] for a in batch)
    if q_BTNH.shape[0] % shards:
        raise NotImplementedError(
            f"batch {q_BTNH.shape[0]} does not split over the {shards} devices of axes {batch}; "
            f"use a multiple of {shards}"
        )
    tensor = TENSOR_AXIS if TENSOR_AXIS in sizes else None
    heads = PartitionSpec(batch, None, tensor, None)
    return jax.shard_map(
        local,
        in_specs=(heads, heads, heads, PartitionSpec(batch, None), PartitionSpec(tensor)),
        out_specs=heads,
        axis_names=set(sizes),
        check_vma=False,
    )(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N)


def _local_attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segments_BT: Array,
    sinks_N: Array | None,
    *,
    scoring: Scoring,
    interpret: bool,
) -> Array:
    T, N = q_BTNH.shape[1:3]
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
