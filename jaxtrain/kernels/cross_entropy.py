"""Cross-entropy from hidden states, one chunk of tokens at a time: [B, T, V] never exists.

On a mesh the batch gets a leading dimension of shards, and so does the gradient of the head. Each
device then sums its own part over all chunks, and one sum over the shards follows the loop; the
compiler would otherwise reduce the whole head gradient once per chunk. A head that is too large to
be whole on every device, beside its gradient, is gathered a tile of the vocabulary at a time: once
for the losses and once more for the gradients.

I shards of batch and tokens, B batch (b per shard), T tokens, C tokens per chunk, D width, V
vocabulary, or a tile of it, N chunks.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxtrain.kernels.axes import (
    CONTEXT_AXIS,
    TENSOR_AXIS,
    batch_parts,
    context_parts,
    current_platform,
    free_axis_sizes,
)
from jaxtrain.kernels.product import einsum
from jaxtrain.kernels.sums import SHARED, Axes, sum_parts

HeadLayout = Literal["DV", "VD"]
"""Order of the head's dimensions; 'VD' is that of a tied embedding."""

MIN_BYTES = 64 * 2**20  # of a chunk's logits, which need not be smaller
MAX_TOKENS = 1024  # of a chunk on one device; more are no faster on CPU and GPU
ONE_CHUNK_BYTES = 2 * 2**30  # of the logits of all tokens of a TPU, which need no sum over chunks
WHOLE_BYTES = 2 * 2**30  # of a head in 16 bits and its gradient on a device; a larger one is tiled
TILE_BYTES = 128 * 2**20  # of a tile's gradient
MIN_TILE = 512  # tokens of the vocabulary
SUM_BLOCK = 4096  # tokens of the vocabulary; 512 to 8192 are as fast
HALF_LIFT = 2.0**10
"""Factor on gradients of logits in float16, where a share of a large vocabulary would be 0."""


class NLL(NamedTuple):
    """Sums over the batch, float32 []. Only `total` is differentiated; the others are metrics."""

    total: Array
    """weighted negative log-likelihood, smoothing and z-loss included"""
    z_total: Array
    """the part of `total` that is z-loss"""
    correct: Array
    """weight of the tokens that the model ranks first"""


class Plan(NamedTuple):
    """Hashable and static. `shards` is the number of parts of batch and tokens over `axes`."""

    head_layout: HeadLayout
    scale: float
    softcap: float | None
    z_loss: float
    label_smoothing: float
    chunk_tokens: int
    part_tokens: int
    """of each part of a sequence"""
    axes: tuple[str, ...]
    shards: int
    parts: int
    """of each sequence, among these"""
    vocabulary_axis: str | None
    vocabulary: int
    splits: int
    """of the vocabulary over its axis"""
    tiles: int
    """of each of these"""
    shared: Axes = SHARED
    """over which devices share the gradient of the head"""
    lift: float = 1.0
    """factor on what is saved for the backward pass, which takes it out again"""

    def place(self, x: Array, *spec) -> Array:
        """Constrains the sharding of x, if anything is split."""
        is_split = self.axes or self.vocabulary_axis
        return lax.with_sharding_constraint(x, P(*spec)) if is_split else x


class Scores(NamedTuple):
    """What the loss of a token derives from its logits, or from those of a tile."""

    top_IbC: Array
    lse_IbC: Array
    target_IbC: Array
    """the target's logit"""
    sum_IbC: Array


