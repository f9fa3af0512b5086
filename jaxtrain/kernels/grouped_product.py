"""The product of groups of rows with a matrix of each group.

TPU has a kernel for it, `lax.ragged_dot`, which elsewhere multiplies every row with every matrix.
There a loop goes over the tiles of the rows, once for each group that has rows in a tile: as much
work as one product of all rows, and at most a tile more for each group.

R rows, E groups, K columns of the rows, M columns of the product, t rows of a tile, V visits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

SMALLEST_TILE, LARGEST_TILE = 32, 512  # rows


class Visits(NamedTuple):
    """The tiles in the order in which they are visited, and the rows that count each time."""

    group_V: Array
    start_V: Array
    """first row of the tile"""
    first_V: Array
    """first row of the group"""
    end_V: Array


@jax.custom_vjp
def grouped_product(x_RK: Array, w_EKM: Array, sizes_E: Array) -> Array:
    """Multiplies the first sizes[0] rows with w[0], the next with w[1], and so on: [R, M] in the
    dtype of x, 0 in rows of no group."""
    return lax.platform_dependent(x_RK, w_EKM, sizes_E, tpu=_by_kernel, default=_by_tiles)


def _fwd(x_RK: Array, w_EKM: Array, sizes_E: Array) -> tuple[Array, tuple[Array, ...]]:
    return grouped_product(x_RK, w_EKM, sizes_E), (x_RK, w_EKM, sizes_E)


def _bwd(saved: tuple[Array, ...], dy_RM: Array) -> tuple[Array, Array, None]:
    dx_RK, dw_EKM = lax.platform_dependent(
        *saved, dy_RM, tpu=_backward_by_kernel, default=_backward_by_tiles
    )
    return dx_RK, dw_EKM, None


grouped_product.defvjp(_fwd, _bwd)


def _by_kernel(x_RK: Array, w_EKM: Array, sizes_E: Array) -> Array:
    y_RM = lax.ragged_dot(x_RK, w_EKM, sizes_E)
    # What the kernel leaves in rows of no group is undefined.
    return jnp.where((jnp.arange(len(x_RK)) < sizes_E.sum())[:, None], y_RM, 0)


def _backward_by_kernel(
    x_RK: Array, w_EKM: Array, sizes_E: Array, dy_RM: Array
) -> tuple[Array, Array]:
    return jax.vjp(lambda x, w: _by_kernel(x, w, sizes_E), x_RK, w_EKM)[1](dy_RM)


def _by_tiles(x_RK: Array, w_EKM: Array, sizes_E: Array) -> Array:
    tile, visits = _visits(len(x_RK), sizes_E)

    def visit(y_RM: Array, one: Visits) -> tuple[Array, None]:
        part_tM = _rows(x_RK, one, tile) @ w_EKM[one.group_V]
        return _add_rows(y_RM, part_tM, one), None

    empty_RM = jnp.zeros((-(-len(x_RK) // tile) * tile, w_EKM.shape[-1]), x_RK.dtype)
    return lax.scan(visit, empty_RM, visits)[0][: len(x_RK)]


def _backward_by_tiles(
    x_RK: Array, w_EKM: Array, sizes_E: Array, dy_RM: Array
) -> tuple[Array, Array]:
    tile, visits = _visits(len(x_RK), sizes_E)
    dx_RK = _by_tiles(dy_RM, w_EKM.swapaxes(1, 2), sizes_E)

    def visit(dw_EKM: Array, one: Visits) -> tuple[Array, None]:
        # The rows of other groups are 0 in the one, whatever they are in the other.
        x_tK, dy_tM = _rows(x_RK, one, tile), _rows(dy_RM, one, tile)
        part_KM = jnp.matmul(x_tK.T, dy_tM, preferred_element_type=jnp.float32)
        return dw_EKM.at[one.group_V].add(part_KM), None

    zeros_EKM = jnp.zeros(w_EKM.shape, jnp.float32)
    return dx_RK, lax.scan(visit, zeros_EKM, visits)[0].astype(w_EKM.dtype)


def _visits(rows: int, sizes_E: Array) -> tuple[int, Visits]:
    """The size of a tile, about that of a group, and the visits, of which the last may be empty."""
    E = len(sizes_E)
    tile = 1 << (max(rows // E, 1) - 1).bit_length()
    tile = min(max(tile, SMALLEST_TILE), LARGEST_TILE)
    ends_E = jnp.cumsum(sizes_E)
    firsts_E = ends_E - sizes_E
    tiles_E = jnp.where(sizes_E > 0, (ends_E - 1) // tile - firsts_E // tile + 1, 0)
    last_E = jnp.cumsum(tiles_E)
    number_V = jnp.arange(-(-rows // tile) + E - 1)
    group_V = jnp.minimum(jnp.searchsorted(last_E, number_V, side="right"), E - 1)
    start_V = firsts_E[group_V] // tile + number_V - (last_E - tiles_E)[group_V]
    return tile, Visits(group_V, start_V * tile, firsts_E[group_V], ends_E[group_V])


def _rows(x_RK: Array, one: Visits, tile: int) -> Array:
    """A tile of the rows, 0 in those of other groups."""
    row_t = one.start_V + jnp.arange(tile)
    x_tK = x_RK.at[row_t].get(mode="fill", fill_value=0)
    return jnp.where(((row_t >= one.first_V) & (row_t < one.end_V))[:, None], x_tK, 0)


def _add_rows(y_RM: Array, part_tM: Array, one: Visits) -> Array:
    start = jnp.minimum(one.start_V, len(y_RM) - len(part_tM))  # of an empty visit at the end
    old_tM = lax.dynamic_slice_in_dim(y_RM, start, len(part_tM))
    return lax.dynamic_update_slice_in_dim(y_RM, old_tM + part_tM, start, 0)
