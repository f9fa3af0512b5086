"""The gated delta rule (Yang et al., 2024, arXiv:2412.06464) and the short convolution before it:
token mixing whose state does not grow with the number of tokens.

Each head has a state S [A, C]. A token with decay a, write strength b, key k, value v and query q
makes S' = a S + b k (v - a S^T k)^T of it and reads S'^T q. State and convolution begin anew with
each document.

B batch, T tokens, n chunks of c tokens, i and j tokens of a chunk, K key heads, G value heads to
each, A key size, C value size, S taps of the convolution, X channels.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

CHUNK_TOKENS = 64
NO_DOCUMENT = -1
"""What no token belongs to."""
matmul = partial(jnp.matmul, precision="highest")


def delta_rule(
    q_BTKA: Array,
    k_BTKA: Array,
    v_BTKGC: Array,
    log_decay_BTKG: Array,
    strength_BTKG: Array,
    *,
    segments_BT: Array | None = None,
    state_BKGAC: Array | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Array, Array]:
    """What each token reads, float32 [B, T, K, G, C], and the state after the last one, float32.

    `segments_BT` numbers the documents; without it all tokens continue that of `state_BKGAC`. A
    token with a log decay and a strength of 0 leaves the state as it is.

    Chunk by chunk: what the tokens of a chunk do to each other are products of matrices, for all
    chunks at once, and only the states between chunks follow each other. Memory grows linearly
    with T.
    """
    (B, T, K, A), (G, C) = k_BTKA.shape, v_BTKGC.shape[-2:]
    size = min(chunk_tokens, T)
    if segments_BT is None:
        segments_BT = jnp.zeros((B, T), jnp.int32)
        first_B1 = segments_BT[:, :1]
    else:
        first_B1 = jnp.full((B, 1), NO_DOCUMENT, jnp.int32)
    tokens = q_BTKA, k_BTKA, v_BTKGC, log_decay_BTKG, strength_BTKG
    q, k, v, log_decay, strength = (_cut(x.astype(jnp.float32), size=size) for x in tokens)
    # The padding of the last chunk continues its document, and writes nothing.
    segments_Bnc = _cut(segments_BT, size=size, mode="edge")
    before_Bn1 = jnp.concatenate([first_B1, segments_Bnc[:, :-1, -1]], axis=1)[..., None]

    per_head = lambda mask: mask[:, :, None, None]
    is_same_Bnij = segments_Bnc[..., :, None] == segments_Bnc[..., None, :]
    is_seen_Bnij = is_same_Bnij & jnp.tri(size, dtype=bool)
    log_decay_BnKGc = jnp.moveaxis(log_decay, 2, -1)
    # Sums over the tokens between two, not differences of sums over a chunk: these would be rounded
    # by what the documents before hold.
    is_later_ij = jnp.tri(size, k=-1, dtype=bool)
    later_BnKGij = jnp.where(is_later_ij, log_decay_BnKGc[..., None], 0.0)
    between_BnKGij = _decays(per_head(is_seen_Bnij), matmul(jnp.tri(size), later_BnKGij))
    since_start_BnKGc = _decays(
        per_head(segments_Bnc == before_Bn1), jnp.cumsum(log_decay_BnKGc, axis=-1)
    )

    strength_BnKGc = jnp.moveaxis(strength, 2, -1)
    products_BnKij = jnp.einsum("bnika,bnjka->bnkij", k, k)
    lower_BnKGij = strength_BnKGc[..., None] * products_BnKij[:, :, :, None] * between_BnKGij
    inverse_BnKGij = invert_unit_lower(jnp.tril(lower_BnKGij, -1))
    # What the tokens of a chunk write, if the state before it were 0, and how it changes that.
    written_BnKGcC = jnp.einsum("bnkgij,bnkgj,bnjkgc->bnkgic", inverse_BnKGij, strength_BnKGc, v)
    erased_BnKGcA = jnp.einsum(
        "bnkgij,bnkgj,bnjka->bnkgia", inverse_BnKGij, strength_BnKGc * since_start_BnKGc, k
    )
    read_BnKGcA = jnp.einsum("bnika,bnkgi->bnkgia", q, since_start_BnKGc)
    kept_BnKGcA = jnp.einsum("bnjka,bnkgj->bnkgja", k, between_BnKGij[..., -1, :])

    def next_chunk(state_BKGAC: Array, chunk: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        written, erased, read, kept, decay_BKG = chunk
        fresh = written - jnp.einsum("bkgca,bkgad->bkgcd", erased, state_BKGAC)
        y = jnp.einsum("bkgca,bkgad->bkgcd", read, state_BKGAC)
        state_BKGAC = decay_BKG[..., None, None] * state_BKGAC
        return state_BKGAC + jnp.einsum("bkgca,bkgcd->bkgad", kept, fresh), (y, fresh)

    if state_BKGAC is None:
        state_BKGAC = jnp.zeros((B, K, G, A, C), jnp.float32)
    chunks = (written_BnKGcC, erased_BnKGcA, read_BnKGcA, kept_BnKGcA, since_start_BnKGc[..., -1])
    state_BKGAC, by_chunk = lax.scan(
        next_chunk, state_BKGAC, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), chunks)
    )
    y_BnKGcC, fresh_BnKGcC = (jnp.moveaxis(x, 0, 1) for x in by_chunk)
    scores_BnKij = jnp.einsum("bnika,bnjka->bnkij", q, k)
    y_BnKGcC += jnp.einsum(
        "bnkij,bnkgij,bnkgjc->bnkgic", scores_BnKij, between_BnKGij, fresh_BnKGcC
    )
    y_BncKGC = jnp.moveaxis(y_BnKGcC, 4, 2)
    return y_BncKGC.reshape(B, -1, K, G, C)[:, :T], state_BKGAC


def delta_step(
    q_B1KA: Array,
    k_B1KA: Array,
    v_B1KGC: Array,
    log_decay_B1KG: Array,
    strength_B1KG: Array,
    *,
    state_BKGAC: Array,
) -> tuple[Array, Array]:
    """`delta_rule` of one token that continues the document of the state."""
    tokens = q_B1KA, k_B1KA, v_B1KGC, log_decay_B1KG, strength_B1KG
    q, k, v, log_decay, strength = (x[:, 0].astype(jnp.float32) for x in tokens)
    state_BKGAC = jnp.exp(log_decay)[..., None, None] * state_BKGAC
    known_BKGC = jnp.einsum("bka,bkgac->bkgc", k, state_BKGAC)
    fresh_BKGC = strength[..., None] * (v - known_BKGC)
    state_BKGAC += k[:, :, None, :, None] * fresh_BKGC[..., None, :]
    return jnp.einsum("bka,bkgac->bkgc", q, state_BKGAC)[:, None], state_BKGAC


def _cut(x: Array, *, size: int, mode: str = "constant") -> Array:
    """[B, T, ...] as chunks [B, n, c, ...], the last of them filled up."""
    padding = [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)]
    x = jnp.pad(x, padding, mode=mode)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _decays(is_seen: Array, log_decays: Array) -> Array:
    # Masked before the exponential, which may be infinite where nothing is seen.
    return jnp.exp(jnp.where(is_seen, log_decays, -jnp.inf))


@jax.custom_vjp
def invert_unit_lower(lower: Array) -> Array:
    """The inverse of 1 + `lower` [..., c, c], which has entries below the diagonal alone.

    Blocks of twice the size are inverted from those of half of it, by products alone: stable as
    forward substitution is, where a sum of the powers of `lower` is not.
    """
    size = lower.shape[-1]
    row, column = jnp.arange(size)[:, None], jnp.arange(size)
    inverse, half = jnp.eye(size, dtype=lower.dtype), 1
    while half < size:
        is_pair = row // (2 * half) == column // (2 * half)
        block = jnp.where(is_pair & (row // half > column // half), lower, 0)
        change = block if half == 1 else matmul(matmul(inverse, block), inverse)
        inverse, half = inverse - change, 2 * half
    return jnp.broadcast_to(inverse, lower.shape)


def _invert_fwd(lower: Array) -> tuple[Array, Array]:
    inverse = invert_unit_lower(lower)
    return inverse, inverse


def _invert_bwd(inverse: Array, d_inverse: Array) -> tuple[Array]:
    return (jnp.tril(-matmul(matmul(inverse.mT, d_inverse), inverse.mT), -1),)


invert_unit_lower.defvjp(_invert_fwd, _invert_bwd)


def short_convolution(
    x_BTX: Array,
    weight_SX: Array,
    *,
    segments_BT: Array | None = None,
    past_BSX: Array | None = None,
) -> Array:
    """The sum of the last S tokens, each channel times its weights, in the dtype of x; X may be
    several dimensions.

    Tokens before the first are those of `past_BSX` (one less than S), or none. `segments_BT`
    numbers the documents, which do not see each other; without it all continue that of the past.
    """
    taps, (B, T, *X) = weight_SX.shape[0], x_BTX.shape
    if past_BSX is None:
        past_BSX = jnp.zeros((B, taps - 1, *X), x_BTX.dtype)
    if segments_BT is None:
        segments_BT = jnp.full((B, T), NO_DOCUMENT, jnp.int32)
    before_BS = jnp.full((B, taps - 1), NO_DOCUMENT, jnp.int32)
    all_BTX = jnp.concatenate([past_BSX.astype(x_BTX.dtype), x_BTX], axis=1)
    all_segments_BT = jnp.concatenate([before_BS, segments_BT], axis=1)
    y_BTX = jnp.zeros(x_BTX.shape, jnp.float32)
    for tap in range(taps):
        seen = slice(tap, tap + T)
        is_same_BT1 = (all_segments_BT[:, seen] == segments_BT).reshape(B, T, *[1] * len(X))
        weight_X = weight_SX[tap].astype(jnp.float32)
        y_BTX += jnp.where(is_same_BT1, all_BTX[:, seen].astype(jnp.float32) * weight_X, 0.0)
    return y_BTX.astype(x_BTX.dtype)


def last_tokens(x_BTX: Array, past_BSX: Array, segments_BT: Array) -> Array:
    """The past of the tokens after these, of each sequence: what precedes its padding."""
    num_tokens_B1 = jnp.sum(segments_BT != 0, axis=1, keepdims=True)
    index_BS = num_tokens_B1 + jnp.arange(past_BSX.shape[1])
    x_BTX = jnp.concatenate([past_BSX, x_BTX.astype(past_BSX.dtype)], axis=1)
    index_BSX = index_BS.reshape(*index_BS.shape, *[1] * (x_BTX.ndim - 2))
    return jnp.take_along_axis(x_BTX, index_BSX, axis=1)
