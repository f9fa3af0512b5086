"""Cross-entropy from hidden states, one chunk of tokens at a time: [B, T, V] never exists.

On a mesh the batch gets a leading dimension of shards, and so does the gradient of the head. Each
device then sums its own part over all chunks, and one sum over the shards follows the loop; the
compiler would otherwise reduce the whole head gradient once per chunk. A head that is too large to
be whole on every device, beside its gradient, is gathered a tile of the vocabulary at a time: once
for the losses and once more for the gradients.

Tokens of weight 0, as those of a prompt are, come last in their shard and are not computed: whole
chunks of the others come first, then a half and a quarter of one, and the rest is left out.

B batch, T tokens, D width, V vocabulary, or a tile of it; I shards of batch and tokens, S tokens of
a shard and what fills its last chunk, C tokens of a chunk, or of a part of one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

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
CHUNK_MULTIPLE = 128  # tokens, of which products take whole blocks
LAST_PARTS = 4  # of a chunk, if they divide it: a power of 2
ONE_CHUNK_BYTES = 2 * 2**30  # of the logits of all tokens of a TPU, which need no sum over chunks
WHOLE_BYTES = 2 * 2**30  # of a head in 16 bits and its gradient on a device; a larger one is tiled
TILE_BYTES = 128 * 2**20  # of a tile's gradient
MIN_TILE = 512  # tokens of the vocabulary
SUM_BLOCK = 4096  # tokens of the vocabulary; 512 to 8192 are as fast
ROW_MULTIPLE = 1024  # floats: rows so far apart share a few lines of a processor's cache, and
ROW_FILL = 16  # floats after each of them halve the time in which a matrix of them is turned
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
    shard_tokens: int
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

    @property
    def chunks(self) -> int:
        return -(-self.shard_tokens // self.chunk_tokens)

    @property
    def is_split(self) -> bool:
        return bool(self.axes or self.vocabulary_axis)

    def place(self, x: Array, *spec) -> Array:
        """Constrains the sharding of x, if anything is split."""
        return lax.with_sharding_constraint(x, P(*spec)) if self.is_split else x


class Scores(NamedTuple):
    """What the loss of a token derives from its logits, or from those of a tile."""

    top_IC: Array
    lse_IC: Array
    target_IC: Array
    """the target's logit"""
    sum_IC: Array


class Order(NamedTuple):
    """Of the tokens of each shard, those with a weight first."""

    take_IS: Array
    """places of the tokens in their shard"""
    needed: Array
    """int32 []: the most tokens with a weight that a shard has"""


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
    even a NaN. Logits are those of `scale_and_cap`. `chunk_tokens` counts tokens of a device,
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
    order = _put_weighted_first(plan, weights_BT)
    x_ISD, y_IS, w_IS = _split(plan, order, hidden_BTD, targets_BT, weights_BT)
    x_ISD = _zero_unweighted(x_ISD, w_IS)
    tiles = _tile_head(plan, head, hidden_BTD.dtype)
    if plan.tiles > 1:
        scores = _measure(plan, tiles, order, x_ISD, y_IS)
        gradients = _pull(plan, tiles, order, x_ISD, y_IS, scores.lse_IC, w_IS)
        nll = _sum_nll(plan, scores, w_IS)
        return NLL(*(x.sum() for x in nll)), (*gradients, like)
    prepared = _gather(plan, tiles[0])

    def step(sums, chunk):
        x_ICD, y_IC, w_IC = chunk
        logits_ICV = _logits(plan, prepared, x_ICD)
        scores = _score(plan, logits_ICV, y_IC)
        d_ICV = _d_products(plan, logits_ICV, y_IC, scores.lse_IC, w_IC)
        d_hidden, d_head = _product_gradients(plan, prepared, x_ICD, d_ICV)
        nll_sum, d_head_sum = sums
        nll_sum = jax.tree.map(jnp.add, nll_sum, _sum_nll(plan, scores, w_IC))
        return (nll_sum, _add_to_head(d_head_sum, d_head)), d_hidden.astype(x_ICD.dtype)

    sums = NLL(*jnp.zeros((3, plan.shards))), _head_sums(plan, x_ISD)
    (nll, d_head), d_hidden = _scan(plan, order, step, sums, (x_ISD, y_IS, w_IS))
    d_head = _join_tiles(plan, _sum_shards(plan, d_head)[None])
    return NLL(*(x.sum() for x in nll)), (_join(plan, order, d_hidden), d_head, like)


