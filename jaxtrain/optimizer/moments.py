"""The dtype in which an optimizer keeps what it remembers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Rounded(NamedTuple):
    count: jax.Array
    """int32 []: updates done, which the roundings follow"""
    state: Any


def with_moments(
    optimizer: optax.GradientTransformation, dtype: str | None
) -> optax.GradientTransformation:
    """`optimizer` with its moments kept in `dtype`, and updated in float32.

    With None they keep the dtype that the optimizer has for float32 parameters: with that of
    bfloat16 ones it would change at the first update, since gradients are float32.
    """

    is_rounded = dtype == "bfloat16"

    def init(params: Any) -> Any:
        state = optimizer.init(optax.tree.cast(params, jnp.float32))
        state = state if dtype is None else _cast(state, dtype)
        return Rounded(jnp.int32(0), state) if is_rounded else state

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        old = _cast(state.state, "float32") if is_rounded else state
        updates, new = optimizer.update(updates, old, optax.tree.cast(params, jnp.float32))
        if not is_rounded:
            return updates, optax.tree.cast_like(new, old)
        key = jax.random.fold_in(jax.random.key(0), state.count)
        new = jax.tree.map(
            lambda x, key: _rounded(x, key) if _is_moment(x) else x,
            new,
            optax.tree.split_key_like(key, new),
        )
        return updates, Rounded(state.count + 1, new)

    return optax.GradientTransformation(init, update)


def _is_moment(x: jax.Array) -> bool:
    return x.ndim > 0 and jnp.issubdtype(x.dtype, jnp.floating)


def _cast(state: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if _is_moment(x) else x, state)


def _rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    """bfloat16, up or down by chance, the nearer the likelier: to the nearest, a second moment that
    is to fall by a thousandth would stay where it is for ever."""
    below = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) + below
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