def weighted_nll(
    hidden_BTD: Array,
    head: Array,
    targets_BT: Array,
    weights_BT: Array,
    *,
    head_layout: HeadLayout = "DV",
    scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk_tokens: int | None = None,
    tiles: int | None = None,
    shared: Axes = SHARED,
) -> NLL:
    """Weighted sum of the losses of targets[b, t] given hidden[b, t].

    The forward pass computes the gradients of hidden and head too, which saves one product in four.
    Only `total` is differentiated; weights are constants. A token of weight 0 adds nothing, not
    even a NaN. Logits are those of `scale_and_cap`. `chunk_tokens` counts tokens of each sequence,
    `tiles` the parts of a device's vocabulary, which they divide; devices of the axes `shared` get
    parts of the gradient of the head.
    """
    plan = _make_plan(
        hidden_BTD, head, head_layout, chunk_tokens, tiles, scale, softcap, z_loss, label_smoothing
    )
    lift = HALF_LIFT if hidden_BTD.dtype == jnp.float16 else 1.0
    plan = plan._replace(shared=shared, lift=lift)
    return _weighted_nll(plan, hidden_BTD, head, targets_BT, weights_BT.astype(jnp.float32))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_nll(
    plan: Plan, hidden_BTD: Array, head: Array, targets_BT: Array, weights_BT: Array
) -> NLL:
    # Without differentiation the gradients are unused, and the compiler drops them.
    return _weighted_nll_fwd(plan, hidden_BTD, head, targets_BT, weights_BT)[0]


def _weighted_nll_fwd(
    plan: Plan, hidden_BTD: Array, head: Array, targets_BT: Array, weights_BT: Array
):
    like = jnp.zeros((), head.dtype)
    x_NIbCD, y_NIbC, w_NIbC = _split_chunks(plan, hidden_BTD, targets_BT, weights_BT)
    x_NIbCD = _zero_unweighted(x_NIbCD, w_NIbC)
    tiles = _tile_head(plan, head, hidden_BTD.dtype)
    if plan.tiles > 1:
        scores = _measure(plan, tiles, x_NIbCD, y_NIbC)
        gradients = _pull(plan, tiles, x_NIbCD, y_NIbC, scores.lse_IbC, w_NIbC)
        nll = _sum_nll(plan, scores, w_NIbC)
        return NLL(*(x.sum() for x in nll)), (*gradients, like)
    prepared = _gather(plan, tiles[0])

    def step(sums, chunk):
        x_IbCD, y_IbC, w_IbC = chunk
        logits_IbCV = _logits(plan, prepared, x_IbCD)
        scores = _score(plan, logits_IbCV, y_IbC)
        d_IbCV = _d_products(plan, logits_IbCV, y_IbC, scores.lse_IbC, w_IbC)
        d_hidden, d_head = _product_gradients(plan, prepared, x_IbCD, d_IbCV)
        nll = _sum_nll(plan, scores, w_IbC)
        return jax.tree.map(jnp.add, sums, (nll, d_head)), d_hidden.astype(x_IbCD.dtype)

    sums = NLL(*jnp.zeros((3, plan.shards))), _head_sums(plan, x_NIbCD)
    (nll, d_head), d_hidden = lax.scan(step, sums, (x_NIbCD, y_NIbC, w_NIbC))
    d_head = _join_tiles(plan, _sum_shards(plan, d_head)[None])
    return NLL(*(x.sum() for x in nll)), (_join_chunks(plan, d_hidden), d_head, like)


def _weighted_nll_bwd(plan: Plan, saved, d_nll: NLL):
    d_hidden_BTD, d_head, like = saved
    factor = d_nll.total / plan.lift
    d_hidden_BTD = (d_hidden_BTD * factor).astype(d_hidden_BTD.dtype)
    return d_hidden_BTD, (d_head * factor).astype(like.dtype), None, None


_weighted_nll.defvjp(_weighted_nll_fwd, _weighted_nll_bwd)


def _sum_nll(plan: Plan, scores: Scores, w_IbC: Array) -> NLL:
    """Sums of chunks, float32 [..., I]."""
    smoothing = plan.label_smoothing
    loss_IbC = scores.lse_IbC - (1 - smoothing) * scores.target_IbC
    if smoothing:
        loss_IbC -= smoothing / plan.vocabulary * scores.sum_IbC
    z_IbC = plan.z_loss * scores.lse_IbC**2
    correct_IbC = scores.target_IbC == scores.top_IbC
    return NLL(*(jnp.sum(w_IbC * x, (-2, -1)) for x in (loss_IbC + z_IbC, z_IbC, correct_IbC)))


