"""Both ways of multiplying groups of rows, against a loop over the groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.kernels import grouped_product as grouped

WAYS = {
    "tiles": (grouped._by_tiles, grouped._backward_by_tiles),
    "kernel": (grouped._by_kernel, grouped._backward_by_kernel),
    "chosen": (
        grouped.grouped_product,
        lambda x, w, sizes, dy: jax.vjp(lambda x, w: grouped.grouped_product(x, w, sizes), x, w)[1](
            dy
        ),
    ),
}
SIZES = {
    "even": [40] * 5,
    "one has all": [0, 0, 200, 0, 0],
    "some have none": [0, 1, 99, 0, 100],
    "rows of no group": [3, 31, 32, 33, 1],
    "no row": [0] * 5,
    "first and last alone": [1, 0, 0, 0, 199],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("way", WAYS)
def test_each_group_is_multiplied_with_its_matrix_forward_and_backward(way, sizes):
    rows = 217  # fill no whole number of tiles
    forward, backward = map(jax.jit, WAYS[way])
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (rows, 6)), jax.random.normal(keys[1], (5, 6, 9))
    dy = jax.random.normal(keys[2], (rows, 9))

    def definition(x, w):
        ends = np.cumsum(sizes)
        parts = [
            x[end - n : end] @ w[e] for e, (n, end) in enumerate(zip(sizes, ends, strict=True))
        ]
        return jnp.concatenate([*parts, jnp.zeros((rows - sum(sizes), 9))])

    expected, back = jax.vjp(definition, x, w)
    sizes_E = jnp.array(sizes)
    np.testing.assert_allclose(forward(x, w, sizes_E), expected, atol=1e-5)
    for one, other in zip(backward(x, w, sizes_E, dy), back(dy), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_gradients_of_bfloat16_are_summed_in_float32():
    """Of a tile of ones, then four tiles with a one each, which a sum in bfloat16 would lose."""
    rows = np.arange(5 * grouped.LARGEST_TILE)
    is_one = (rows < grouped.LARGEST_TILE) | (rows % grouped.LARGEST_TILE == 0)
    x, dy = jnp.ones((len(rows), 2)), jnp.repeat(1.0 * is_one[:, None], 3, axis=1)
    w, sizes = jnp.zeros((2, 2, 3), jnp.bfloat16), jnp.array([len(rows), 0])
    _, dw = jax.jit(grouped._backward_by_tiles)(
        x.astype(w.dtype), w, sizes, jnp.asarray(dy, w.dtype)
    )
    np.testing.assert_array_equal(dw[0].astype(jnp.float32), grouped.LARGEST_TILE + 4)
