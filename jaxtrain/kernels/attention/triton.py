"""Attention for NVIDIA GPUs from Ampere on: Pallas kernels, lowered through Triton.

As in FlashAttention-2 (Dao, 2023, arXiv:2307.08691): one kernel for the output, which keeps the
log-sum-exp of each row of scores; one for the gradient of queries, one for those of keys and
values, which recompute the scores. Each reads only the blocks between the first and the last that
segments, causality and window leave it. Scores are in base 2 inside the kernels.

B batch, T query tokens, S key tokens, N query heads, K key/value heads, G = N / K query heads per
key/value head, H head size, X value size, R queries of a block, C keys of a block, I blocks of
queries, J blocks of keys.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import e, log2
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxtrain.kernels.attention.each_device import map_over_devices
from jaxtrain.kernels.attention.mask import Scoring, TokenPositions, expand, is_visible
from jaxtrain.kernels.axes import has_capability

LOG2_E = log2(e)
NO_SCORE = -1e30  # finite, so that the difference of two is no NaN
LARGEST_HEAD = 256
OLDEST_CAPABILITY = 8.0  # Ampere
LARGEST_TILE = 128


class Tiles(NamedTuple):
    """How a kernel is cut for a head size."""

    queries: int
    keys: int
    warps: int
    stages: int


# Padded head size → tiles of bfloat16 numbers: those of the forward pass, those of both backward
# kernels. Chosen by the shared memory of sm_80, sm_89 and sm_90; none was measured.
TILES = {
    64: (Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2)),
    128: (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
    256: (Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2)),
}


def triton_attention(
    scoring: Scoring,
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKX: Array,
    q_positions: TokenPositions,
    kv_positions: TokenPositions,
    sinks_N: Array | None,
    *,
    interpret: bool,
) -> Array:
    """Any queries and keys, in any order; blocks are skipped best where segments are contiguous."""
    sizes = q_BTNH.shape[-1], v_BSKX.shape[-1]
    if not interpret and (fault := triton_fault(sizes)):
        raise NotImplementedError(fault)
    local = partial(_attention, scoring, interpret)
    return map_over_devices(local, q_BTNH, k_BSKH, v_BSKX, q_positions, kv_positions, sinks_N)


def triton_fault(head_sizes: Sequence[int], capability: str | None = None) -> str | None:
    """Why the kernels do not support these sizes of heads, or a device, if so."""
    if max(head_sizes) > LARGEST_HEAD:
        return f"the Triton kernel has heads of at most {LARGEST_HEAD}, found {max(head_sizes)}"
    if not has_capability(capability, OLDEST_CAPABILITY):
        return (
            f"the Triton kernel needs an NVIDIA GPU of compute capability {OLDEST_CAPABILITY} or "
            f"newer, found {capability!r}"
        )
    return None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    scoring: Scoring, interpret: bool, q_BTNH, k_BSKH, v_BSKX, q_positions, kv_positions, sinks_N
) -> Array:
    arguments = q_BTNH, k_BSKH, v_BSKX, q_positions, kv_positions, sinks_N
    return _attention_fwd(scoring, interpret, *arguments)[0]


def _attention_fwd(
    scoring: Scoring, interpret: bool, q_BTNH, k_BSKH, v_BSKX, q_positions, kv_positions, sinks_N
):
    q, k, v = (_pad(x) for x in (q_BTNH, k_BSKH, v_BSKX))
    q_places, kv_places = _pad_positions(q_positions), _pad_positions(kv_positions)
    (B, T, N, H), (S, K), X = q.shape, k.shape[1:3], v.shape[-1]
    tiles = _tiles(q, v)[0]
    of = _query_specs(tiles.queries, S, N // K)
    ranges = block_ranges(q_places, kv_places, scoring.window, tiles.queries, tiles.keys)
    out, lse_BNT = pl.pallas_call(
        partial(_forward_kernel, scoring, tiles),
        grid=(T // tiles.queries, N, B),
        in_specs=[
            of.queries(H), of.keys(H), of.keys(X), *of.places, of.range,
            pl.BlockSpec((None,), lambda i, n, b: (n,)),
        ],
        out_specs=[of.queries(X), of.rows],
        out_shape=[
            jax.ShapeDtypeStruct((B, T, N, X), q.dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="attention_forward",
    )(q, k, v, q_places, kv_places, ranges.of_queries, _base2(sinks_N, N))  # fmt: skip
    out_BTNX = out[:, : q_BTNH.shape[1], :, : v_BSKX.shape[-1]]
    # Named, so that a rematerialisation policy can save these two and skip a second forward pass.
    out_BTNX = checkpoint_name(out_BTNX, "attention")
    lse_BNT = checkpoint_name(lse_BNT, "attention")
    saved = q_BTNH, k_BSKH, v_BSKX, q_positions, kv_positions, sinks_N, out_BTNX, lse_BNT
    return out_BTNX, saved


def _forward_kernel(
    scoring: Scoring, tiles: Tiles, q_ref, k_ref, v_ref, q_at, kv_at, range_at, sink_ref,
    out_ref, lse_ref,
):  # fmt: skip
    q_RH = q_ref[...]
    q_places = expand(_load(q_at), 1)

    def attend(j, carry):
        out_RX, top_R, total_R = carry
        keys = pl.ds(j * tiles.keys, tiles.keys)
        k_CH, v_CX = k_ref[keys, :], v_ref[keys, :]
        visible_RC = is_visible(q_places, expand(_load(kv_at, keys), 0), scoring.window)
        scores_RC, _ = _scores(scoring, _dot(q_RH, k_CH, 1, 1))
        scores_RC = jnp.where(visible_RC, scores_RC, -jnp.inf)
        new_top_R = jnp.maximum(top_R, scores_RC.max(1))
        p_RC = jnp.exp2(scores_RC - new_top_R[:, None])
        shrink_R = jnp.exp2(top_R - new_top_R)
        out_RX = out_RX * shrink_R[:, None] + _dot(p_RC.astype(v_CX.dtype), v_CX, 1, 0)
        return out_RX, new_top_R, total_R * shrink_R + p_RC.sum(1)

    # A sink, or its lack, is a first key with a value of 0.
    top_R = jnp.full((tiles.queries,), sink_ref[...])
    out_RX = jnp.zeros(out_ref.shape, jnp.float32)
    begin, end = (x[...] for x in range_at)
    out_RX, top_R, total_R = lax.fori_loop(
        begin, end, attend, (out_RX, top_R, jnp.ones_like(top_R))
    )
    out_ref[...] = (out_RX / total_R[:, None]).astype(out_ref.dtype)
    lse_ref[...] = top_R + jnp.log(total_R) * LOG2_E


def _attention_bwd(scoring: Scoring, interpret: bool, saved, d_out_BTNX):
    q_BTNH, k_BSKH, v_BSKX, q_positions, kv_positions, sinks_N, out_BTNX, lse_BNT = saved
    q, k, v, d_out = (_pad(x) for x in (q_BTNH, k_BSKH, v_BSKX, d_out_BTNX))
    q_places, kv_places = _pad_positions(q_positions), _pad_positions(kv_positions)
    (B, T, N, H), (S, K), X = q.shape, k.shape[1:3], v.shape[-1]
    tiles = _tiles(q, v)[1]
    R, C, G = tiles.queries, tiles.keys, N // K
    # The row sums of dP * P equal those of dO * O, which need no scores.
    delta_BNT = jnp.einsum(
        "btnx,btnx->bnt", d_out_BTNX, out_BTNX, preferred_element_type=jnp.float32
    )
    delta_BNT = jnp.pad(delta_BNT, ((0, 0), (0, 0), (0, T - delta_BNT.shape[-1])))
    ranges = block_ranges(q_places, kv_places, scoring.window, R, C)
    of, by = _query_specs(R, S, G), _key_specs(C, T, G)
    options: dict[str, Any] = {
        "compiler_params": plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        "interpret": interpret,
    }
    d_q = pl.pallas_call(
        partial(_d_queries_kernel, scoring, tiles),
        grid=(T // R, N, B),
        in_specs=[
            of.queries(H), of.keys(H), of.keys(X), of.queries(X), of.rows, of.rows, *of.places,
            of.range,
        ],
        out_specs=of.queries(H),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="attention_d_queries",
        **options,
    )(q, k, v, d_out, lse_BNT, delta_BNT, q_places, kv_places, ranges.of_queries)  # fmt: skip
    d_k, d_v = pl.pallas_call(
        partial(_d_keys_kernel, scoring, tiles),
        grid=(S // C, K, B),
        in_specs=[
            by.queries(H), by.keys(H), by.keys(X), by.queries(X), by.rows, by.rows, *by.places,
            by.range,
        ],
        out_specs=[by.keys(H), by.keys(X)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        name="attention_d_keys",
        **options,
    )(q, k, v, d_out, lse_BNT, delta_BNT, q_places, kv_places, ranges.of_keys)  # fmt: skip
    d_sinks_N = None
    if sinks_N is not None:  # the value of a sink is 0
        p_BNT = jnp.exp2(_base2(sinks_N, N)[:, None] - lse_BNT)
        d_sinks_N = -(p_BNT * delta_BNT).sum((0, 2)).astype(sinks_N.dtype)
    cut = lambda x, like: lax.slice(x, [0] * 4, like.shape)
    d_qkv = cut(d_q, q_BTNH), cut(d_k, k_BSKH), cut(d_v, v_BSKX)
    return *d_qkv, None, None, d_sinks_N


_attention.defvjp(_attention_fwd, _attention_bwd)


def _d_queries_kernel(
    scoring: Scoring, tiles: Tiles, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, q_at,
    kv_at, range_at, d_q_ref,
):  # fmt: skip
    q_RH, d_out_RX = q_ref[...], d_out_ref[...]
    lse_R1, delta_R1 = lse_ref[...][:, None], delta_ref[...][:, None]
    q_places = expand(_load(q_at), 1)

    def add(j, d_q_RH):
        keys = pl.ds(j * tiles.keys, tiles.keys)
        k_CH, v_CX = k_ref[keys, :], v_ref[keys, :]
        visible_RC = is_visible(q_places, expand(_load(kv_at, keys), 0), scoring.window)
        scores_RC, slope = _scores(scoring, _dot(q_RH, k_CH, 1, 1))
        p_RC = jnp.where(visible_RC, jnp.exp2(scores_RC - lse_R1), 0.0)
        d_RC = p_RC * (_dot(d_out_RX, v_CX, 1, 1) - delta_R1) * slope
        return d_q_RH + _dot(d_RC.astype(k_CH.dtype), k_CH, 1, 0)

    begin, end = (x[...] for x in range_at)
    d_q_RH = lax.fori_loop(begin, end, add, jnp.zeros(q_RH.shape, jnp.float32))
    d_q_ref[...] = d_q_RH.astype(d_q_ref.dtype)


def _d_keys_kernel(
    scoring: Scoring, tiles: Tiles, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, q_at,
    kv_at, range_at, d_k_ref, d_v_ref,
):  # fmt: skip
    """Sums over the query heads that share the keys, so that no gradient is repeated or atomic."""
    k_CH, v_CX = k_ref[...], v_ref[...]
    kv_places = expand(_load(kv_at), 1)
    begin, end = (x[...] for x in range_at)

    def add(g, i, sums):
        d_k_CH, d_v_CX = sums
        rows = pl.ds(i * tiles.queries, tiles.queries)
        q_RH, d_out_RX = q_ref[rows, g, :], d_out_ref[rows, g, :]
        lse_1R, delta_1R = lse_ref[g, rows][None], delta_ref[g, rows][None]
        visible_CR = is_visible(expand(_load(q_at, rows), 0), kv_places, scoring.window)
        scores_CR, slope = _scores(scoring, _dot(k_CH, q_RH, 1, 1))
        p_CR = jnp.where(visible_CR, jnp.exp2(scores_CR - lse_1R), 0.0)
        d_v_CX += _dot(p_CR.astype(d_out_RX.dtype), d_out_RX, 1, 0)
        d_CR = p_CR * (_dot(v_CX, d_out_RX, 1, 1) - delta_1R) * slope
        return d_k_CH + _dot(d_CR.astype(q_RH.dtype), q_RH, 1, 0), d_v_CX

    def add_head(g, sums):
        return lax.fori_loop(begin, end, partial(add, g), sums)

    zeros = jnp.zeros(k_CH.shape, jnp.float32), jnp.zeros(v_CX.shape, jnp.float32)
    d_k_CH, d_v_CX = lax.fori_loop(0, q_ref.shape[1], add_head, zeros)
    d_k_ref[...] = d_k_CH.astype(d_k_ref.dtype)
    d_v_ref[...] = d_v_CX.astype(d_v_ref.dtype)


def _scores(scoring: Scoring, products: Array) -> tuple[Array, Array | float]:
    """Scores in base 2, and the derivative of the natural ones by the products."""
    if (c := scoring.softcap) is None:
        return products * (scoring.scale * LOG2_E), scoring.scale
    share = jnp.tanh(products * (scoring.scale / c))
    return share * (c * LOG2_E), (1 - share * share) * scoring.scale


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


def _load(refs: TokenPositions, index: Any = ...) -> TokenPositions:
    return TokenPositions(*(ref[index] for ref in refs))


class Specs(NamedTuple):
    """What a program reads of the arrays; `queries` and `keys` take the size of heads."""

    queries: Callable[[int], pl.BlockSpec]
    keys: Callable[[int], pl.BlockSpec]
    rows: pl.BlockSpec
    places: tuple[TokenPositions, TokenPositions]
    range: tuple[pl.BlockSpec, ...]


def _of_places(tokens: int, index: Callable[..., Any]) -> TokenPositions:
    spec: Any = pl.BlockSpec((None, tokens), index)
    return TokenPositions(spec, spec)


def _query_specs(R: int, S: int, G: int) -> Specs:
    """Of program (i, n, b): block i of the queries of head n, and all keys that the head reads."""
    return Specs(
        lambda size: pl.BlockSpec((None, R, None, size), lambda i, n, b: (b, i, n, 0)),
        lambda size: pl.BlockSpec((None, S, None, size), lambda i, n, b: (b, 0, lax.div(n, G), 0)),
        pl.BlockSpec((None, None, R), lambda i, n, b: (b, n, i)),
        (
            _of_places(R, lambda i, n, b: (b, i)),
            _of_places(S, lambda i, n, b: (b, 0)),
        ),
        (pl.BlockSpec((None, None), lambda i, n, b: (b, i)),) * 2,
    )


def _key_specs(C: int, T: int, G: int) -> Specs:
    """Of program (j, k, b): block j of the keys of head k, and the queries of all that read it."""
    return Specs(
        lambda size: pl.BlockSpec((None, T, G, size), lambda j, k, b: (b, 0, k, 0)),
        lambda size: pl.BlockSpec((None, C, None, size), lambda j, k, b: (b, j, k, 0)),
        pl.BlockSpec((None, G, T), lambda j, k, b: (b, k, 0)),
        (
            _of_places(T, lambda j, k, b: (b, 0)),
            _of_places(C, lambda j, k, b: (b, j)),
        ),
        (pl.BlockSpec((None, None), lambda j, k, b: (b, j)),) * 2,
    )


class Ranges(NamedTuple):
    """(first, end) of the blocks that a block has to do with, int32; end is 0 for none."""

    of_queries: tuple[Array, Array]
    """[B, I]: blocks of keys"""
    of_keys: tuple[Array, Array]
    """[B, J]: blocks of queries"""


def block_ranges(
    q: TokenPositions, kv: TokenPositions, window: int | None, R: int, C: int
) -> Ranges:
    """Which blocks may hold a visible pair, by the (segment, position) that come first and last in
    each; exact where these rise with the index. Compares I x J of them, and keeps I + J."""
    q_first, q_last = (expand(x, -1) for x in _extremes(q, R))
    k_first, k_last = (expand(x, -2) for x in _extremes(kv, C))

    def is_before(x: TokenPositions, y: TokenPositions, ahead: int) -> Array:
        near = x.positions - y.positions < ahead
        return (x.segments < y.segments) | ((x.segments == y.segments) & near)

    touch_BIJ = is_before(k_first, q_last, 1)
    if window is None:
        touch_BIJ &= q_first.segments <= k_last.segments
    else:
        touch_BIJ &= is_before(q_first, k_last, window)

    def ends(axis: int) -> tuple[Array, Array]:
        index = lax.broadcasted_iota(jnp.int32, touch_BIJ.shape, axis)
        first = jnp.where(touch_BIJ, index, touch_BIJ.shape[axis]).min(axis)
        return first, jnp.where(touch_BIJ, index + 1, 0).max(axis)

    return Ranges(ends(2), ends(1))


def _extremes(places: TokenPositions, size: int) -> tuple[TokenPositions, TokenPositions]:
    """The first and the last (segment, position) of each block, [B, I]; padding is left out."""
    segments, positions = (x.reshape(x.shape[0], -1, size) for x in places)
    beyond = jnp.iinfo(jnp.int32).max
    low = jnp.where(segments == 0, beyond, segments).min(-1)
    high = segments.max(-1)
    first = jnp.where(segments == low[..., None], positions, beyond).min(-1)
    last = jnp.where(segments == high[..., None], positions, -1).max(-1)
    return TokenPositions(low, first), TokenPositions(high, last)


def _pad(x_BTNH: Array) -> Array:
    """Whole tiles of tokens, and a head size that is a power of two, as Triton needs."""
    _, T, _, H = x_BTNH.shape
    fill = (0, -T % LARGEST_TILE), (0, 0), (0, _padded_head(H) - H)
    return jnp.pad(x_BTNH, ((0, 0), *fill))


def _pad_positions(positions: TokenPositions) -> TokenPositions:
    fill = (0, 0), (0, -positions.segments.shape[1] % LARGEST_TILE)
    return TokenPositions(*(jnp.pad(x, fill) for x in positions))


def _padded_head(size: int) -> int:
    return max(16, pl.next_power_of_2(size))


def _tiles(q: Array, v: Array) -> tuple[Tiles, Tiles]:
    pair = TILES[min(LARGEST_HEAD, max(64, q.shape[-1], v.shape[-1]))]
    if q.dtype.itemsize <= 2:
        return pair
    forward, backward = (t._replace(queries=t.queries // 2, keys=t.keys // 2) for t in pair)
    return forward, backward


def _base2(sinks_N: Array | None, N: int) -> Array:
    """float32 [N]; without sinks those of no weight."""
    if sinks_N is None:
        return jnp.full(N, NO_SCORE, jnp.float32)
    return sinks_N.astype(jnp.float32) * LOG2_E