def _d_total(
    plan: Plan, logits_IbCV: Array, is_target_IbCV: Array, lse_IbC: Array, w_IbC: Array
) -> Array:
    """Gradient of a chunk's total with respect to its logits, float32 [I, b, C, V]."""
    smoothing, w_IbC1, lse_IbC1 = plan.label_smoothing, w_IbC[..., None], lse_IbC[..., None]
    d_IbCV = jnp.exp(logits_IbCV - lse_IbC1) * w_IbC1 * (1 + 2 * plan.z_loss * lse_IbC1)
    d_IbCV -= jnp.where(is_target_IbCV, (1 - smoothing) * w_IbC1, 0)
    return d_IbCV - smoothing / plan.vocabulary * w_IbC1 if smoothing else d_IbCV


def token_log_probs(
    hidden_BTD: Array,
    head: Array,
    targets_BT: Array,
    *,
    head_layout: HeadLayout = "DV",
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    tiles: int | None = None,
    shared: Axes = SHARED,
) -> Array:
    """Log-probability of targets[b, t] given hidden[b, t], float32 [B, T].

    The backward pass recomputes the logits, which are those of `scale_and_cap`. A token whose
    gradient is 0 adds nothing, not even a NaN. Other arguments are those of `weighted_nll`.
    """
    plan = _make_plan(hidden_BTD, head, head_layout, chunk_tokens, tiles, scale, softcap)
    plan = plan._replace(shared=shared)
    return _log_probs(plan, hidden_BTD, head, targets_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(plan: Plan, hidden_BTD, head, targets_BT) -> Array:
    return _log_probs_fwd(plan, hidden_BTD, head, targets_BT)[0]


def _log_probs_fwd(plan: Plan, hidden_BTD, head, targets_BT):
    tiles = _tile_head(plan, head, hidden_BTD.dtype)
    scores = _measure(plan, tiles, *_split_chunks(plan, hidden_BTD, targets_BT))
    lse_BT = _join_chunks(plan, scores.lse_IbC)
    log_probs_BT = _join_chunks(plan, scores.target_IbC - scores.lse_IbC)
    return log_probs_BT, (hidden_BTD, head, targets_BT, lse_BT)


def _log_probs_bwd(plan: Plan, saved, d_log_probs_BT):
    hidden_BTD, head, targets_BT, lse_BT = saved
    tiles = _tile_head(plan, head, hidden_BTD.dtype)
    x, y, lse, g = _split_chunks(plan, hidden_BTD, targets_BT, lse_BT, d_log_probs_BT)
    # A log-probability is the negative of a loss of weight 1.
    x, lse = _zero_unweighted(x, g), jnp.where(g != 0, lse, 0)
    d_hidden_BTD, d_head = _pull(plan, tiles, x, y, lse, -g)
    return d_hidden_BTD, d_head.astype(head.dtype), None


_log_probs.defvjp(_log_probs_fwd, _log_probs_bwd)


def _make_plan(
    hidden_BTD: Array,
    head: Array,
    head_layout: HeadLayout,
    chunk_tokens: int | None,
    tiles: int | None,
    scale: float,
    softcap: float | None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Plan:
    B, T, D = hidden_BTD.shape
    width, V = head.shape if head_layout == "DV" else head.shape[::-1]
    if width != D:
        raise ValueError(
            f"head of shape {head.shape} does not fit a hidden width of {D} in layout "
            f"{head_layout!r}; the other layout is {'VD' if head_layout == 'DV' else 'DV'!r}"
        )
    sizes, parts = free_axis_sizes(), context_parts(T)
    part_tokens = T // parts
    axes, shards = batch_parts(B)
    splits = sizes.get(TENSOR_AXIS, 1)
    splits = splits if V % splits == 0 else 1
    if tiles is None:
        tiles = _count_tiles(D, V // splits) if shards * parts > 1 else 1
    if chunk_tokens is None:
        # With D tokens the logits take as much memory as the float32 gradient of the head.
        tokens, all_tokens = max(D, MIN_BYTES // (4 * V // splits)), B // shards * part_tokens
        if tiles == 1:
            fits = 4 * all_tokens * V // splits <= ONE_CHUNK_BYTES
            is_whole = fits and current_platform() == "tpu"
            tokens = all_tokens if is_whole else min(MAX_TOKENS, tokens)
        chunk_tokens = max(1, tokens // (B // shards))
    chunks = -(-part_tokens // chunk_tokens)
    return Plan(
        head_layout=head_layout,
        scale=scale,
        softcap=softcap,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        chunk_tokens=-(-part_tokens // chunks),  # equal ones, so that little padding fills the last
        part_tokens=part_tokens,
        axes=(*axes, CONTEXT_AXIS) if parts > 1 else axes,
        shards=shards * parts,
        parts=parts,
        vocabulary_axis=TENSOR_AXIS if splits > 1 else None,
        vocabulary=V,
        splits=splits,
        tiles=tiles,
    )


def _count_tiles(D: int, V: int) -> int:
    if 6 * D * V <= WHOLE_BYTES:
        return 1
    counts = [n for n in range(1, V // MIN_TILE + 1) if V % n == 0]
    return next((n for n in counts if 4 * D * V // n <= TILE_BYTES), counts[-1])


def _zero_unweighted(x_IbCD: Array, w_IbC: Array) -> Array:
    # 0 * NaN is NaN, so a weight alone does not keep a bad row out of the head's gradient.
    return jnp.where(w_IbC[..., None] != 0, x_IbCD, 0)


def scale_and_cap(raw: Array, scale: float, softcap: float | None) -> Array:
    """Logits from products of hidden states and head: scaled, then capped at softcap."""
    scaled = raw * scale
    return scaled if softcap is None else softcap * jnp.tanh(scaled / softcap)


def _logits(plan: Plan, head: Array, x_IbCD: Array) -> Array:
    raw_IbCV = einsum(f"ibcd,{plan.head_layout.lower()}->ibcv", x_IbCD, head)
    return scale_and_cap(raw_IbCV, plan.scale, plan.softcap)


def _is_target(plan: Plan, logits_IbCV: Array, y_IbC: Array, tile: Array | int) -> Array:
    """By comparison: indexing would gather a vocabulary that is split."""
    token_IbCV = lax.broadcasted_iota(jnp.int32, logits_IbCV.shape, 3)
    if plan.tiles > 1:
        size = plan.vocabulary // plan.splits // plan.tiles
        token_IbCV += (token_IbCV // size * (plan.tiles - 1) + tile) * size
    return token_IbCV == y_IbC[..., None]


def _score(plan: Plan, logits_IbCV: Array, y_IbC: Array, tile: Array | int = 0) -> Scores:
    top_IbC = logits_IbCV.max(-1)
    if current_platform() == "cpu" and plan.tiles == 1 and plan.vocabulary_axis is None:
        exp_IbC = _sum_exp(logits_IbCV, top_IbC)
        target_IbC1 = jnp.take_along_axis(logits_IbCV, y_IbC[..., None], -1, mode="clip")
        target_IbC = target_IbC1[..., 0]
    else:
        exp_IbC = jnp.exp(logits_IbCV - top_IbC[..., None]).sum(-1)
        is_target_IbCV = _is_target(plan, logits_IbCV, y_IbC, tile)
        target_IbC = jnp.where(is_target_IbCV, logits_IbCV, 0).sum(-1)
    return Scores(top_IbC, top_IbC + jnp.log(exp_IbC), target_IbC, logits_IbCV.sum(-1))


def _sum_exp(logits_IbCV: Array, top_IbC: Array) -> Array:
    """Sum of exp(logits - top) over the vocabulary, a block of it at a time: of a plain sum XLA on
    CPU keeps the exponentials, in memory that it asks of the system for every chunk."""
    exp = lambda logits: jnp.exp(logits - top_IbC[..., None])
    V = logits_IbCV.shape[-1]
    W = min(SUM_BLOCK, V)

    def add(i, sums_IbCW):
        return sums_IbCW + exp(lax.dynamic_slice_in_dim(logits_IbCV, i * W, W, -1))

    sums_IbCW = lax.fori_loop(0, V // W, add, jnp.zeros((*top_IbC.shape, W)))
    return sums_IbCW.sum(-1) + exp(logits_IbCV[..., V // W * W :]).sum(-1)


def _measure(plan: Plan, tiles: Array, x_NIbCD: Array, y_NIbC: Array) -> Scores:
    """Of all chunks."""

    def of_tile(tile: Array | int, head: Array) -> Scores:
        head = _gather(plan, head)
        score = lambda x, y: _score(plan, _logits(plan, head, x), y, tile)
        return lax.map(lambda chunk: score(*chunk), (x_NIbCD, y_NIbC))

    def step(sums: Scores, numbered) -> tuple[Scores, None]:
        new = of_tile(*numbered)
        top, lse = jnp.maximum(sums.top_IbC, new.top_IbC), jnp.logaddexp(sums.lse_IbC, new.lse_IbC)
        return Scores(top, lse, sums.target_IbC + new.target_IbC, sums.sum_IbC + new.sum_IbC), None

    if plan.tiles == 1:
        return of_tile(0, tiles[0])
    low, zero = jnp.full(y_NIbC.shape, -jnp.inf), jnp.zeros(y_NIbC.shape)
    return lax.scan(step, Scores(low, low, zero, zero), (jnp.arange(plan.tiles), tiles))[0]


def _pull(
    plan: Plan, tiles: Array, x_NIbCD: Array, y_NIbC: Array, lse_NIbC: Array, w_NIbC: Array
) -> tuple[Array, Array]:
    """Gradients of hidden states and head for the total loss."""
    dtype = x_NIbCD.dtype if plan.tiles == 1 else jnp.float32  # they are summed over the tiles

    def of_tile(tile: Array | int, head: Array) -> tuple[Array, Array]:
        head = _gather(plan, head)

        def step(d_head_sum, chunk):
            x_IbCD, y_IbC, lse_IbC, w_IbC = chunk
            logits_IbCV = _logits(plan, head, x_IbCD)
            d_IbCV = _d_products(plan, logits_IbCV, y_IbC, lse_IbC, w_IbC, tile)
            d_hidden, d_head = _product_gradients(plan, head, x_IbCD, d_IbCV)
            return d_head_sum + d_head, d_hidden.astype(dtype)

        chunks = x_NIbCD, y_NIbC, lse_NIbC, w_NIbC
        d_head_IDV, d_hidden = lax.scan(step, _head_sums(plan, x_NIbCD), chunks)
        return d_hidden, _sum_shards(plan, d_head_IDV)

    def step(d_hidden_sum, numbered):
        d_hidden, d_head_DV = of_tile(*numbered)
        return d_hidden_sum + d_hidden, d_head_DV

    if plan.tiles == 1:
        d_hidden, d_head_DV = of_tile(0, tiles[0])
        d_heads = d_head_DV[None]
    else:
        start = plan.place(jnp.zeros_like(x_NIbCD, jnp.float32), None, plan.axes)
        d_hidden, d_heads = lax.scan(step, start, (jnp.arange(plan.tiles), tiles))
    return _join_chunks(plan, d_hidden).astype(x_NIbCD.dtype), _join_tiles(plan, d_heads)


def _d_products(
    plan: Plan,
    logits_IbCV: Array,
    y_IbC: Array,
    lse_IbC: Array,
    w_IbC: Array,
    tile: Array | int = 0,
) -> Array:
    """Gradient of a chunk's total with respect to its products of hidden states and head."""
    is_target_IbCV = _is_target(plan, logits_IbCV, y_IbC, tile)
    d_IbCV = _d_total(plan, logits_IbCV, is_target_IbCV, lse_IbC, w_IbC)
    if plan.softcap is not None:
        d_IbCV = d_IbCV * (1 - jnp.square(logits_IbCV / plan.softcap))
    return d_IbCV * (plan.scale * plan.lift)


def _product_gradients(plan: Plan, head: Array, x_IbCD: Array, d_IbCV: Array):
    """float32 gradients of a chunk's hidden states, and of the head [I, D, V], one per shard."""
    d_IbCV = d_IbCV.astype(x_IbCD.dtype)
    d_x_IbCD = einsum(f"ibcv,{plan.head_layout.lower()}->ibcd", d_IbCV, head)
    d_head_IDV = einsum("ibcd,ibcv->idv", x_IbCD, d_IbCV)
    d_head_IDV = plan.place(d_head_IDV, plan.axes, None, plan.vocabulary_axis)
    return d_x_IbCD, d_head_IDV


def _head_sums(plan: Plan, x_NIbCD: Array) -> Array:
    sums_IDV = jnp.zeros((plan.shards, x_NIbCD.shape[-1], plan.vocabulary // plan.tiles))
    return plan.place(sums_IDV, plan.axes, None, plan.vocabulary_axis)


def _sum_shards(plan: Plan, sums_IDV: Array) -> Array:
    """[D, V], of which every device gets some of D."""
    places = plan.shared, plan.vocabulary_axis
    return sum_parts(sums_IDV, plan.axes, places) if plan.axes else sums_IDV[0]


def _tile_head(plan: Plan, head: Array, dtype: DTypeLike) -> Array:
    """The head, cast, as [tiles, ...]: each has some of the vocabulary of every device."""
    dim = 1 if plan.head_layout == "DV" else 0
    lead, rest = head.shape[:dim], head.shape[dim + 1 :]
    cut = head.astype(dtype).reshape(*lead, plan.splits, plan.tiles, -1, *rest)
    return jnp.moveaxis(cut, dim + 1, 0).reshape(plan.tiles, *lead, -1, *rest)


def _join_tiles(plan: Plan, tiles_DV: Array) -> Array:
    """The gradient of the head in its layout, from those of its tiles [tiles, D, V].

    The gradient of a head [V, D] is summed as [D, V] too, and transposed here: otherwise XLA on CPU
    transposes the gradient of the logits in every chunk, which takes a fifth of the time.
    """
    cut = tiles_DV.reshape(plan.tiles, tiles_DV.shape[1], plan.splits, -1)
    d_head_DV = jnp.moveaxis(cut, 0, 2).reshape(tiles_DV.shape[1], plan.vocabulary)
    # With one chunk, XLA would turn the transpose into another product of bfloat16 with a float32
    # result, of a form that it does not have on CPU.
    return d_head_DV if plan.head_layout == "DV" else lax.optimization_barrier(d_head_DV).T


def _gather(plan: Plan, tile: Array) -> Array:
    """Gathers the head, or a tile of it, over all axes but that of the vocabulary."""
    axes = [None, plan.vocabulary_axis] if plan.head_layout == "DV" else [plan.vocabulary_axis]
    return plan.place(tile, *axes)


def _split_chunks(plan: Plan, *xs_BT: Array) -> tuple[Array, ...]:
    """Splits each into [chunks, I, b, C, ...]; the last is filled with 0, which has no effect."""

    t, C = plan.part_tokens, plan.chunk_tokens
    chunks = -(-t // C)

    def split(x: Array) -> Array:
        rest = x.shape[2:]
        # Parts of tokens go with the parts of the batch, [I, b, t, ...].
        x = x.reshape(plan.shards // plan.parts, -1, plan.parts, t, *rest).swapaxes(1, 2)
        x = x.reshape(plan.shards, -1, t, *rest)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, chunks * C - t), *((0, 0) for _ in rest)))
        x = jnp.moveaxis(x.reshape(*x.shape[:2], chunks, C, *rest), 2, 0)
        return plan.place(x, None, plan.axes, *((None,) * (x.ndim - 2)))

    return tuple(split(x) for x in xs_BT)


def _join_chunks(plan: Plan, x: Array) -> Array:
    """The inverse of `_split_chunks`."""
    chunks, shards, batch, tokens, *rest = x.shape
    x = jnp.moveaxis(x, 0, 2).reshape(shards, batch, chunks * tokens, *rest)
    x = x[:, :, : plan.part_tokens]
    x = x.reshape(shards // plan.parts, plan.parts, batch, plan.part_tokens, *rest).swapaxes(1, 2)
    return x.reshape(-1, plan.parts * plan.part_tokens, *rest)
