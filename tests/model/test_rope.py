"""Rotation by a product is rotation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxtrain.model.rope import Rotation, rotate, rotate_by_product

B, T, K, G, H = 2, 7, 2, 3, 16


def case(R):
    rng = np.random.default_rng(R)
    x, dy = (jnp.asarray(rng.normal(size=(B, T, K, G, H)), jnp.bfloat16) for _ in range(2))
    angles = jnp.asarray(rng.uniform(0, 100, (B, T, 1, 1, R)), jnp.float32)
    return x, dy, Rotation(1.3 * jnp.cos(angles), 1.3 * jnp.sin(angles), None)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("R", [H // 2, 3])
def test_a_rotation_by_a_product_and_its_gradient(R, interleaved):
    x, dy, rotation = case(R)
    expected, pull = jax.vjp(lambda x: rotate(x, rotation, interleaved=interleaved), x)
    found, own_pull = jax.vjp(lambda x: rotate_by_product(interleaved, x, *rotation[:2]), x)
    for a, b in ((expected, found), (*pull(dy), *own_pull(dy))):
        assert a.dtype == b.dtype == jnp.bfloat16
        # Both round the same sum of two products, which may be fused, once.
        a, b = (np.asarray(one, np.float32) for one in (a, b))
        np.testing.assert_allclose(b, a, rtol=2**-7, atol=1e-6)
        assert (a == b).mean() > 0.99


@pytest.mark.parametrize(
    ("platform", "dtype", "is_product"),
    [
        ("tpu", jnp.bfloat16, True),
        ("tpu", jnp.float32, False),
        ("cpu", jnp.bfloat16, True),
        ("cpu", jnp.float32, False),
        ("gpu", jnp.bfloat16, False),
    ],
)
def test_tpu_and_cpu_rotate_bfloat16_by_a_product(platform, dtype, is_product):
    x, _, rotation = case(H // 2)
    x = x.astype(dtype)
    device = AbstractDevice(device_kind="of a test", num_cores=None, platform=platform)
    mesh = AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.make_jaxpr(lambda x: rotate(x, rotation, interleaved=False))(x)
    assert ("dot_general" in str(traced)) == is_product
