"""Attention with jax's Pallas kernel for TPU (splash attention): of whole sequences, mapped over a
mesh, and of the blocks of a ring, queries with a part of the keys that they see.

B batch, T tokens, N query heads, K key/value heads, H head size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    FullMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

from jaxtrain.kernels.attention.each_device import map_over_devices
from jaxtrain.kernels.attention.mask import Scoring, TokenPositions

LANES = 128  # block sizes of the kernel are multiples of this
LARGEST_BLOCK = 512
NO_SEGMENT = -1  # of keys that fill a block


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
    size, window = T + -T % LANES, scoring.window
    shape = size, size
    mask = CausalMask(shape) if window is None else LocalMask(shape, (window - 1, 0), 0)
    kernel = _make_kernel(mask, N, scoring, interpret=interpret, saved_as="attention")
    # Padding forms a segment of its own, so that no row of scores is empty.
    filled_BT = jnp.pad(segments_BT, ((0, 0), (0, -T % LANES)))
    out_BNTH = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(
        *map(_heads_first, (_scale(q_BTNH, scoring), k_BTKH, v_BTKH)),
        SegmentIds(filled_BT, filled_BT),
        sinks_N,
    )
    return _clear_padding(_tokens_first(out_BNTH, T), positions)


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
    kernel = _block_kernel(T, q_BTNH.shape[2], scoring, same_order, interpret)
    out_BNTH, (lse_BNT,) = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(
        *map(_heads_first, (_scale(q_BTNH, scoring), k_BTKH, v_BTKH)),
        _segments(q_positions, kv_positions),
        sinks_N,
    )
    out_BTNH = _tokens_first(out_BNTH, T).astype(jnp.float32)
    return _clear_padding(out_BTNH, q_positions), _tokens_first(lse_BNT, T)


def splash_block_backward(
    scoring: Scoring, saved, d_out_BTNH: Array, *, same_order: bool, interpret: bool
) -> tuple[Array, Array, Array]:
    """As `reference.attend_backward`. The kernel has no public function of a result and a log-sum-
    exp that are over more keys than these."""
    q_BTNH, k_BTKH, v_BTKH, q_positions, kv_positions, _, out_BTNH, lse_BTN = saved
    T = q_BTNH.shape[1]
    kernel = _block_kernel(T, q_BTNH.shape[2], scoring, same_order, interpret)
    how = kernel.kwargs
    masks = kernel.dq_mask_info, kernel.dkv_mask_info
    d_out_BTNH = _clear_padding(d_out_BTNH, q_positions)

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


def _segments(q_positions: TokenPositions, kv_positions: TokenPositions) -> SegmentIds:
    fill = -q_positions.segments.shape[1] % LANES
    pad = partial(jnp.pad, pad_width=((0, 0), (0, fill)))
    q_BT = pad(q_positions.segments)
    return SegmentIds(q_BT, pad(kv_positions.segments, constant_values=NO_SEGMENT))


def _block_kernel(T: int, N: int, scoring: Scoring, same_order: bool, interpret: bool) -> Any:
    size = T + -T % LANES
    shape = size, size
    mask = CausalMask(shape) if same_order else FullMask(shape)
    return _make_kernel(mask, N, scoring, interpret=interpret, returns_lse=True)


def _make_kernel(
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


def _scale(q_BTNH: Array, scoring: Scoring) -> Array:
    # In float32: a scale rounded to bfloat16 would bias every score by the same factor.
    return (q_BTNH.astype(jnp.float32) * scoring.scale).astype(q_BTNH.dtype)


def _heads_first(x_BTN: Array) -> Array:
    fill = -x_BTN.shape[1] % LANES
    return jnp.pad(x_BTN, ((0, 0), (0, fill), *((0, 0),) * (x_BTN.ndim - 2))).swapaxes(1, 2)


def _tokens_first(x_BNT: Array, T: int) -> Array:
    return x_BNT.swapaxes(1, 2)[:, :T]


def _clear_padding(x_BTNH: Array, positions: TokenPositions) -> Array:
    """0 for padding, which attends to padding in the kernel."""
    return jnp.where((positions.segments != 0)[..., None, None], x_BTNH, 0)