def _weighted_nll_bwd(plan: Plan, saved, d_nll: NLL):
    d_hidden_BTD, d_head, like = saved
    factor = d_nll.total / plan.lift
    d_hidden_BTD = (d_hidden_BTD * factor).astype(d_hidden_BTD.dtype)
    return d_hidden_BTD, (d_head * factor).astype(like.dtype), None, None


_weighted_nll.defvjp(_weighted_nll_fwd, _weighted_nll_bwd)


def _sum_nll(plan: Plan, scores: Scores, w_IC: Array) -> NLL:
    """Sums of chunks, float32 [..., I]."""
    smoothing = plan.label_smoothing
    loss_IC = scores.lse_IC - (1 - smoothing) * scores.target_IC
    if smoothing:
        loss_IC -= smoothing / plan.vocabulary * scores.sum_IC
    z_IC = plan.z_loss * scores.lse_IC**2
    correct_IC = scores.target_IC == scores.top_IC
    return NLL(*(jnp.sum(w_IC * x, -1) for x in (loss_IC + z_IC, z_IC, correct_IC)))


def _d_total(
    plan: Plan, logits_ICV: Array, is_target_ICV: Array, lse_IC: Array, w_IC: Array
) -> Array:
    """Gradient of a chunk's total with respect to its logits, float32 [I, C, V]."""
    smoothing, w_IC1, lse_IC1 = plan.label_smoothing, w_IC[..., None], lse_IC[..., None]
    d_ICV = jnp.exp(logits_ICV - lse_IC1) * w_IC1 * (1 + 2 * plan.z_loss * lse_IC1)
    d_ICV -= jnp.where(is_target_ICV, (1 - smoothing) * w_IC1, 0)
    return d_ICV - smoothing / plan.vocabulary * w_IC1 if smoothing else d_ICV


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
    scores = _measure(plan, tiles, None, *_split(plan, None, hidden_BTD, targets_BT))
    lse_BT = _join(plan, None, scores.lse_IC)
    log_probs_BT = _join(plan, None, scores.target_IC - scores.lse_IC)
    return log_probs_BT, (hidden_BTD, head, targets_BT, lse_BT)


