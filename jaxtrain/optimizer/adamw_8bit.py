"""AdamW whose moments are kept in eight bits, with the numbers, blocks and exceptions of
bitsandbytes (Dettmers et al. 2022, arXiv:2110.02861).

A moment of a matrix is codes of its shape and a float32 scale for each block: the largest magnitude
of 256 neighbours, the last block shorter. Codes are rounded after the update, which is that of
AdamW. Float32 stay the moments of embeddings, and of parameters with fewer than 4096 entries a
layer.

Where bitsandbytes cuts a tensor of a layer by inputs of one output and then goes on with the next,
a block here lies along the side of a matrix that `fsdp` does not cut, within one entry of the other
side. So `data` and `fsdp` need no communication for it, and no mesh changes a block.
"""

import re
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax import GradientTransformation, ScaleByAdamState

from jaxtrain.optimizer.optimizers import OptimizerFactory, descend
from jaxtrain.parallel.sharding import PARAMETERS, path_name
from jaxtrain.recipe.optimizer import AdamW8bitConfig

BLOCK = 256  # entries that share a scale
MIN_ENTRIES = 4096  # of one layer, for eight bits
TINY = 1e-38  # scale below which a block counts as zero
ZERO = 127  # code of 0 among signed numbers
DECADES = 7  # powers of ten that codes reach down; each has twice as many codes as the one below


class AdamW8bitFactory(OptimizerFactory):
    name = "adamw_8bit"
    config: AdamW8bitConfig

    def create_optimizer(
        self, model: Any, optimizer_config: AdamW8bitConfig
    ) -> GradientTransformation:
        adam = optax.scale_by_adam(*optimizer_config.betas, eps=optimizer_config.eps)
        return descend(optimizer_config, keep_in_8_bits(adam))


class Codes(NamedTuple):
    """A moment of a parameter."""

    codes: Array
    """uint8, of the parameter's shape"""
    scales: Array
    """float32: of each block, which is one entry of the first of its dimensions"""


def keep_in_8_bits(adam: GradientTransformation) -> GradientTransformation:
    """The same optimizer, with its moments rounded between updates."""

    def init(params: Any) -> ScaleByAdamState:
        def zeros(path: Any, x: Array) -> Array | Codes:
            dims = block_dims(path_name(path), x.shape)
            if not dims:
                return jnp.zeros_like(x)
            return Codes(jnp.zeros(x.shape, jnp.uint8), jnp.zeros(_scales_shape(x.shape, dims)))

        moments = (jax.tree_util.tree_map_with_path(zeros, params) for _ in range(2))
        return ScaleByAdamState(jnp.int32(0), *moments)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ScaleByAdamState]:
        mu, nu = _read(state.mu, is_signed=True), _read(state.nu, is_signed=False)
        updates, after = adam.update(updates, ScaleByAdamState(state.count, mu, nu), params)
        assert isinstance(after, ScaleByAdamState)
        mu, nu = _round(after.mu, is_signed=True), _round(after.nu, is_signed=False)
        return updates, ScaleByAdamState(after.count, mu, nu)

    return GradientTransformation(init, update)


