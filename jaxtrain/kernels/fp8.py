"""Products whose operands are rounded to eight-bit floats (Micikevicius et al. 2022,
arXiv:2209.05433): e4m3 forward, e5m2 for the gradient of the result.

Each operand has one scale, of what it holds now, so there is no state. It is a power of two, which
changes no digit: a result in bfloat16 is rounded once.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxtrain.kernels.axes import has_capability

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
LARGEST = {E4M3: 8, E5M2: 15}
"""The exponent of the power of two that the largest entry is brought below."""
OLDEST_CAPABILITY = 8.9
SMALLEST = -100  # exponent of entries that are kept apart from 0

Dims = tuple[int, ...]


def fp8_fault(platform: str, kind: str, capability: str | None) -> str | None:
    """Why a device is no faster with these; None where it is, or only emulates it, as CPUs do."""
    has_units = {
        "cpu": True,
        "gpu": has_capability(capability, OLDEST_CAPABILITY),
        "tpu": not kind.startswith("TPU v"),  # v6e takes as long for them as for bfloat16
    }
    if has_units.get(platform, False):
        return None
    needs = f"an NVIDIA GPU of compute capability {OLDEST_CAPABILITY} or newer, or a TPU7x"
    return f"fp8 needs {needs}, found {kind!r}; remove it"


class Scaled(NamedTuple):
    """An array divided by 2^exponent."""

    numbers: Array
    exponent: Array
    """int32 []"""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def fp8_product(contract: int, x: Array, w: Array) -> Array:
    """Product over the last `contract` dimensions of x and the first of w, in the dtype of x."""
    return _forward(contract, x, w)[0]


def _forward(contract: int, x: Array, w: Array) -> tuple[Array, tuple[Scaled, Scaled]]:
    x8, w8 = scale_down(x, E4M3), scale_down(w, E4M3)
    first = x.ndim - contract
    y = _multiply(x8, w8, tuple(range(first, x.ndim)), tuple(range(contract)), x.dtype)
    return y, (x8, w8)


def _backward(contract: int, saved: tuple[Scaled, Scaled], dy: Array) -> tuple[Array, Array]:
    (x8, w8), dy8 = saved, scale_down(dy, E5M2)
    lead = tuple(range(x8.numbers.ndim - contract))
    outputs = tuple(range(len(lead), dy.ndim))
    dx = _multiply(dy8, w8, outputs, tuple(range(contract, w8.numbers.ndim)), dy.dtype)
    return dx, _multiply(x8, dy8, lead, lead, dy.dtype)


fp8_product.defvjp(_forward, _backward)


def scale_down(x: Array, dtype: DTypeLike) -> Scaled:
    """Infinities and NaN stay what they are, or become NaN."""
    _, exponent = jnp.frexp(jnp.abs(x).max().astype(jnp.float32))
    exponent = jnp.maximum(exponent, SMALLEST) - LARGEST[dtype]
    return Scaled((x.astype(jnp.float32) * _power(-exponent)).astype(dtype), exponent)


def _multiply(a: Scaled, b: Scaled, a_dims: Dims, b_dims: Dims, dtype: DTypeLike) -> Array:
    # Units for these add up in float32 whatever the result is; float16 would overflow.
    wide = jnp.float32 if dtype == jnp.float16 else dtype
    dims = ((a_dims, b_dims), ((), ()))
    y = lax.dot_general(a.numbers, b.numbers, dims, preferred_element_type=wide)
    return (y.astype(jnp.float32) * _power(a.exponent) * _power(b.exponent)).astype(dtype)


def _power(exponent: Array) -> Array:
    return jnp.ldexp(jnp.float32(1), exponent)
