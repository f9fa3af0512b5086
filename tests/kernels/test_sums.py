"""Sums over devices: each has its part of the same numbers that one device has."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice
from jax.sharding import PartitionSpec as P

from jaxtrain.kernels.sums import SHARED_BY_ALL, scatter_groups, weight_gradient
from jaxtrain.model.layers import dense
from tests.runs import mesh_of


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("most", [2, 4, 8])
def test_a_sum_is_scattered_in_one_step_or_in_two(most):
    x = draw(8, 16, 3)

    @partial(jax.shard_map, in_specs=P("fsdp"), out_specs=P("fsdp"), axis_names={"fsdp"})
    def scatter(part):
        part = part[0]
        for groups in scatter_groups(8, most):
            part = lax.psum_scatter(part, "fsdp", axis_index_groups=groups, tiled=True)
        return part

    with jax.set_mesh(mesh_of(fsdp=8)):
        np.testing.assert_allclose(jax.jit(scatter)(x), x.sum(0), rtol=1e-5, atol=1e-5)
    assert len(list(scatter_groups(8, most))) == (1 if most == 8 else 2)
    assert list(scatter_groups(7, most)) == [None]


@pytest.mark.parametrize(
    ("sizes", "width", "shared"),
    [
        ({"fsdp": 4, "tensor": 2}, 16, ("fsdp",)),
        ({"data": 2, "fsdp": 2, "context": 2}, 16, ("fsdp", "data", "context")),
        ({"data": 2, "fsdp": 4}, 12, ("fsdp",)),
        ({"data": 2, "expert": 4}, 10, ("data",)),
        ({"fsdp": 8}, 9, ()),
    ],
    ids=str,
)
def test_a_weight_gradient_is_the_sum_over_all_tokens(sizes, width, shared):
    x, dy = draw(8, 16, width), draw(8, 16, 2, 6)
    with jax.set_mesh(mesh_of(**sizes)):
        found = jax.jit(partial(weight_gradient, places=(SHARED_BY_ALL, None, "tensor")))(x, dy)
        turned = jax.jit(partial(weight_gradient, places=(None, "tensor", SHARED_BY_ALL)))(dy, x)
    expected = np.einsum("btd,btuf->duf", x, dy)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(turned, expected.transpose(1, 2, 0), atol=1e-4)
    for array, dim in ((found, 0), (turned, 2)):
        placed = (*array.sharding.spec, None, None, None)[dim]
        assert (placed or ()) in (shared, *shared)


def test_bfloat16_is_summed_in_float32():
    """Over all devices and tokens: a bfloat16 sum of so many ones would stop at 256."""
    x, dy = jnp.ones((8, 512, 8), jnp.bfloat16), jnp.ones((8, 512, 1), jnp.bfloat16)
    x = x.at[0, 0].set(3)
    gradient = jax.jit(partial(weight_gradient, places=(SHARED_BY_ALL, None)))
    with jax.set_mesh(mesh := mesh_of(fsdp=8)):
        found = gradient(x, dy)
    assert found.dtype == jnp.float32 and np.all(np.asarray(found) == 8 * 512 + 2)
    tpu = AbstractDevice(device_kind="one", num_cores=None, platform="tpu")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh.update(abstract_device=tpu)):
        said = str(jax.make_jaxpr(gradient)(x, dy))  # where operands stay in bfloat16
    assert "preferred_element_type=float32" in said


def test_the_gradient_of_a_bias_is_summed_in_float32():
    """Of what each device has, 1 + 1/256, bfloat16 would leave 1."""
    x, w = jnp.zeros((8, 2, 4), jnp.bfloat16), jnp.zeros((4, 3))
    dy = jnp.ones((8, 2, 3), jnp.bfloat16).at[:, 1].set(2.0**-8)

    @jax.jit
    def pull(x, dy):
        return jax.vjp(lambda bias: dense(x, w, bias), jnp.zeros(3))[1](dy)[0]

    with jax.set_mesh(mesh := mesh_of(fsdp=8)):
        x, dy = jax.device_put((x, dy), jax.NamedSharding(mesh, P("fsdp")))
        np.testing.assert_array_equal(pull(x, dy), 8 + 2.0**-5)
