"""The dtype of an optimizer's state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class RoundedState(NamedTuple):
    count: jax.Array
    """int32 []: number of updates, which seeds the rounding"""
    state: Any


def with_moments(
    optimizer: optax.GradientTransformation, dtype: str | None
) -> optax.GradientTransformation:
    """Wraps `optimizer` to store its moments in `dtype` and update them in float32.

    None stands for the dtype that the optimizer has for float32 parameters: that for bfloat16 ones
    would change at the first update, since gradients are float32.
    """

    is_rounded = dtype == "bfloat16"

    def init(params: Any) -> Any:
        state = optimizer.init(optax.tree.cast(params, jnp.float32))
        state = state if dtype is None else _cast(state, dtype)
        return RoundedState(jnp.int32(0), state) if is_rounded else state

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        old = _cast(state.state, "float32") if is_rounded else state
        updates, new = optimizer.update(updates, old, optax.tree.cast(params, jnp.float32))
        if not is_rounded:
            return updates, optax.tree.cast_like(new, old)
        key = jax.random.fold_in(jax.random.key(0), state.count)
        new = jax.tree.map(
            lambda x, key: _round_stochastically(x, key) if _is_moment(x) else x,
            new,
            optax.tree.split_key_like(key, new),
        )
        return updates, RoundedState(state.count + 1, new)

    return optax.GradientTransformation(init, update)


def _is_moment(x: jax.Array) -> bool:
    return x.ndim > 0 and jnp.issubdtype(x.dtype, jnp.floating)


def _cast(state: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if _is_moment(x) else x, state)


def _round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds to bfloat16 up or down at random, in proportion to the distance."""
    # Rounded to nearest, a second moment that shrinks by a thousandth per step would never change.
    below = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) + below
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
