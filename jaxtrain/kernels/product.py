"""Products of bfloat16 in the form that XLA computes fastest on CPU; elsewhere as they are written.

XLA on CPU uses a processor's unit for bfloat16 (AMX, AVX512-BF16) only where rows of one matrix are
multiplied with another, into float32; it converts the operands of all other products to float32.
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
    if _is_for_unit(x):
        return _multiply_matrices(x, y, x_dims, y_dims).astype(x.dtype)
    return lax.dot_general(x, y, ((x_dims, y_dims), ((), ())))


def einsum(spec: str, x: Array, y: Array) -> Array:
    """`jnp.einsum` in float32, of two arrays whose contracted dimensions are the first or the last
    of each, but for those of size 1."""
    inputs, result = spec.split("->")
    x_names, y_names = inputs.split(",")
    sizes = dict(zip(x_names + y_names, x.shape + y.shape, strict=True))
    common = [name for name in x_names if name in y_names]
    if not _is_for_unit(x) or any(sizes[name] > 1 and name in result for name in common):
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)
    x_dims, y_dims = (tuple(map(names.index, common)) for names in (x_names, y_names))
    return _multiply_matrices(x, y, x_dims, y_dims).reshape([sizes[name] for name in result])


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def keep(x: Array, name: str) -> Array:
    """x, which a rematerialisation policy knows by this name."""
    return mark(x, name)


keep.defvjp(lambda x, name: (mark(x, name), None), lambda name, _, dy: (dy,))


def mark(x: Array, name: str) -> Array:
    """The same in a function whose gradient is given, as none goes through.

    On CPU bfloat16 is kept as integers: a loop over layers would convert the stack of what all of
    them keep to float32 and back, in each of its turns."""
    if not _is_for_unit(x):
        return checkpoint_name(x, name)
    bits = checkpoint_name(lax.bitcast_convert_type(x, jnp.uint16), name)
    return lax.bitcast_convert_type(bits, x.dtype)


def _is_for_unit(x: Array) -> bool:
    """Whether this is a product of bfloat16 on one CPU, by the mesh of the context."""
    is_on_cpu = current_platform() == "cpu" and jax.sharding.get_abstract_mesh().size == 1
    return is_on_cpu and x.dtype == jnp.bfloat16


def _multiply_matrices(x: Array, y: Array, x_dims: Dims, y_dims: Dims) -> Array:
    """As `multiply`, in float32."""
    rows, matrix = _as_matrix(x, x_dims), _as_matrix(y, y_dims)
    if 0 in x_dims:  # in memory too, since XLA would else turn it back
        rows = with_layout_constraint(rows.T, Layout((0, 1)))
    dims = ((1,), (0 if 0 in y_dims else 1,))
    product = lax.dot_general(rows, matrix, (dims, ((), ())), preferred_element_type=jnp.float32)
    kept = lambda a, dims: [size for dim, size in enumerate(a.shape) if dim not in dims]
    return product.reshape(*kept(x, x_dims), *kept(y, y_dims))


def _as_matrix(a: Array, dims: Dims) -> Array:
    size = prod(a.shape[dim] for dim in dims)
    return a.reshape(size, -1) if 0 in dims else a.reshape(-1, size)