def _log_probs_bwd(plan: Plan, saved, d_log_probs_BT):
    hidden_BTD, head, targets_BT, lse_BT = saved
    tiles = _tile_head(plan, head, hidden_BTD.dtype)
    order = _put_weighted_first(plan, d_log_probs_BT)
    x, y, lse, g = _split(plan, order, hidden_BTD, targets_BT, lse_BT, d_log_probs_BT)
    # A log-probability is the negative of a loss of weight 1.
    x, lse = _zero_unweighted(x, g), jnp.where(g != 0, lse, 0)
    d_hidden_BTD, d_head = _pull(plan, tiles, order, x, y, lse, -g)
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
    shard_tokens = B // shards * part_tokens
    if chunk_tokens is None:
        chunk_tokens = _choose_chunk(shard_tokens, D, V // splits, is_tiled=tiles > 1)
    return Plan(
        head_layout=head_layout,
        scale=scale,
        softcap=softcap,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        chunk_tokens=min(chunk_tokens, shard_tokens),
        shard_tokens=shard_tokens,
        part_tokens=part_tokens,
        axes=(*axes, CONTEXT_AXIS) if parts > 1 else axes,
        shards=shards * parts,
        parts=parts,
        vocabulary_axis=TENSOR_AXIS if splits > 1 else None,
        vocabulary=V,
        splits=splits,
        tiles=tiles,
    )


def _choose_chunk(shard_tokens: int, D: int, V: int, *, is_tiled: bool) -> int:
    # With D tokens the logits take as much memory as the float32 gradient of the head.
    tokens = max(D, MIN_BYTES // (4 * V))
    if not is_tiled:
        if current_platform() == "tpu" and 4 * shard_tokens * V <= ONE_CHUNK_BYTES:
            return shard_tokens
        tokens = min(tokens, MAX_TOKENS)
    chunks = -(-shard_tokens // tokens)  # equal ones, so that little padding fills the last
    return -(-shard_tokens // chunks // CHUNK_MULTIPLE) * CHUNK_MULTIPLE


def _count_tiles(D: int, V: int) -> int:
    if 6 * D * V <= WHOLE_BYTES:
        return 1
    counts = [n for n in range(1, V // MIN_TILE + 1) if V % n == 0]
    return next((n for n in counts if 4 * D * V // n <= TILE_BYTES), counts[-1])


def _zero_unweighted(x_ICD: Array, w_IC: Array) -> Array:
    # 0 * NaN is NaN, so a weight alone does not keep a bad row out of the head's gradient.
    return jnp.where(w_IC[..., None] != 0, x_ICD, 0)


def scale_and_cap(raw: Array, scale: float, softcap: float | None) -> Array:
    """Logits from products of hidden states and head: scaled, then capped at softcap."""
    scaled = raw * scale
    return scaled if softcap is None else softcap * jnp.tanh(scaled / softcap)


def _logits(plan: Plan, head: Array, x_ICD: Array) -> Array:
    raw_ICV = einsum(f"icd,{plan.head_layout.lower()}->icv", x_ICD, head)
    return scale_and_cap(raw_ICV, plan.scale, plan.softcap)


def _is_target(plan: Plan, logits_ICV: Array, y_IC: Array, tile: Array | int) -> Array:
    """By comparison: indexing would gather a vocabulary that is split."""
    token_ICV = lax.broadcasted_iota(jnp.int32, logits_ICV.shape, 2)
    if plan.tiles > 1:
        size = plan.vocabulary // plan.splits // plan.tiles
        token_ICV += (token_ICV // size * (plan.tiles - 1) + tile) * size
    return token_ICV == y_IC[..., None]


def _score(plan: Plan, logits_ICV: Array, y_IC: Array, tile: Array | int = 0) -> Scores:
    top_IC = logits_ICV.max(-1)
    if current_platform() == "cpu" and plan.tiles == 1 and plan.vocabulary_axis is None:
        exp_IC = _sum_exp(logits_ICV, top_IC)
        target_IC1 = jnp.take_along_axis(logits_ICV, y_IC[..., None], -1, mode="clip")
        target_IC = target_IC1[..., 0]
    else:
        exp_IC = jnp.exp(logits_ICV - top_IC[..., None]).sum(-1)
        is_target_ICV = _is_target(plan, logits_ICV, y_IC, tile)
        target_IC = jnp.where(is_target_ICV, logits_ICV, 0).sum(-1)
    return Scores(top_IC, top_IC + jnp.log(exp_IC), target_IC, logits_ICV.sum(-1))


def _sum_exp(logits_ICV: Array, top_IC: Array) -> Array:
    """Sum of exp(logits - top) over the vocabulary, a block of it at a time: of a plain sum XLA on
    CPU keeps the exponentials, in memory that it asks of the system for every chunk."""
    exp = lambda logits: jnp.exp(logits - top_IC[..., None])
    V = logits_ICV.shape[-1]
    W = min(SUM_BLOCK, V)

    def add(i, sums_ICW):
        return sums_ICW + exp(lax.dynamic_slice_in_dim(logits_ICV, i * W, W, -1))

    sums_ICW = lax.fori_loop(0, V // W, add, jnp.zeros((*top_IC.shape, W)))
    return sums_ICW.sum(-1) + exp(logits_ICV[..., V // W * W :]).sum(-1)


def _measure(plan: Plan, tiles: Array, order: Order | None, x_ISD: Array, y_IS: Array) -> Scores:
    """Of all chunks."""

    def of_tile(tile: Array | int, head: Array) -> Scores:
        head = _gather(plan, head)
        score = lambda x, y: _score(plan, _logits(plan, head, x), y, tile)
        return _scan(plan, order, lambda _, xy: (None, score(*xy)), None, (x_ISD, y_IS))[1]

    def step(sums: Scores, numbered) -> tuple[Scores, None]:
        new = of_tile(*numbered)
        top, lse = jnp.maximum(sums.top_IC, new.top_IC), jnp.logaddexp(sums.lse_IC, new.lse_IC)
        return Scores(top, lse, sums.target_IC + new.target_IC, sums.sum_IC + new.sum_IC), None

    if plan.tiles == 1:
        return of_tile(0, tiles[0])
    low, zero = jnp.full(y_IS.shape, -jnp.inf), jnp.zeros(y_IS.shape)
    return lax.scan(step, Scores(low, low, zero, zero), (jnp.arange(plan.tiles), tiles))[0]


def _pull(
    plan: Plan,
    tiles: Array,
    order: Order | None,
    x_ISD: Array,
    y_IS: Array,
    lse_IS: Array,
    w_IS: Array,
) -> tuple[Array, Array]:
    """Gradients of hidden states and head for the total loss."""
    dtype = x_ISD.dtype if plan.tiles == 1 else jnp.float32  # they are summed over the tiles

    def of_tile(tile: Array | int, head: Array) -> tuple[Array, Array]:
        head = _gather(plan, head)

        def step(d_head_sum, chunk):
            x_ICD, y_IC, lse_IC, w_IC = chunk
            logits_ICV = _logits(plan, head, x_ICD)
            d_ICV = _d_products(plan, logits_ICV, y_IC, lse_IC, w_IC, tile)
            d_hidden, d_head = _product_gradients(plan, head, x_ICD, d_ICV)
            return _add_to_head(d_head_sum, d_head), d_hidden.astype(dtype)

        chunks = x_ISD, y_IS, lse_IS, w_IS
        d_head_IDV, d_hidden = _scan(plan, order, step, _head_sums(plan, x_ISD), chunks)
        return d_hidden, _sum_shards(plan, d_head_IDV)

    def step(d_hidden_sum, numbered):
        d_hidden, d_head_DV = of_tile(*numbered)
        return d_hidden_sum + d_hidden, d_head_DV

    if plan.tiles == 1:
        d_hidden, d_head_DV = of_tile(0, tiles[0])
        d_heads = d_head_DV[None]
    else:
        start = plan.place(jnp.zeros_like(x_ISD, jnp.float32), plan.axes)
        d_hidden, d_heads = lax.scan(step, start, (jnp.arange(plan.tiles), tiles))
    return _join(plan, order, d_hidden).astype(x_ISD.dtype), _join_tiles(plan, d_heads)


def _d_products(
    plan: Plan,
    logits_ICV: Array,
    y_IC: Array,
    lse_IC: Array,
    w_IC: Array,
    tile: Array | int = 0,
) -> Array:
    """Gradient of a chunk's total with respect to its products of hidden states and head."""
    is_target_ICV = _is_target(plan, logits_ICV, y_IC, tile)
    d_ICV = _d_total(plan, logits_ICV, is_target_ICV, lse_IC, w_IC)
    if plan.softcap is not None:
        d_ICV = d_ICV * (1 - jnp.square(logits_ICV / plan.softcap))
    return d_ICV * (plan.scale * plan.lift)


def _product_gradients(plan: Plan, head: Array, x_ICD: Array, d_ICV: Array):
    """float32 gradients of a chunk's hidden states, and of the head [I, D, V], one per shard."""
    d_ICV = d_ICV.astype(x_ICD.dtype)
    d_x_ICD = einsum(f"icv,{plan.head_layout.lower()}->icd", d_ICV, head)
    d_head_IDV = einsum("icd,icv->idv", x_ICD, d_ICV)
    d_head_IDV = plan.place(d_head_IDV, plan.axes, None, plan.vocabulary_axis)
    return d_x_ICD, d_head_IDV


def _head_sums(plan: Plan, x_ISD: Array) -> Array:
    """Zeros [I, D, V], with what fills rows that are turned on one CPU."""
    V = plan.vocabulary // plan.tiles
    is_turned = plan.head_layout == "VD" and current_platform() == "cpu" and not plan.is_split
    fill = ROW_FILL if is_turned and V % ROW_MULTIPLE == 0 else 0
    sums_IDV = jnp.zeros((plan.shards, x_ISD.shape[-1], V + fill))
    return plan.place(sums_IDV, plan.axes, None, plan.vocabulary_axis)


def _add_to_head(sums_IDV: Array, d_IDV: Array) -> Array:
    """Adds to sums whose rows may be filled."""
    if sums_IDV.shape == d_IDV.shape:
        return sums_IDV + d_IDV
    V = d_IDV.shape[-1]
    return lax.dynamic_update_slice_in_dim(sums_IDV, sums_IDV[..., :V] + d_IDV, 0, axis=-1)


def _sum_shards(plan: Plan, sums_IDV: Array) -> Array:
    """[D, V], of which every device gets some of D."""
    sums_IDV = sums_IDV[..., : plan.vocabulary // plan.tiles]
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


def _put_weighted_first(plan: Plan, w_BT: Array) -> Order | None:
    """None where one chunk has them all."""
    if plan.chunks == 1:
        return None
    is_last_IS = _split_shards(plan, w_BT) == 0
    return Order(jnp.argsort(is_last_IS), (~is_last_IS).sum(-1).max())


def _scan(
    plan: Plan, order: Order | None, step: Callable, start: Any, xs_IS: Any
) -> tuple[Any, Any]:
    """As `lax.scan` over chunks of tokens, and parts of one; of what is not needed it returns 0."""
    if plan.chunks == 1:
        return step(start, xs_IS)
    C = plan.chunk_tokens

    def take(first: Array | int, size: int):
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, size, 1), xs_IS)

    def run(carry, ys_IS, size: int, first: Array | int, count: Array | int, most: int):
        def turn(state):
            i, carry, ys_IS = state
            at = first + i * size
            carry, y = step(carry, take(at, size))
            put = lambda ys_IS, y: lax.dynamic_update_slice_in_dim(ys_IS, y, at, 1)
            return i + 1, carry, jax.tree.map(put, ys_IS, y)

        # The second bound says to readers of a compiled program how many there may be.
        is_needed = lambda state: (state[0] < count) & (state[0] < most)
        return lax.while_loop(is_needed, turn, (0, carry, ys_IS))[1:]

    shapes = jax.eval_shape(lambda: step(start, take(0, C))[1])
    S = plan.chunks * C
    empty = lambda y: plan.place(jnp.zeros((y.shape[0], S, *y.shape[2:]), y.dtype), plan.axes)
    state = start, jax.tree.map(empty, shapes)
    size, part = C, C // LAST_PARTS if C % LAST_PARTS == 0 else C
    first, most = 0, plan.chunks
    # In whole parts, so that a chunk of which all are needed is run at once.
    end = -(-(plan.shard_tokens if order is None else order.needed) // part) * part
    while size >= part:
        count = (end - first) // size
        state = run(*state, size, first, count, most)
        first, size, most = first + count * size, size // 2, 1
    return state


def _split(plan: Plan, order: Order | None, *xs_BT: Array) -> tuple[Array, ...]:
    """Splits each into [I, S, ...], in this order; 0 fills the last chunk, which has no effect."""

    def split(x: Array) -> Array:
        x = _split_shards(plan, x)
        if order is not None:
            x = _take(x, order.take_IS)
        fill = plan.chunks * plan.chunk_tokens - plan.shard_tokens
        x = jnp.pad(x, ((0, 0), (0, fill), *((0, 0) for _ in x.shape[2:])))
        return plan.place(x, plan.axes)

    return tuple(split(x) for x in xs_BT)


def _join(plan: Plan, order: Order | None, x_IS: Array) -> Array:
    """The inverse of `_split`."""
    x_IS = x_IS[:, : plan.shard_tokens]
    if order is not None:
        x_IS = _take(x_IS, jnp.argsort(order.take_IS))
    t, rest = plan.part_tokens, x_IS.shape[2:]
    x = x_IS.reshape(plan.shards // plan.parts, plan.parts, -1, t, *rest).swapaxes(1, 2)
    return x.reshape(-1, plan.parts * t, *rest)


def _split_shards(plan: Plan, x_BT: Array) -> Array:
    """[I, S, ...] without a filled chunk: parts of tokens go with the parts of the batch."""
    t, rest = plan.part_tokens, x_BT.shape[2:]
    x = x_BT.reshape(plan.shards // plan.parts, -1, plan.parts, t, *rest).swapaxes(1, 2)
    return plan.place(x.reshape(plan.shards, plan.shard_tokens, *rest), plan.axes)


def _take(x_IS: Array, places_IS: Array) -> Array:
    return jax.vmap(lambda x_S, places_S: x_S[places_S])(x_IS, places_IS)
