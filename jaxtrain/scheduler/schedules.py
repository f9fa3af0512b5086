"""Shapes of the learning rate, with the closed forms of `transformers`.

Each makes a function from the update number (from 0) to a share of the peak rate. `horizon` and
`warmup` count updates; `floor` is the share of the peak at which the decay ends.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]


def _ramp(update: jax.Array, warmup: int) -> jax.Array:
    return jnp.float32(update) / max(1, warmup)


def _progress(update: jax.Array, first: int, last: int) -> jax.Array:
    """0 at `first`, 1 at `last` and beyond."""
    return jnp.clip((jnp.float32(update) - first) / max(1, last - first), 0, 1)


def constant() -> Schedule:
    return lambda update: jnp.ones_like(update, jnp.float32)


def constant_with_warmup(warmup: int) -> Schedule:
    return lambda update: jnp.minimum(1.0, _ramp(update, warmup))


def linear(horizon: int, warmup: int, *, floor: float = 0.0) -> Schedule:
    def schedule(update: jax.Array) -> jax.Array:
        decay = floor + (1 - floor) * (1 - _progress(update, warmup, horizon))
        return jnp.where(update < warmup, _ramp(update, warmup), decay)

    return schedule


def cosine(horizon: int, warmup: int, *, floor: float = 0.0, num_cycles: float = 0.5) -> Schedule:
    """Half a cosine wave from the peak to `floor`; more waves with more cycles."""

    def schedule(update: jax.Array) -> jax.Array:
        wave = 0.5 * (1 + jnp.cos(2 * jnp.pi * num_cycles * _progress(update, warmup, horizon)))
        return jnp.where(update < warmup, _ramp(update, warmup), floor + (1 - floor) * wave)

    return schedule


def warmup_stable_decay(
    warmup: int,
    stable: int,
    decay: int,
    *,
    floor: float = 0.0,
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "cosine",
    num_cycles: float = 0.5,
) -> Schedule:
    """Rise, stay at the peak, fall (Hu et al. 2024, arXiv:2404.06395)."""
    shapes: dict[str, Schedule] = {
        "linear": lambda progress: 1 - progress,
        "cosine": lambda progress: 0.5 * (1 + jnp.cos(2 * jnp.pi * num_cycles * progress)),
        "1-sqrt": lambda progress: 1 - jnp.sqrt(progress),
    }

    def schedule(update: jax.Array) -> jax.Array:
        begin = warmup + stable
        falling = shapes[decay_type](_progress(update, begin, begin + decay))
        rising = jnp.minimum(1.0, _ramp(update, warmup))
        return floor + (1 - floor) * jnp.where(update < begin, rising, falling)

    return schedule
