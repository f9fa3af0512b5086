"""Attention in plain jnp, a block of queries at a time: the definition, and what CPU and GPU run.

The forward saves its output and the log-sum-exp of each row of scores, and the backward makes the
scores again from them, as in FlashAttention-2 (Dao, 2023, arXiv:2307.08691, section 3.1).

B batch, T query tokens, S key tokens, N query heads, K key/value heads, G = N / K queries to a
key/value head, H head size, C tokens of a block of queries, R = G * C rows of it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from jaxtrain.kernels.attention.mask import TokenPositions, score_scale, sees

BLOCK = 128  # on CPU 64 is as fast, 256 a third slower
MAX_BANDS = 8  # keeps program size and compile time bounded, for an eighth more scores than needed


class Band(NamedTuple):
    """Neighbouring blocks of queries that look at the same stretch of keys."""

    first: int
    blocks: int
    kv_start: int
    kv_stop: int


class Saved(NamedTuple):
    q_BTNH: Array
    k_BSKH: Array
    v_BSKH: Array
    q_places: TokenPositions
    kv_places: TokenPositions
    out_BTNH: Array
    lse_BTN: Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def reference_attention(
    window: int | None, q_BTNH, k_BSKH, v_BSKH, q_places: TokenPositions, kv_places: TokenPositions
) -> Array:
    return _forward(window, q_BTNH, k_BSKH, v_BSKH, q_places, kv_places)[0]


def _attention_fwd(window: int | None, q_BTNH, k_BSKH, v_BSKH, q_places, kv_places):
    out_BTNH, lse_BTN = _forward(window, q_BTNH, k_BSKH, v_BSKH, q_places, kv_places)
    # Named, so that a rematerialisation policy can keep these two and not run the forward twice.
    out_BTNH = checkpoint_name(out_BTNH, "attention")
    lse_BTN = checkpoint_name(lse_BTN, "attention")
    return out_BTNH, Saved(q_BTNH, k_BSKH, v_BSKH, q_places, kv_places, out_BTNH, lse_BTN)


def _forward(window: int | None, q_BTNH, k_BSKH, v_BSKH, q_places, kv_places):
    T, N = q_BTNH.shape[1:3]
    S, K = k_BSKH.shape[1:3]
    C = _block_tokens(T)
    blocks_q, places = _query_rows(q_BTNH, K, C), _row_places(q_places, N // K, C)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)

    outs, lses = [], []
    for band in _bands(T, S, C, window):
        keys = slice(band.kv_start, band.kv_stop)
        kv_band = TokenPositions(*(x[:, keys] for x in kv_places))
        block = partial(_forward_block, window, k_BKSH[:, :, keys], v_BKSH[:, :, keys], kv_band)
        out, lse = lax.map(block, _of(band, (blocks_q, places)))
        outs.append(out)
        lses.append(lse)
    out_BTNH = _from_query_rows(jnp.concatenate(outs), T, N)
    lse_BTN = _from_query_rows(jnp.concatenate(lses), T, N)[..., 0]
    return out_BTNH.astype(q_BTNH.dtype), lse_BTN


def _forward_block(window: int | None, k_BKSH, v_BKSH, kv_places: TokenPositions, block):
    q_BKRH, row_places = block
    seen_BRS = sees(row_places, kv_places, window)
    scores_BKRS = _dot("bkrh,bksh->bkrs", q_BKRH, k_BKSH) * score_scale(q_BKRH)
    scores_BKRS = jnp.where(seen_BRS[:, None], scores_BKRS, -jnp.inf)
    top_BKR1 = scores_BKRS.max(-1, keepdims=True)
    # A row that sees nothing has a maximum of -inf, and -inf - -inf is NaN.
    top_BKR1 = jnp.where(top_BKR1 == -jnp.inf, 0.0, top_BKR1)
    p_BKRS = jnp.exp(scores_BKRS - top_BKR1)
    total_BKR1 = p_BKRS.sum(-1, keepdims=True)
    total_BKR1 = jnp.where(total_BKR1 == 0, 1.0, total_BKR1)
    out_BKRH = _dot("bkrs,bksh->bkrh", p_BKRS.astype(v_BKSH.dtype), v_BKSH) / total_BKR1
    return out_BKRH, top_BKR1 + jnp.log(total_BKR1)


def _attention_bwd(window: int | None, saved: Saved, d_out_BTNH):
    T, N = saved.q_BTNH.shape[1:3]
    S, K = saved.k_BSKH.shape[1:3]
    C = _block_tokens(T)
    # The row sums of dP * P, without P: they equal those of dO * O.
    delta_BTN = _dot("btnh,btnh->btn", d_out_BTNH, saved.out_BTNH)
    blocks = (
        _query_rows(saved.q_BTNH, K, C),
        _row_places(saved.q_places, N // K, C),
        _query_rows(d_out_BTNH, K, C),
        _query_rows(saved.lse_BTN[..., None], K, C),
        _query_rows(delta_BTN[..., None], K, C),
    )
    k_BKSH, v_BKSH = saved.k_BSKH.swapaxes(1, 2), saved.v_BSKH.swapaxes(1, 2)
    d_k_BKSH = jnp.zeros(k_BKSH.shape, jnp.float32)
    d_v_BKSH = jnp.zeros(v_BKSH.shape, jnp.float32)

    d_qs = []
    for band in _bands(T, S, C, window):
        keys = slice(band.kv_start, band.kv_stop)
        kv_band = TokenPositions(*(x[:, keys] for x in saved.kv_places))
        block = partial(_backward_block, window, k_BKSH[:, :, keys], v_BKSH[:, :, keys], kv_band)

        def add(sums, queries, block=block):
            d_q, *d_kv = block(queries)
            return [total + part for total, part in zip(sums, d_kv, strict=True)], d_q

        sums = [d_k_BKSH[:, :, keys], d_v_BKSH[:, :, keys]]
        (d_k, d_v), d_q = lax.scan(add, sums, _of(band, blocks))
        d_k_BKSH = d_k_BKSH.at[:, :, keys].set(d_k)
        d_v_BKSH = d_v_BKSH.at[:, :, keys].set(d_v)
        d_qs.append(d_q)
    d_q_BTNH = _from_query_rows(jnp.concatenate(d_qs), T, N).astype(saved.q_BTNH.dtype)
    d_k_BSKH = d_k_BKSH.swapaxes(1, 2).astype(saved.k_BSKH.dtype)
    d_v_BSKH = d_v_BKSH.swapaxes(1, 2).astype(saved.v_BSKH.dtype)
    return d_q_BTNH, d_k_BSKH, d_v_BSKH, None, None


reference_attention.defvjp(_attention_fwd, _attention_bwd)


def _backward_block(window: int | None, k_BKSH, v_BKSH, kv_places: TokenPositions, block):
    """Scores stand keys first here: one of the five products is transposed then, not two."""
    q_BKRH, row_places, d_out_BKRH, lse_BKR1, delta_BKR1 = block
    seen_BSR = sees(row_places, kv_places, window).swapaxes(1, 2)
    scale = score_scale(q_BKRH)
    scores_BKSR = _dot("bksh,bkrh->bksr", k_BKSH, q_BKRH) * scale
    p_BKSR = jnp.exp(scores_BKSR - lse_BKR1.swapaxes(2, 3))
    p_BKSR = jnp.where(seen_BSR[:, None], p_BKSR, 0.0)
    d_v_BKSH = _dot("bksr,bkrh->bksh", p_BKSR.astype(d_out_BKRH.dtype), d_out_BKRH)
    d_p_BKSR = _dot("bksh,bkrh->bksr", v_BKSH, d_out_BKRH)
    d_scores_BKSR = p_BKSR * (d_p_BKSR - delta_BKR1.swapaxes(2, 3)) * scale
    d_scores_BKSR = d_scores_BKSR.astype(q_BKRH.dtype)
    d_q_BKRH = _dot("bksr,bksh->bkrh", d_scores_BKSR, k_BKSH)
    d_k_BKSH = _dot("bksr,bkrh->bksh", d_scores_BKSR, q_BKRH)
    return d_q_BKRH, d_k_BKSH, d_v_BKSH


def _dot(spec: str, x, y) -> Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _block_tokens(T: int) -> int:
    """Blocks of equal size near BLOCK, so that little padding fills the last one."""
    return -(-T // -(-T // BLOCK))


def _bands(T: int, S: int, C: int, window: int | None) -> list[Band]:
    """Cut the blocks so that a band skips keys that none of its queries can see.

    With T == S the row looks at itself: a key of higher index is never visible, and positions rise
    by at least one a token, so a key `window` indices back is not visible either. Otherwise the
    keys are a cache, in any order, and every block looks at all of it.
    """
    blocks = -(-T // C)
    if T != S:
        return [Band(0, blocks, 0, S)]
    a_band = -(-blocks // MAX_BANDS)
    bands = []
    for first in range(0, blocks, a_band):
        last = min(first + a_band, blocks)
        kv_start = 0 if window is None else max(0, first * C - window + 1)
        bands.append(Band(first, last - first, kv_start, min(last * C, S)))
    return bands


def _of(band: Band, blocks):
    return jax.tree.map(lambda x: x[band.first : band.first + band.blocks], blocks)


def _query_rows(x_BTNH, K: int, C: int) -> Array:
    """[blocks, B, K, G * C, H]: the heads of a group share their keys, so they become rows."""
    B, T, N, H = x_BTNH.shape
    blocks = -(-T // C)
    x_BTNH = jnp.pad(x_BTNH, ((0, 0), (0, blocks * C - T), (0, 0), (0, 0)))
    x = x_BTNH.reshape(B, blocks, C, K, N // K, H).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(blocks, B, K, N // K * C, H)


def _from_query_rows(x, T: int, N: int) -> Array:
    blocks, B, K, R, H = x.shape
    G = N // K
    x = x.reshape(blocks, B, K, G, R // G, H).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, blocks * R // G, N, H)[:, :T]


def _row_places(places: TokenPositions, G: int, C: int) -> TokenPositions:
    """Positions of each block's rows, [blocks, B, G * C]; what fills the last block is padding."""
    heads = (jnp.broadcast_to(x[:, :, None, None], (*x.shape, G, 1)) for x in places)
    return TokenPositions(*(_query_rows(x, 1, C)[:, :, 0, :, 0] for x in heads))
