"""Products in the form that XLA computes fastest on CPU; elsewhere as they are written.

XLA on CPU uses a processor's unit for bfloat16 (AMX, AVX512-BF16) only where rows of one matrix are
multiplied with another, into float32; it converts the operands of all other products to float32.
In float32 it turns a weight in memory whose last two dimensions are summed over, unless they are
one.
"""

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from jaxtrain.kernels.axes import current_platform

Dims = tuple[int, ...]


def multiply(x: Array, y: Array, x_dims: Dims, y_dims: Dims) -> Array:
    """The product over some of the first, or of the last, dimensions of each, in the dtype of x."""
    if is_for_unit(x) or (_is_on_one_cpu() and x.dtype == jnp.float32):
        return _multiply_matrices(x, y, x_dims, y_dims).astype(x.dtype)
    return lax.dot_general(x, y, ((x_dims, y_dims), ((), ())))


def einsum(spec: str, x: Array, y: Array) -> Array:
    """`jnp.einsum` in float32, of two arrays whose contracted dimensions are the first or the last
    of each, but for those of size 1."""
    inputs, result = spec.split("->")
    x_names, y_names = inputs.split(",")
    sizes = dict(zip(x_names + y_names, x.shape + y.shape, strict=True))
    common = [name for name in x_names if name in y_names]
    if not is_for_unit(x) or any(sizes[name] > 1 and name in result for name in common):
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)
    x_dims, y_dims = (tuple(map(names.index, common)) for names in (x_names, y_names))
    return _multiply_matrices(x, y, x_dims, y_dims).reshape([sizes[name] for name in result])


def multiply_transposed(x: Array, y: Array) -> Array:
    """The product of matrices over the rows of both, float32 [..., R, H] of [..., S, R] and
    [..., S, H]; y is the smaller one."""
    into32 = partial(jnp.einsum, preferred_element_type=jnp.float32)
    if not is_for_unit(x):
        return into32("...sr,...sh->...rh", x, y)
    # Both are fixed in memory: XLA would swap the operands, to a form that it does not have.
    return _fix(into32("...hs,...sr->...hr", _fix(y.swapaxes(-1, -2)), x)).swapaxes(-1, -2)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def keep(x: Array, name: str) -> Array:
    """x, which a rematerialisation policy knows by this name."""
    return mark(x, name)


keep.defvjp(lambda x, name: (mark(x, name), None), lambda name, _, dy: (dy,))


def mark(x: Array, name: str) -> Array:
    """The same in a function whose gradient is given, as none goes through.

    On CPU bfloat16 is kept as integers: a loop over layers would convert the stack of what all of
    them keep to float32 and back, in each of its turns."""
    if not is_for_unit(x):
        return checkpoint_name(x, name)
    bits = checkpoint_name(lax.bitcast_convert_type(x, jnp.uint16), name)
    return lax.bitcast_convert_type(bits, x.dtype)


def to_bits(x: Array) -> Array | None:
    """What a loop over layers is to keep of x, for the reason that `mark` gives."""
    return lax.bitcast_convert_type(lax.stop_gradient(x), jnp.uint16) if is_for_unit(x) else None


@jax.custom_vjp
def from_bits(x: Array, bits: Array | None) -> Array:
    """x, read from its bits, if there are any; the gradient is that of x."""
    return x if bits is None else lax.bitcast_convert_type(bits, x.dtype)


from_bits.defvjp(lambda x, bits: (from_bits(x, bits), None), lambda _, dy: (dy, None))


def is_for_unit(x: Array) -> bool:
    """Whether this is a product of bfloat16 on one CPU, by the mesh of the context."""
    return _is_on_one_cpu() and x.dtype == jnp.bfloat16


def _is_on_one_cpu() -> bool:
    return current_platform() == "cpu" and jax.sharding.get_abstract_mesh().size == 1


def _multiply_matrices(x: Array, y: Array, x_dims: Dims, y_dims: Dims) -> Array:
    """As `multiply`, in float32."""
    rows, matrix = _as_matrix(x, x_dims), _as_matrix(y, y_dims)
    over = 0 if 0 in x_dims else 1
    if over == 0 and is_for_unit(x):
        # In memory, since XLA would else turn it back; and once it is made, not while it is.
        rows, over = _fix(_fix(rows).T), 1
    dims = ((over,), (0 if 0 in y_dims else 1,))
    product = lax.dot_general(rows, matrix, (dims, ((), ())), preferred_element_type=jnp.float32)
    kept = lambda a, dims: [size for dim, size in enumerate(a.shape) if dim not in dims]
    return product.reshape(*kept(x, x_dims), *kept(y, y_dims))


def _as_matrix(a: Array, dims: Dims) -> Array:
    size = prod(a.shape[dim] for dim in dims)
    return a.reshape(size, -1) if 0 in dims else a.reshape(-1, size)


def _fix(a: Array) -> Array:
    """The same, laid in memory in the order of its dimensions."""
    return with_layout_constraint(a, Layout(tuple(range(a.ndim))))
