"""Attention in plain jnp, one block of queries at a time, for every platform.

The forward pass saves its output and the log-sum-exp of each row of scores, from which the backward
pass recomputes the scores, as in FlashAttention-2 (Dao, 2023, arXiv:2307.08691, section 3.1).

B batch, T query tokens, S key tokens, N query heads, K key/value heads, G = N / K query heads per
key/value head, H head size, C tokens per block of queries, R = G * C rows per block. G and C are
one dimension where nothing differs along C alone: for each score, XLA on CPU would divide to find
the token of its row.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from jaxtrain.kernels.attention.mask import Scoring, TokenPositions, visible_keys
from jaxtrain.kernels.product import mark, multiply_transposed

BLOCK = 128  # tokens; on CPU 64 and 256 take 8 and 15% longer in float32
MAX_BANDS = 8  # bounds program size and compile time, for an eighth more scores than needed


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def reference_attention(
    scoring: Scoring, q_BTNH, k_BSKH, v_BSKH, q_positions, kv_positions, sinks_N
) -> Array:
    return _attention_fwd(scoring, q_BTNH, k_BSKH, v_BSKH, q_positions, kv_positions, sinks_N)[0]


def _attention_fwd(scoring: Scoring, q_BTNH, k_BSKH, v_BSKH, q_positions, kv_positions, sinks_N):
    inputs = q_BTNH, k_BSKH, v_BSKH, q_positions, kv_positions, sinks_N
    same_order = q_BTNH.shape[1] == k_BSKH.shape[1]
    out_BTNH, lse_BTN = attend(scoring, *inputs, same_order=same_order)
    # Named, so that a rematerialisation policy can save these two and skip a second forward pass.
    out_BTNH = mark(out_BTNH.astype(q_BTNH.dtype), "attention")
    # Tokens last, as the backward pass reads them on CPU: one behind the other.
    lse_BNT = checkpoint_name(lse_BTN.swapaxes(1, 2), "attention")
    return out_BTNH, (*inputs, out_BTNH, lse_BNT)


def attend(
    scoring: Scoring,
    q_BTNH,
    k_BSKH,
    v_BSKH,
    q_positions,
    kv_positions,
    sinks_N,
    *,
    same_order: bool,
) -> tuple[Array, Array]:
    """The result and the log-sum-exp of each row of scores, float32; 0 and -inf for a query that
    sees nothing. With `same_order` queries and keys are the same tokens, in the order of their
    sequence; else keys come in any order."""
    T, N = q_BTNH.shape[1:3]
    S, K = k_BSKH.shape[1:3]
    C = _block_tokens(T)
    blocks = _query_rows(q_BTNH, K, C), _block_positions(q_positions, C)
    keys = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), kv_positions
    sinks_KG11 = None
    if sinks_N is not None:
        sinks_KG11 = sinks_N.astype(jnp.float32).reshape(K, N // K, 1, 1)

    outs, lses = [], []
    for band in _bands(T, S, C, scoring.window, same_order):

        def forward(block, num_keys=band.num_keys):
            first_key, queries = block
            return _forward_block(scoring, sinks_KG11, _read(keys, first_key, num_keys), queries)

        out, lse = lax.map(forward, (band.first_keys, _slice_blocks(blocks, band.blocks)))
        outs.append(out)
        lses.append(lse)
    return _from_blocks(jnp.concatenate(outs), T), _from_blocks(jnp.concatenate(lses), T)[..., 0]


def _forward_block(scoring: Scoring, sinks_KG11, keys, queries):
    k_BKSH, v_BKSH, kv_positions = keys
    queries, kv_positions, lowest = _tie(queries, kv_positions)
    q_BKRH, positions = queries
    C = positions.segments.shape[1]
    visible_BCS = visible_keys(positions, kv_positions, scoring.window)
    products_BKRS = _dot("bkrh,bksh->bkrs", q_BKRH, k_BKSH)
    scores_BKGCS = _scores(scoring, _split_rows(products_BKRS, 2, C))
    scores_BKGCS = jnp.where(visible_BCS[:, None, None], scores_BKGCS, lowest)
    top_BKGC1 = scores_BKGCS.max(-1, keepdims=True)
    # The maximum of a row without visible keys is -inf, and -inf - -inf is NaN.
    top_BKGC1 = jnp.where(top_BKGC1 == -jnp.inf, 0.0, top_BKGC1)
    top_BKGC1 = top_BKGC1 if sinks_KG11 is None else jnp.maximum(top_BKGC1, sinks_KG11)
    p_BKGCS = jnp.exp(scores_BKGCS - top_BKGC1)
    total_BKGC1 = p_BKGCS.sum(-1, keepdims=True)
    total_BKGC1 += 0.0 if sinks_KG11 is None else jnp.exp(sinks_KG11 - top_BKGC1)
    p_BKRS = p_BKGCS.astype(v_BKSH.dtype).reshape(products_BKRS.shape)
    out_BKGCH = _split_rows(_dot("bkrs,bksh->bkrh", p_BKRS, v_BKSH), 2, C)
    out_BKGCH /= jnp.where(total_BKGC1 == 0, 1.0, total_BKGC1)
    return out_BKGCH, top_BKGC1 + jnp.log(total_BKGC1)


def _attention_bwd(scoring: Scoring, saved, d_out_BTNH):
    *others, lse_BNT = saved
    saved = *others, lse_BNT.swapaxes(1, 2)
    same_order = saved[0].shape[1] == saved[1].shape[1]
    d_qkv = attend_backward(scoring, saved, d_out_BTNH, same_order=same_order)
    d_q, d_k, d_v = (d.astype(x.dtype) for d, x in zip(d_qkv, saved, strict=False))
    return d_q, d_k, d_v, None, None, d_sinks(saved, d_out_BTNH)


reference_attention.defvjp(_attention_fwd, _attention_bwd)


def d_sinks(saved, d_out_BTNH) -> Array | None:
    """The gradient of sinks, whose value is 0."""
    sinks_N, out_BTNH, lse_BTN = saved[-3:]
    if sinks_N is None:
        return None
    p_BTN = jnp.exp(sinks_N.astype(jnp.float32) - lse_BTN)
    delta_BTN = _dot("btnh,btnh->btn", d_out_BTNH, out_BTNH)
    return -(p_BTN * delta_BTN).sum((0, 1)).astype(sinks_N.dtype)


def attend_backward(
    scoring: Scoring, saved, d_out_BTNH, *, same_order: bool
) -> tuple[Array, Array, Array]:
    """The gradients of q, k and v, float32. The saved result and log-sum-exp may be over more keys
    than these."""
    q_BTNH, k_BSKH, v_BSKH, q_positions, kv_positions, _, out_BTNH, lse_BTN = saved
    T = q_BTNH.shape[1]
    S, K = k_BSKH.shape[1:3]
    C = _block_tokens(T)
    d_out = _query_rows(d_out_BTNH, K, C)
    blocks = (
        _query_rows(q_BTNH, K, C),
        _block_positions(q_positions, C),
        d_out,
        _blocks(lse_BTN, K, C),
        # The row sums of dP * P equal those of dO * O, which need no scores.
        _dot("xbkrh,xbkrh->xbkr", d_out, _query_rows(out_BTNH, K, C)),
    )
    keys = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), kv_positions
    d_kv = [jnp.zeros(x.shape, jnp.float32) for x in keys[:2]]

    d_qs = []
    for band in _bands(T, S, C, scoring.window, same_order):

        def add(d_kv, block, num_keys=band.num_keys):
            first_key, queries = block
            d_q, *parts = _backward_block(scoring, _read(keys, first_key, num_keys), queries)
            sums = zip(_read(d_kv, first_key, num_keys), parts, strict=True)
            put = partial(lax.dynamic_update_slice_in_dim, start_index=first_key, axis=2)
            return [put(x, old + new) for x, (old, new) in zip(d_kv, sums, strict=True)], d_q

        d_kv, d_q = lax.scan(add, d_kv, (band.first_keys, _slice_blocks(blocks, band.blocks)))
        d_qs.append(d_q)
    d_k_BKSH, d_v_BKSH = d_kv
    d_q_BTNH = _from_blocks(jnp.concatenate(d_qs), T)
    return d_q_BTNH, d_k_BKSH.swapaxes(1, 2), d_v_BKSH.swapaxes(1, 2)


def _backward_block(scoring: Scoring, keys, queries):
    """Gradients of one block. Keys first: one of five products is transposed, not two."""
    k_BKSH, v_BKSH, kv_positions = keys
    queries, kv_positions, lowest = _tie(queries, kv_positions)
    q_BKRH, positions, d_out_BKRH, lse_BKGC, delta_BKR = queries
    C = positions.segments.shape[1]
    visible_BSC = visible_keys(positions, kv_positions, scoring.window).swapaxes(1, 2)
    products_BKSR = _dot("bksh,bkrh->bksr", k_BKSH, q_BKRH)
    scores_BKSGC = _scores(scoring, _split_rows(products_BKSR, 3, C))
    logs_BKSGC = scores_BKSGC - lse_BKGC[:, :, None]
    p_BKSGC = jnp.exp(jnp.where(visible_BSC[:, None, :, None], logs_BKSGC, lowest))
    p_BKSR = p_BKSGC.astype(d_out_BKRH.dtype).reshape(products_BKSR.shape)
    d_v_BKSH = _dot("bksr,bkrh->bksh", p_BKSR, d_out_BKRH)
    d_p_BKSR = _dot("bksh,bkrh->bksr", v_BKSH, d_out_BKRH)
    rows = lambda x_BKSGC: x_BKSGC.reshape(products_BKSR.shape)
    d_BKSR = rows(p_BKSGC) * (d_p_BKSR - delta_BKR[:, :, None]) * scoring.scale
    if scoring.softcap is not None:
        d_BKSR *= 1 - jnp.square(rows(scores_BKSGC) / scoring.softcap)
    d_BKSR = d_BKSR.astype(q_BKRH.dtype)
    d_q_BKRH = multiply_transposed(d_BKSR, k_BKSH)
    d_k_BKSH = _dot("bksr,bkrh->bksh", d_BKSR, q_BKRH)
    return _split_rows(d_q_BKRH, 2, C), d_k_BKSH, d_v_BKSH


def _tie(queries, kv_positions: TokenPositions):
    """The same values, and the score of what is hidden. A scan moves what depends on segments or on
    constants alone out of its loop, and keeps it for all blocks and layers: dense masks. What is
    tied to queries stays."""
    return lax.optimization_barrier((queries, kv_positions, jnp.float32(-jnp.inf)))


def _scores(scoring: Scoring, products: Array) -> Array:
    scores = products * scoring.scale
    return scores if (c := scoring.softcap) is None else c * jnp.tanh(scores / c)


def _dot(spec: str, x, y) -> Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _block_tokens(T: int) -> int:
    """Block size near BLOCK that leaves little padding in the last block."""
    return -(-T // -(-T // BLOCK))


class Band(NamedTuple):
    """Neighbouring blocks of queries that read equally many keys."""

    blocks: slice
    num_keys: int
    first_keys: np.ndarray
    """int32, of each block"""


def _bands(T: int, S: int, C: int, window: int | None, same_order: bool) -> Iterator[Band]:
    """Bands with the keys that their queries can see.

    In self-attention a key of higher index is never visible, and positions rise by at least one per
    token, so a key `window` indices back is not visible either. Otherwise the keys are in any
    order, as those of a cache, and every block reads all of them.
    """
    blocks = -(-T // C)
    if not same_order:
        yield Band(slice(0, blocks), S, np.zeros(blocks, np.int32))
        return
    reach = S if window is None else min(S, window - 1 + C)  # of the keys of one block
    growing = blocks if reach == S else reach // C
    per_band = -(-growing // MAX_BANDS)
    for first in range(0, growing, per_band):
        end = min(first + per_band, growing)
        yield Band(slice(first, end), min(end * C, S), np.zeros(end - first, np.int32))
    if growing < blocks:
        ends = np.minimum(np.arange(growing + 1, blocks + 1, dtype=np.int32) * C, S)
        yield Band(slice(growing, blocks), reach, ends - reach)


def _read(arrays, first_key: Array, num_keys: int):
    """Of k and v [B, K, S, H] and positions [B, S]: these keys."""
    cut = lambda x: lax.dynamic_slice_in_dim(x, first_key, num_keys, axis=1 if x.ndim == 2 else 2)
    return jax.tree.map(cut, arrays)


def _slice_blocks(blocks, band: slice):
    return jax.tree.map(lambda x: x[band], blocks)


def _blocks(x_BTN: Array, K: int, C: int) -> Array:
    """[blocks, B, K, G, C, ...] of [B, T, N, ...]; the last block is filled with padding."""
    B, T, N, *rest = x_BTN.shape
    blocks = -(-T // C)
    x = jnp.pad(x_BTN, ((0, 0), (0, blocks * C - T), *((0, 0),) * (x_BTN.ndim - 2)))
    x = x.reshape(B, blocks, C, K, N // K, *rest)
    return x.transpose(1, 0, 3, 4, 2, *range(5, x.ndim))


def _from_blocks(x: Array, T: int) -> Array:
    """[B, T, N, H] of [blocks, B, K, G, C, H]."""
    blocks, B, K, G, C, H = x.shape
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(B, blocks * C, K * G, H)[:, :T]


def _query_rows(x_BTNH: Array, K: int, C: int) -> Array:
    """[blocks, B, K, R, H]: heads that share their keys become rows of one product."""
    x = _blocks(x_BTNH, K, C)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _split_rows(x: Array, axis: int, C: int) -> Array:
    """G and C in place of R, which is this dimension."""
    return x.reshape(*x.shape[:axis], -1, C, *x.shape[axis + 1 :])


def _block_positions(positions: TokenPositions, C: int) -> TokenPositions:
    """[blocks, B, C] of [B, T]."""
    return TokenPositions(*(_blocks(x[..., None], 1, C)[:, :, 0, 0] for x in positions))