def block_dims(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The neighbouring dimensions of a parameter that are cut into blocks as if they were one; none
    where the moments stay float32."""
    axes = next((axes for row, axes in PARAMETERS if re.fullmatch(row, name)), ())
    lead = [dim for dim, axis in enumerate(axes) if axis in ("layers", "experts")]
    inner = [dim for dim in range(len(shape)) if dim not in lead]
    if name.startswith("embed/") or prod(shape[dim] for dim in inner) < MIN_ENTRIES:
        return ()
    runs: list[list[int]] = []
    for dim in inner:
        axis = axes[dim] if dim < len(axes) else None
        if axis == "embed":
            continue
        # One that is cut has those behind it in its parts; one before it would be cut up by it.
        if axis is None and runs and runs[-1][-1] == dim - 1:
            runs[-1].append(dim)
        else:
            runs.append([dim])
    last = runs[-1] if runs else inner
    return tuple(last if prod(shape[dim] for dim in last) >= BLOCK else inner)


def _read(tree: Any, *, is_signed: bool) -> Any:
    """The moments in float32."""

    def read(path: Any, x: Array | Codes) -> Array:
        if not isinstance(x, Codes):
            return x
        shape = x.codes.shape
        dims = block_dims(path_name(path), shape)
        numbers = decode(_cut(x.codes, dims), is_signed=is_signed)
        scales = x.scales.reshape(*numbers.shape[: dims[0] + 1], 1, *numbers.shape[dims[0] + 2 :])
        return _join(numbers * scales, shape, dims)

    return jax.tree_util.tree_map_with_path(read, tree, is_leaf=lambda x: isinstance(x, Codes))


def _round(tree: Any, *, is_signed: bool) -> Any:
    def round_one(path: Any, x: Array) -> Array | Codes:
        dims = block_dims(path_name(path), x.shape)
        if not dims:
            return x
        blocks = _cut(x, dims)
        scales = jnp.abs(blocks).max(dims[0] + 1, keepdims=True)
        codes = encode(blocks * (1 / jnp.maximum(scales, TINY)), is_signed=is_signed)
        return Codes(_join(codes, x.shape, dims), scales.reshape(_scales_shape(x.shape, dims)))

    return jax.tree_util.tree_map_with_path(round_one, tree)


def _scales_shape(shape: tuple[int, ...], dims: tuple[int, ...]) -> tuple[int, ...]:
    """That of the scales of a parameter: as many dimensions, so that a mesh cuts both alike."""
    num_blocks = -(-_size(shape, dims) // BLOCK)
    return *shape[: dims[0]], num_blocks, *(1,) * (len(dims) - 1), *shape[dims[-1] + 1 :]


def _size(shape: tuple[int, ...], dims: tuple[int, ...]) -> int:
    return prod(shape[dim] for dim in dims)


def _cut(x: Array, dims: tuple[int, ...]) -> Array:
    """With [blocks, BLOCK] in the place of these dimensions, filled up with zeros."""
    before, size, behind = x.shape[: dims[0]], _size(x.shape, dims), x.shape[dims[-1] + 1 :]
    x = x.reshape(*before, size, *behind)
    x = jnp.pad(x, [(0, -size % BLOCK if dim == dims[0] else 0) for dim in range(x.ndim)])
    return x.reshape(*before, -1, BLOCK, *behind)


def _join(blocks: Array, shape: tuple[int, ...], dims: tuple[int, ...]) -> Array:
    """The array of this shape that was cut."""
    before, behind = shape[: dims[0]], shape[dims[-1] + 1 :]
    joined = blocks.reshape(*before, -1, *behind)
    return jax.lax.slice_in_dim(joined, 0, _size(shape, dims), axis=dims[0]).reshape(shape)


# The numbers: 0, 1, and between them, in each power of ten, the centres of equal parts of [0.1, 1],
# of which the lowest power has `parts`: 1 of signed numbers, 2 of others. They are computed, since
# a table is slow to read on TPU.


def decode(codes: Array, *, is_signed: bool) -> Array:
    """The numbers from -1, or from 0, to 1 that uint8 codes stand for, in their order; float32."""
    index = codes.astype(jnp.float32)
    if not is_signed:
        return _number(index, parts=2)
    return jnp.sign(index - ZERO) * _number(jnp.abs(index - ZERO), parts=1)


def encode(x: Array, *, is_signed: bool) -> Array:
    """The codes of the numbers nearest to x."""
    size, parts = jnp.minimum(jnp.abs(x), 1), 1 if is_signed else 2
    powers = [10.0 ** (k - DECADES) for k in range(DECADES)]
    count, power = _decade(size, powers, parts)
    part = jnp.clip(jnp.floor((size / power - 0.1) * (count / 0.9)), 0, count - 1)
    index = count + part - (parts - 1)
    # The nearest centre may be that of the part beside it, where that has another width.
    below, number, above = (_number(index + n, parts=parts) for n in (-1, 0, 1))
    index += (size > (number + above) / 2).astype(jnp.float32)
    index -= (size <= (below + number) / 2).astype(jnp.float32)
    if is_signed:
        index = ZERO + jnp.where(x < 0, -jnp.minimum(index, ZERO), index)  # there is no -1
    return index.astype(jnp.uint8)


def _number(index: Array, *, parts: int) -> Array:
    """The number that is so many steps above 0."""
    place = index + (parts - 1)  # those of a decade begin at its count
    count, power = _decade(place, [parts * 2.0**k for k in range(DECADES)], parts)
    number = power * (0.1 + (place - count + 0.5) * (0.9 / count))
    return jnp.where(index <= 0, 0.0, jnp.where(place >= parts * 2.0**DECADES, 1.0, number))


def _decade(x: Array, begins: list[float], parts: int) -> tuple[Array, Array]:
    """Into how many parts the power of ten is cut that x is in, and that power."""
    count, power = jnp.full_like(x, parts), jnp.full_like(x, 10.0 ** (1 - DECADES))
    for k, begin in enumerate(begins):
        count = jnp.where(x >= begin, parts * 2.0**k, count)
        power = jnp.where(x >= begin, 10.0 ** (k + 1 - DECADES), power)
    return count, power
