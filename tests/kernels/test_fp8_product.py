"""Products of eight-bit floats, as CPUs emulate them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.kernels.fp8 import E4M3, E5M2, fp8_fault, fp8_product, scale_down

SHAPES = [(1, (2, 24), (48,), (2, 6)), (3, (3, 16), (2, 4, 8), (32,))]
"""contract, and the dimensions of tokens, inputs and outputs"""
E4M3_INTEGERS = [0, 1, 3, 5, 7, 11, 15, -2, -9]
E5M2_INTEGERS = [0, 1, 3, 5, 7, -2, -6]


def product_and_gradients(product, x, w, dy):
    y, pull = jax.vjp(product, x, w)
    return y, *pull(dy)


def run(contract, x, w, dy, scale=1.0, dtype=jnp.float32):
    """Of the product, and of the exact one in float64."""
    given = [jnp.asarray(a * scale, dtype) for a in (x, w, dy)]
    found = product_and_gradients(lambda x, w: fp8_product(contract, x, w), *given)
    x, w, dy = (np.asarray(a, np.float64) for a in given)
    lead, outputs = range(x.ndim - contract), range(w.ndim - contract)
    wanted = (
        np.tensordot(x, w, contract),
        np.tensordot(dy, w, [[len(lead) + n for n in outputs], [contract + n for n in outputs]]),
        np.tensordot(x, dy, [lead, lead]),
    )
    return found, wanted


@pytest.mark.parametrize("shapes", SHAPES, ids=["qkv", "out"])
def test_numbers_of_few_digits_are_multiplied_exactly(shapes):
    contract, lead, inputs, outputs = shapes
    rng = np.random.default_rng(0)
    x, w = rng.choice(E4M3_INTEGERS, lead + inputs), rng.choice(E4M3_INTEGERS, inputs + outputs)
    dy = rng.choice(E5M2_INTEGERS, lead + outputs)
    for scale in (1.0, 2.0**-60, 2.0**40):
        found, wanted = run(contract, x, w, dy, scale)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_other_numbers_lose_what_eight_bits_lose(dtype):
    """In bfloat16 too, a scale in 1e3, which float16 squares to infinity."""
    rng = np.random.default_rng(0)
    x, w, dy = (rng.normal(size=n) for n in ((64, 256), (256, 128), (64, 128)))
    found, wanted = run(1, x, w / 16, dy, scale=30.0, dtype=dtype)
    for (a, b), most in zip(zip(found, wanted, strict=True), (0.05, 0.08, 0.08), strict=True):
        assert a.dtype == dtype
        assert 0.01 < np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b) < most


def test_units_get_operands_of_eight_bits():
    x, w = jnp.ones((8, 16), jnp.bfloat16), jnp.ones((16, 32), jnp.bfloat16)
    step = lambda x, w: product_and_gradients(lambda *a: fp8_product(1, *a), x, w, x @ w)
    text = jax.jit(step).lower(x, w).as_text()
    dots = re.findall(r"dot_general .*xf(\w+)>, .*xf(\w+)>\) -> .*xbf16>", text)
    e4m3, e5m2 = "8E4M3FN", "8E5M2"
    assert {(e4m3, e4m3), (e5m2, e4m3), (e4m3, e5m2)} <= set(dots)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_what_is_not_finite_stays_so_and_zero_is_zero(dtype):
    for odd in (jnp.inf, -jnp.inf, jnp.nan):
        numbers = scale_down(jnp.array([1.0, odd]), dtype).numbers
        assert not np.isfinite(np.asarray(numbers, np.float32)[1])
    tiny = scale_down(jnp.array([0.0, 1e-37]), dtype)
    assert np.isfinite(np.asarray(tiny.numbers, np.float32)).all()


@pytest.mark.parametrize(
    ("device", "is_refused"),
    [
        (("cpu", "cpu", None), False),
        (("gpu", "NVIDIA H200", "9.0"), False),
        (("gpu", "NVIDIA L4", "8.9"), False),
        (("gpu", "NVIDIA B200", "10.0"), False),
        (("gpu", "NVIDIA A100-SXM4-80GB", "8.0"), True),
        (("gpu", "AMD Instinct MI300X", "gfx942"), True),
        (("tpu", "TPU7x", None), False),
        (("tpu", "TPU v5 lite", None), True),
        (("tpu", "TPU v6 lite", None), True),
        (("metal", "Apple M3", None), True),
    ],
)
def test_devices_without_units_are_refused_by_name(device, is_refused):
    fault = fp8_fault(*device)
    assert bool(fault) == is_refused and (not fault or repr(device[1]) in fault)
