"""Runs a kernel that the compiler cannot partition on each device's part of batch and heads.

B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head size.
"""

from collections.abc import Callable
from math import prod

import jax
from jax import Array
from jax.sharding import PartitionSpec

from jaxtrain.kernels.attention.mask import TokenPositions
from jaxtrain.kernels.axes import TENSOR_AXIS, batch_axes, free_axis_sizes


def map_over_devices(
    local: Callable[..., Array],
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_positions: TokenPositions,
    kv_positions: TokenPositions,
    sinks_N: Array | None,
) -> Array:
    """`local` of these arguments, with every axis of the mesh manual.

    The mesh is that of the context, since inside a pipeline stage one axis is manual already.
    """
    arguments = q_BTNH, k_BSKH, v_BSKH, q_positions, kv_positions, sinks_N
    sizes = free_axis_sizes()
    if jax.sharding.get_abstract_mesh().size == 1 or not sizes:
        return local(*arguments)

    batch = batch_axes(sizes, TENSOR_AXIS)
    shards = prod(sizes[a] for a in batch)
    if q_BTNH.shape[0] % shards:
        raise NotImplementedError(
            f"batch {q_BTNH.shape[0]} does not split over the {shards} devices of axes {batch}; "
            f"use a multiple of {shards}"
        )
    tensor = TENSOR_AXIS if TENSOR_AXIS in sizes else None
    heads, rows = PartitionSpec(batch, None, tensor, None), PartitionSpec(batch, None)
    return jax.shard_map(
        local,
        in_specs=(heads, heads, heads, rows, rows, PartitionSpec(tensor)),
        out_specs=heads,
        axis_names=set(sizes),
        check_vma=False,
    )(*arguments)
