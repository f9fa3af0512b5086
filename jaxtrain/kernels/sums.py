"""Sums over devices of which each gets a part, in float32: no device has the whole sum.

Said by hand, since XLA makes the whole sum on every device and cuts it then: on CPU always, and on
TPU for as many devices as 256.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxtrain.kernels.axes import (
    CONTEXT_AXIS,
    TENSOR_AXIS,
    batch_parts,
    context_parts,
    current_platform,
    free_axis_sizes,
)

Axes = tuple[str, ...]
Places = tuple[Axes | str | None, ...]
"""For each dimension of a sum TENSOR_AXIS, where that splits it; for one of them, if any, the axes
over which devices share the sum, which else all of them get."""
SHARED: Axes = ("fsdp",)
SHARED_BY_ALL: Axes = ("fsdp", "data", CONTEXT_AXIS)
"""With a ZeRO stage that splits gradients, in its order."""
MAX_SCATTER = 16
"""Devices over which XLA scatters a sum on TPU in one step."""


def sum_parts(parts_I: Array, axes: Axes, places: Places) -> Array:
    """The sum over the first dimension, which these axes split to one entry a device. A device gets
    its share of the sum, as far as the axes divide it."""
    sizes = parts_I.shape[1:]
    return _map(lambda part_1: part_1[0], axes, [P(axes, *_split(places))], sizes, places)(parts_I)


def map_with_copies(
    layer: Callable[[Any, Array], Array],
    weights: Sequence[tuple[Array, Places] | None],
    x: Array,
    *,
    dtype: DTypeLike,
) -> Array:
    """`layer(weights, x)` of each device's own tokens, x [B, T, ...]; the weights are float32, of
    numbers in this dtype. The devices sum their gradients of the weights once, however often the
    layer uses these."""
    axes, tokens = _token_axes(x)
    if not (axes or tokens):
        return layer([w and w[0] for w in weights], x)
    rows, shared = P(axes, tokens), (*axes, *tokens)
    copies = [w and _copy(shared, w[1], dtype, w[0]) for w in weights]
    local = lambda copies, x: layer(jax.tree.map(lambda w_1: w_1[0], copies), x)
    return jax.shard_map(
        local,
        in_specs=(P(shared), rows), out_specs=rows, axis_names={*shared}, check_vma=False,
    )(copies, x)  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _copy(axes: Axes, places: Places, dtype: DTypeLike, w: Array) -> Array:
    """A copy for each device of these axes, [I, ...]. It is gathered in this dtype and float32
    then, in which its gradients are added up."""
    whole = gather_shares(w.astype(dtype), places).astype(jnp.float32)
    parts = math.prod(free_axis_sizes()[axis] for axis in axes)
    copies = jnp.broadcast_to(whole, (parts, *whole.shape))
    return lax.with_sharding_constraint(copies, P(axes, *_split(places)))


def _copy_fwd(axes: Axes, places: Places, dtype: DTypeLike, w: Array) -> tuple[Array, Array]:
    return _copy(axes, places, dtype, w), jnp.zeros((), w.dtype)


def _copy_bwd(
    axes: Axes, places: Places, dtype: DTypeLike, like: Array, d_copies: Array
) -> tuple[Array]:
    # The barrier keeps the sum in float32.
    return (lax.optimization_barrier(sum_parts(d_copies, axes, places)).astype(like.dtype),)


_copy.defvjp(_copy_fwd, _copy_bwd)


def _token_axes(x: Array) -> tuple[Axes, Axes]:
    """The axes over which devices share the sequences of x [B, T, ...], and their tokens."""
    return batch_parts(x.shape[0])[0], (CONTEXT_AXIS,) if context_parts(x.shape[1]) > 1 else ()


def weight_gradient(x: Array, dy: Array, places: Places) -> Array | None:
    """The float32 sum over tokens of products of inputs and outputs, [B, T, ...] each, of which a
    device gets its share; None where no device shares tokens with another."""
    axes, tokens = _token_axes(x)
    if not (axes or tokens):
        return None
    num_rows = (x.ndim + dy.ndim - len(places)) // 2
    num_inputs = x.ndim - num_rows
    inputs, outputs = places[:num_inputs], places[num_inputs:]

    def of_part(x: Array, dy: Array) -> Array:
        x, dy = (a.reshape(-1, *a.shape[num_rows:]) for a in (x, dy))
        if current_platform() == "cpu":
            # As XLA would do, unless it swaps the two, to a form in bfloat16 that it does not have.
            x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
        return lax.dot_general(x, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    lead = axes, tokens, *(None,) * (num_rows - 2)
    specs = [P(*lead, *_split(part)) for part in (inputs, outputs)]
    sizes = *x.shape[num_rows:], *dy.shape[num_rows:]
    return _map(of_part, (*axes, *tokens), specs, sizes, places)(x, dy)


def gather_shares(w: Array, places: Places) -> Array:
    """A weight of which every device has all that the tensor axis leaves it. Said by hand, since
    XLA may else gather it once for each product with it."""
    is_shared = any(free_axis_sizes().get(axis, 1) > 1 for axis in SHARED_BY_ALL)
    return lax.with_sharding_constraint(w, P(*_split(places))) if is_shared else w


def _split(places: Places) -> tuple[str | None, ...]:
    """The axis that splits each dimension before the sum."""
    is_split = free_axis_sizes().get(TENSOR_AXIS, 1) > 1
    return tuple(TENSOR_AXIS if place == TENSOR_AXIS and is_split else None for place in places)


def _map(
    make_part: Callable[..., Array],
    axes: Axes,
    specs: list[P],
    shape: tuple[int, ...],
    places: Places,
) -> Callable[..., Array]:
    """The sum over the devices of these axes of what each makes."""
    dim = next((i for i, at in enumerate(places) if isinstance(at, tuple)), 0)
    split, shared, size = _split(places), [], shape[dim]
    at = places[dim]
    for axis in at if isinstance(at, tuple) else ():
        if axis in axes and size % free_axis_sizes()[axis] == 0:
            shared.append(axis)
            size //= free_axis_sizes()[axis]
    rest = tuple(axis for axis in axes if axis not in shared)
    mesh = jax.sharding.get_abstract_mesh()
    is_tpu = current_platform() == "tpu"

    def lay(part: Array, *order: int) -> Array:
        """Gate and up lie apart in memory where they are multiplied on TPU, beside each other where
        they are stored. XLA would turn the stack of all layers, with a copy of it, at the end."""
        is_pair = is_tpu and len(shape) == 3 and shape[1] == 2
        return with_layout_constraint(part, Layout(order)) if is_pair else part

    def summed(*arguments: Array) -> Array:
        part = lay(make_part(*arguments), 1, 0, 2)
        for axis in shared:
            size = mesh.shape[axis]
            for groups in scatter_groups(size, MAX_SCATTER if is_tpu else size):
                part = lax.psum_scatter(
                    part, axis, scatter_dimension=dim, axis_index_groups=groups, tiled=True
                )
        part = lax.psum(part, rest) if rest else part
        return lay(lay(part, 1, 0, 2), 0, 1, 2)

    return jax.shard_map(
        summed,
        # The tensor axis too, over which XLA would else gather what it scatters.
        axis_names={*axes, *filter(None, split)},
        in_specs=tuple(specs),
        out_specs=P(*split[:dim], tuple(shared) or split[dim], *split[dim + 1 :]),
        check_vma=False,
    )


def scatter_groups(size: int, most: int) -> Iterator[list[list[int]] | None]:
    """Devices of an axis that scatter a sum among them, None for all, in one step; in two where
    they are more than `most` and their number is not prime."""
    near = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    if size <= most or near == 1:
        yield None
        return
    far = size // near
    yield [[i * near + j for i in range(far)] for j in range(near)]
    yield [[i * near + j for j in range(near)] for i in range(far)]
