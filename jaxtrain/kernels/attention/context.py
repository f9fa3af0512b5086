"""Attention of sequences whose tokens are cut over the `context` axis of a mesh, in two ways.

All-to-all (Jacobs et al., 2023, arXiv:2309.14509): each device gets all tokens of some heads, and
any kernel attends among these. It needs query heads that divide over the axis. Key/value heads that
do not are copied for each device with queries that read them.

Ring (Liu et al., 2023, arXiv:2310.01889): keys and values pass from device to device, each of which
attends to them with its own queries and merges what it gets by the log-sum-exp. A causal mask
would leave the first device of a plain cut with the least work. So a sequence is cut into 2 C
pieces, of which device i holds those numbered i, its early one, and 2 C - 1 - i, its late one: each
turn of the ring is then two blocks of a piece of queries and a piece of keys on every device.

B batch, T tokens of a device, P = T / 2 of a piece, N query heads, K key/value heads, H head size,
C devices of the axis.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxtrain.kernels.attention.mask import Scoring, TokenPositions
from jaxtrain.kernels.attention.reference import attend, attend_backward, d_sinks
from jaxtrain.kernels.axes import CONTEXT_AXIS, TENSOR_AXIS, batch_axes, free_axis_sizes

Exchange = Literal["all_to_all", "ring"]
PyTree = Any


class Blocks(NamedTuple):
    """What attends to a part of the keys, and its gradients: as those of reference.py."""

    attend: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


REFERENCE = Blocks(attend, attend_backward)


def choose_exchange(
    heads: Iterable[tuple[int, int]], *, parts: int, tensor: int
) -> tuple[Exchange, str]:
    """The way for layers with these query and key/value heads, and a sentence for the log."""
    heads = list(heads)
    uneven = [num_heads for num_heads, _ in heads if num_heads % (parts * tensor)]
    if not uneven:
        copies = max(_count_copies(num_kv_heads, parts * tensor) for _, num_kv_heads in heads)
        copied = f", {copies} copies of key/value heads" if copies > 1 else ""
        return "all_to_all", f"all-to-all of heads and tokens over context {parts}{copied}"
    cut = f"context {parts}" + (f" x tensor {tensor}" if tensor > 1 else "")
    why = f"since {cut} does not divide {min(uneven)} heads"
    return "ring", f"in a ring over context {parts}, {why}"


def _count_copies(num_kv_heads: int, parts: int) -> int:
    """Of each key/value head, so that they divide over so many devices. It divides the number of
    query heads to each, if query heads divide."""
    return parts // math.gcd(num_kv_heads, parts)


def attend_over_context(
    kernel: Callable[..., Array],
    blocks: Blocks,
    exchange: Exchange,
    scoring: Scoring,
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    positions: TokenPositions,
    sinks_N: Array | None,
) -> Array:
    """Self-attention; `kernel` attends among all tokens, `blocks` to those of another device."""
    sizes = free_axis_sizes()
    batch = batch_axes(sizes, TENSOR_AXIS, CONTEXT_AXIS)
    tensor = TENSOR_AXIS if TENSOR_AXIS in sizes else None
    heads = PartitionSpec(batch, CONTEXT_AXIS, tensor, None)
    tokens = PartitionSpec(batch, CONTEXT_AXIS)
    local = partial(_ring, blocks) if exchange == "ring" else partial(_all_to_all, kernel)
    return jax.shard_map(
        partial(local, scoring),
        in_specs=(heads, heads, heads, tokens, PartitionSpec(tensor)),
        out_specs=heads,
        axis_names=set(sizes),
        check_vma=False,
    )(
        q_BTNH, k_BTKH, v_BTKH, positions,
        # Their gradient is summed over the devices.
        None if sinks_N is None else sinks_N.astype(jnp.float32),
    )  # fmt: skip


def _all_to_all(
    kernel: Callable[..., Array], scoring: Scoring, q_BTNH, k_BTKH, v_BTKH, positions, sinks_N
) -> Array:
    exchange = partial(lax.all_to_all, axis_name=CONTEXT_AXIS, tiled=True)
    if (copies := _count_copies(k_BTKH.shape[2], lax.axis_size(CONTEXT_AXIS))) > 1:
        # In float32, in which the gradients of the copies are summed.
        copy = lambda x: jnp.repeat(x.astype(jnp.float32), copies, axis=2).astype(x.dtype)
        k_BTKH, v_BTKH = copy(k_BTKH), copy(v_BTKH)
    q, k, v = (exchange(x, split_axis=2, concat_axis=1) for x in (q_BTNH, k_BTKH, v_BTKH))
    gather = partial(lax.all_gather, axis_name=CONTEXT_AXIS, axis=1, tiled=True)
    positions = TokenPositions(*map(gather, positions))
    if sinks_N is not None:
        first = lax.axis_index(CONTEXT_AXIS) * q.shape[2]
        sinks_N = lax.dynamic_slice_in_dim(sinks_N, first, q.shape[2])
    out = kernel(scoring, q, k, v, positions, positions, sinks_N)
    return exchange(out, split_axis=1, concat_axis=2)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(blocks: Blocks, scoring: Scoring, q_BTNH, k_BTKH, v_BTKH, positions, sinks_N) -> Array:
    """Of an early and a late piece of each sequence, in this order."""
    return _ring_fwd(blocks, scoring, q_BTNH, k_BTKH, v_BTKH, positions, sinks_N)[0]


def _ring_fwd(blocks: Blocks, scoring: Scoring, q_BTNH, k_BTKH, v_BTKH, positions, sinks_N):
    own = k_BTKH, v_BTKH, positions
    queries = q_BTNH, positions
    # Sent on before this device works with them, so that the two overlap.
    received = _pass_on(own)
    whole = q_BTNH, *own[:2], positions, positions, sinks_N
    merged = blocks.attend(scoring, *whole, same_order=True)

    def merge_turn(turn: Array | int, keys, merged):
        is_past = _is_past(turn)
        (q, q_positions), (k, v, kv_positions) = _pair(is_past, queries, keys)
        found = blocks.attend(scoring, q, k, v, q_positions, kv_positions, None, same_order=False)
        for parts in _unpair_queries(is_past, found, nothing=(0.0, -jnp.inf)):
            merged = _merge(merged, parts)
        return merged

    def step(carry, turn: Array):
        keys, merged = carry
        return (_pass_on(keys), merge_turn(turn, keys, merged)), None

    last = lax.axis_size(CONTEXT_AXIS) - 1
    (keys, merged), _ = lax.scan(step, (received, merged), jnp.arange(1, last))
    out_BTNH, lse_BTN = merge_turn(last, keys, merged)
    out_BTNH = checkpoint_name(out_BTNH.astype(q_BTNH.dtype), "attention")  # as the reference does
    lse_BTN = checkpoint_name(lse_BTN, "attention")
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, positions, sinks_N, out_BTNH, lse_BTN)


def _ring_bwd(blocks: Blocks, scoring: Scoring, saved, d_out_BTNH):
    q_BTNH, k_BTKH, v_BTKH, positions, sinks_N, out_BTNH, lse_BTN = saved
    own = k_BTKH, v_BTKH, positions
    results = out_BTNH, lse_BTN, d_out_BTNH
    queries = (q_BTNH, positions), results
    whole = q_BTNH, *own[:2], positions, positions, sinks_N, out_BTNH, lse_BTN
    d_q, *d_keys = blocks.backward(scoring, whole, d_out_BTNH, same_order=True)

    def step(carry, turn: Array):
        keys, d_keys, d_q = carry
        is_past = _is_past(turn)
        ((q, q_positions), (out, lse, d_out)), (k, v, kv_positions) = _pair(is_past, queries, keys)
        block = q, k, v, q_positions, kv_positions, None, out, lse
        found = blocks.backward(scoring, block, d_out, same_order=False)
        for part in _unpair_queries(is_past, found[:1], nothing=(0.0,)):
            d_q += part[0]
        added = [d + _unpair_keys(is_past, part) for d, part in zip(d_keys, found[1:], strict=True)]
        return (_pass_on(keys), _pass_on(added), d_q), None

    # The gradients of keys travel with these, and are at home after the last turn.
    turns = jnp.arange(1, lax.axis_size(CONTEXT_AXIS))
    (_, (d_k, d_v), d_q), _ = lax.scan(step, (_pass_on(own), _pass_on(d_keys), d_q), turns)
    cast = (d.astype(x.dtype) for d, x in zip((d_q, d_k, d_v), saved, strict=False))
    return *cast, None, d_sinks(whole, d_out_BTNH)


_ring.defvjp(_ring_fwd, _ring_bwd)


def _pass_on(tree: PyTree) -> PyTree:
    """Sends to the next device, and receives from the one before."""
    parts = lax.axis_size(CONTEXT_AXIS)
    ring = [(i, (i + 1) % parts) for i in range(parts)]
    return jax.tree.map(lambda x: lax.ppermute(x, CONTEXT_AXIS, ring), tree)


def _is_past(turn: Array | int) -> Array:
    """Whether the keys here, from so many devices before, are of a device with a smaller number:
    their early piece is before both pieces of queries, and their late one after both. Else the late
    queries see both pieces, and the early ones neither."""
    return lax.axis_index(CONTEXT_AXIS) >= turn


def _halves(x: Array) -> tuple[Array, Array]:
    early, late = jnp.split(x, 2, axis=1)
    return early, late


def _pair(is_past: Array, queries: PyTree, keys: PyTree) -> tuple[PyTree, PyTree]:
    """The two blocks of a turn, one behind the other in the batch: of the late queries and the
    early keys, and of the pieces that see each other besides."""

    def pair(x: Array, first: int) -> Array:
        early, late = halves = _halves(x)
        return jnp.concatenate([halves[first], jnp.where(is_past, early, late)])

    return tuple(
        jax.tree.map(partial(pair, first=first), tree) for tree, first in ((queries, 1), (keys, 0))
    )  # type: ignore[return-value]


def _unpair_queries(
    is_past: Array, found: tuple[Array, ...], *, nothing: tuple[float, ...]
) -> Iterable[tuple[Array, ...]]:
    """What each of two blocks gives to the queries of this device, [B, T, ...]; `nothing` is what
    it gives to a piece that is not in it."""
    blocks = [
        (*jnp.split(x, 2), jnp.full_like(x[: x.shape[0] // 2], fill))
        for x, fill in zip(found, nothing, strict=True)
    ]
    yield tuple(jnp.concatenate([none, first], 1) for first, _, none in blocks)
    yield tuple(
        jnp.concatenate([jnp.where(is_past, x, none), jnp.where(is_past, none, x)], 1)
        for _, x, none in blocks
    )


def _unpair_keys(is_past: Array, d_keys: Array) -> Array:
    """The sum of what two blocks give to the keys of this turn, [B, T, ...]."""
    first, second = jnp.split(d_keys, 2)
    early = first + jnp.where(is_past, second, 0)
    return jnp.concatenate([early, jnp.where(is_past, 0, second)], 1)


def _merge(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, Array]:
    """Results and log-sum-exps over the keys of both."""
    (a_BTNH, a_BTN), (b_BTNH, b_BTN) = a, b
    lse_BTN = jnp.logaddexp(a_BTN, b_BTN)
    top_BTN = jnp.where(lse_BTN == -jnp.inf, 0.0, lse_BTN)
    weigh = lambda x_BTNH, x_BTN: x_BTNH * jnp.exp(x_BTN - top_BTN)[..., None]
    return weigh(a_BTNH, a_BTN) + weigh(b_BTNH, b_BTN), lse_BTN


def to_ring_order(tree: PyTree, *, parts: int) -> PyTree:
    """Moves the tokens of arrays [B, T, ...] in row order to the devices of the ring."""

    def move(x: Array) -> Array:
        even, odd = (lax.ppermute(half, CONTEXT_AXIS, way) for half, way in _ways(x, parts))
        return jnp.concatenate(_swap_on_odd(even, odd), 1)

    return _map_over_context(move, tree)


def to_row_order(tree: PyTree, *, parts: int) -> PyTree:
    """The inverse of `to_ring_order`."""

    def move(x: Array) -> Array:
        pieces = jnp.concatenate(_swap_on_odd(*_halves(x)), 1)
        return jnp.concatenate([
            lax.ppermute(piece, CONTEXT_AXIS, [(to, start) for start, to in way])
            for piece, way in _ways(pieces, parts)
        ], 1)  # fmt: skip

    return _map_over_context(move, tree)


def _ways(x: Array, parts: int) -> list[tuple[Array, list[tuple[int, int]]]]:
    """The pieces of even and those of odd number of a cut in row order, and where each goes."""
    place = lambda piece: min(piece, 2 * parts - 1 - piece)
    return [
        (half, [(device, place(2 * device + odd)) for device in range(parts)])
        for odd, half in enumerate(_halves(x))
    ]


def _swap_on_odd(a: Array, b: Array) -> tuple[Array, Array]:
    """Pieces of even and of odd number as an early and a late one, and back: the early piece of an
    even device has an even number and its late one an odd number."""
    is_even = lax.axis_index(CONTEXT_AXIS) % 2 == 0
    return jnp.where(is_even, a, b), jnp.where(is_even, b, a)


def _map_over_context(local: Callable[[Array], Array], tree: PyTree) -> PyTree:
    spec = PartitionSpec(None, CONTEXT_AXIS)
    mapped = jax.shard_map(
        partial(jax.tree.map, local),
        in_specs=(spec,), out_specs=spec, axis_names={CONTEXT_AXIS}, check_vma=False,
    )  # fmt: skip
    return mapped(tree)
