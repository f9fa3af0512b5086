"""Products on CPU: the same numbers in every form, and TPU and GPU run what was written."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractDevice, AbstractMesh

from jaxtrain.kernels.product import (
    einsum,
    from_bits,
    keep,
    multiply,
    multiply_transposed,
    to_bits,
)
from tests.runs import mesh_of

PRODUCTS = {  # dimensions of x and y, and those that are contracted
    "q, k and v": ((2, 24, 48), (48, 3, 5, 16), (2,), (0,)),
    "back to the width": ((2, 24, 3, 4, 16), (3, 4, 16, 40), (2, 3, 4), (0, 1, 2)),
    "gradient of the input": ((2, 24, 3, 5, 16), (48, 3, 5, 16), (2, 3, 4), (1, 2, 3)),
    "gradient of a weight": ((48, 40), (48, 3, 5, 16), (0,), (0,)),
    "of a joined weight": ((48, 3, 16), (48, 40), (0,), (0,)),
    "thin": ((1, 7, 40), (40, 3), (2,), (0,)),
    "one row": ((1, 1, 40), (40, 2, 33), (2,), (0,)),
}
SUMS = {
    "logits": ("icd,dv->icv", (1, 24, 40), (40, 65)),
    "logits of a tied head": ("icd,vd->icv", (1, 24, 40), (65, 40)),
    "gradient of hidden states": ("icv,vd->icd", (1, 24, 65), (65, 40)),
    "gradient of the head": ("icd,icv->idv", (1, 24, 40), (1, 24, 65)),
    "of the head by shards": ("icd,icv->idv", (2, 24, 40), (2, 24, 65)),
}
TRANSPOSED = "...sr,...sh->...rh", (2, 3, 24, 40), (2, 3, 24, 16)
CPU, TWO = mesh_of(), mesh_of(data=2)


def operands(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]


def plain(x_dims, y_dims):
    return partial(lax.dot_general, dimension_numbers=((x_dims, y_dims), ((), ())))


def in_float64(product, *arrays):
    with jax.enable_x64(True):
        return np.asarray(product(*(np.asarray(a, np.float64) for a in arrays)))


def compiled(function, *arrays, mesh=CPU):
    with jax.set_mesh(mesh):
        return jax.jit(lambda *arrays: function(*arrays)).lower(*arrays).compile()


def test_what_is_turned_on_cpu_is_made_before():
    """XLA would read what it is made of in the order of the result, which is slow."""
    x, dy = operands((48, 40), (48, 24))
    program = compiled(lambda x, dy: multiply(x * jnp.tanh(x), dy, (0,), (0,)), x, dy)
    loops = [part for part in program.as_text().split("\n\n") if " transpose(" in part]
    assert loops and not any(" tanh(" in part for part in loops)


@pytest.mark.parametrize(("x", "y", "x_dims", "y_dims"), PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_is_rounded_once(x, y, x_dims, y_dims):
    arrays, written = operands(x, y), plain(x_dims, y_dims)
    exact = in_float64(written, *arrays)
    program = compiled(partial(multiply, x_dims=x_dims, y_dims=y_dims), *arrays)
    found = program(*arrays)
    assert found.dtype == jnp.bfloat16 and found.shape == exact.shape
    error = lambda a: np.abs(np.asarray(a, np.float64) - exact)
    assert (error(found) <= 2.0**-8 * np.abs(exact) + 1e-4).all()
    assert error(found).sum() <= error(jax.jit(written)(*arrays)).sum() * 1.001


@pytest.mark.parametrize(
    ("spec", "x", "y"), [*SUMS.values(), TRANSPOSED], ids=[*SUMS, "gradient of queries"]
)
def test_a_sum_is_float32(spec, x, y):
    arrays = operands(x, y)
    exact = in_float64(partial(jnp.einsum, spec), *arrays)
    called = multiply_transposed if spec == TRANSPOSED[0] else partial(einsum, spec)
    found = compiled(called, *arrays)(*arrays)
    assert found.dtype == jnp.float32 and found.shape == exact.shape
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("turn", [False, True])
def test_queries_get_their_gradient_from_the_unit(turn):
    """However the result is used: XLA would convert the operands, or refuse the product."""
    spec, *shapes = TRANSPOSED
    arrays = operands(*shapes)
    used = lambda x: x.swapaxes(-1, -2) if turn else x
    program = compiled(lambda x, y: used(multiply_transposed(x, y)), *arrays)
    exact = used(in_float64(partial(jnp.einsum, spec), *arrays))
    np.testing.assert_allclose(program(*arrays), exact, rtol=1e-5, atol=1e-4)
    assert not re.search(r"f32\[2,3,24,(40|16)\]", program.as_text())


def pairs():
    """What is called and what it says, and the shapes of its operands."""
    for x, y, x_dims, y_dims in PRODUCTS.values():
        yield partial(multiply, x_dims=x_dims, y_dims=y_dims), plain(x_dims, y_dims), x, y
    for spec, x, y in SUMS.values():
        if x[0] == 1:
            said = partial(jnp.einsum, spec, preferred_element_type=jnp.float32)
            yield partial(einsum, spec), said, x, y
    spec, x, y = TRANSPOSED
    said = partial(jnp.einsum, spec, preferred_element_type=jnp.float32)
    yield multiply_transposed, said, x, y


def lowered(function, *arrays, mesh):
    is_abstract = isinstance(mesh, AbstractMesh)
    with jax.sharding.use_abstract_mesh(mesh) if is_abstract else jax.set_mesh(mesh):
        traced = jax.jit(lambda *arrays: function(*arrays)).trace(*arrays)
        device = mesh.abstract_mesh.abstract_device
        return traced.lower(lowering_platforms=(device.platform,)).as_text()


def abstract(platform):
    device = AbstractDevice(device_kind="one", num_cores=None, platform=platform)
    return AbstractMesh((1,), ("data",), abstract_device=device)


MESHES = {"tpu": abstract("tpu"), "cuda": abstract("cuda"), "cpu": CPU, "two": TWO}


@pytest.mark.parametrize("place", MESHES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float16])
def test_only_one_cpu_runs_another_program(place, dtype):
    for called, said, *shapes in pairs():
        arrays = [a.astype(dtype) for a in operands(*shapes)]
        found, expected = (lowered(f, *arrays, mesh=MESHES[place]) for f in (called, said))
        is_multiply = getattr(called, "func", None) is multiply
        if place != "cpu" or dtype == jnp.float16 or (dtype == jnp.float32 and not is_multiply):
            assert found == expected
        elif dtype == jnp.bfloat16:
            assert found != expected and re.search(r"contracting_dims = \[[13]\] x", found)
        else:
            assert re.search(r"contracting_dims = \[[01]\] x \[[01]\]", found)


def test_float32_weights_are_not_turned_in_memory_on_cpu():
    dy, w = (a.astype(jnp.float32) for a in operands((64, 2, 96), (5, 48, 2, 96)))

    def through_layers(multiply):
        widen = lambda dx: jnp.pad(dx, ((0, 0), (0, 144))).reshape(dy.shape)
        step = lambda dy, w: (widen(multiply(dy, w, (1, 2), (1, 2))), None)
        return lambda dy, w: lax.scan(step, dy, w)[0]

    text = compiled(through_layers(multiply), dy, w).as_text()
    as_written = lambda x, y, *dims: plain(*dims)(x, y)
    assert "f32[192,48]" not in text
    assert "f32[192,48]" in compiled(through_layers(as_written), dy, w).as_text()


def gradient(x, w, *, keep):
    """Of a loop over layers that keep their products."""
    policy = jax.checkpoint_policies.save_only_these_names("product")

    @partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def layer(x, w):
        return jnp.sin(keep(multiply(x, w, (1,), (0,)), "product"))[:, : x.shape[1]]

    return jax.grad(lambda w: lax.scan(lambda x, w: (layer(x, w), None), x, w)[0].sum())(w)


@pytest.mark.parametrize("mesh", [CPU, TWO], ids=["one device", "two"])
def test_what_is_kept_of_bfloat16_has_the_gradient_of_what_is_not(mesh):
    arrays = operands((24, 40), (5, 40, 56))
    found, expected = (
        compiled(partial(gradient, keep=keep), *arrays, mesh=mesh)(*arrays)
        for keep in (keep, checkpoint_name)
    )
    np.testing.assert_array_equal(np.float32(found), np.float32(expected))
    assert np.abs(np.float32(found)).max() > 1


def test_a_loop_on_cpu_does_not_convert_the_stack_of_what_layers_keep():
    arrays, stack = operands((24, 40), (5, 40, 56)), "f32[5,24,56]"
    assert stack not in compiled(partial(gradient, keep=keep), *arrays).as_text()
    if jax.__version_info__ < (0, 12):  # whose compiler does so no longer
        assert stack in compiled(partial(gradient, keep=checkpoint_name), *arrays).as_text()


def gradient_by_inputs(x, w, *, read):
    """Of a loop over layers that keep their inputs."""
    layer = jax.checkpoint(
        lambda x, bits, w: jnp.sin(multiply(read(x, bits), w, (1,), (0,))), prevent_cse=False
    )
    step = lambda x, w: (layer(x, to_bits(x), w), None)
    return jax.grad(lambda x, w: lax.scan(step, x, w)[0].sum(), (0, 1))(x, w)


@pytest.mark.parametrize("mesh", [CPU, TWO], ids=["one device", "two"])
def test_an_input_that_is_kept_as_bits_has_its_gradient(mesh):
    arrays, stack = operands((24, 40), (5, 40, 40)), "f32[5,24,40]"
    plainly = partial(gradient_by_inputs, read=lambda x, bits: x)
    programs = [
        compiled(f, *arrays, mesh=mesh)
        for f in (partial(gradient_by_inputs, read=from_bits), plainly)
    ]
    found, expected = (program(*arrays) for program in programs)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.float32(a), np.float32(b))
        assert np.abs(np.float32(a)).max() > 1
    if mesh is CPU:
        assert stack not in programs[0].as_text()
        if jax.__version_info__ < (0, 12):
            assert stack in programs[1].as_text()
