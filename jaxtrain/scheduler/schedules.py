"""Shapes of the learning rate, with the closed forms of `transformers`.

A fall goes from 1 to 0 as its argument, the progress of the decay, goes from 0 to 1. A schedule is
a function from the update number (from 0) to a share of the peak rate. `horizon` and `warmup` count
updates; `floor` is the share of the peak at which the decay ends.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]
Fall = Callable[[jax.Array], jax.Array]
Kind = Literal["linear", "cosine", "1-sqrt"]


def straight(power: float = 1.0) -> Fall:
    return lambda x: (1 - x) ** power


def wave(num_cycles: float = 0.5) -> Fall:
    """Half a cosine wave; more waves with more cycles."""
    return lambda x: 0.5 * (1 + jnp.cos(2 * jnp.pi * num_cycles * x))


def restarts(num_cycles: int) -> Fall:
    """Half a cosine wave, `num_cycles` times, each from the peak."""
    return lambda x: jnp.where(x >= 1, 0.0, wave()((num_cycles * x) % 1.0))


def _of_kind(kind: Kind, num_cycles: float = 0.5) -> Fall:
    of = {"linear": straight(), "cosine": wave(num_cycles), "1-sqrt": lambda x: 1 - jnp.sqrt(x)}
    return of[kind]


def _progress(update: jax.Array, first: int, last: int) -> jax.Array:
    """0 up to `first`, 1 from `last` on."""
    return jnp.clip((jnp.float32(update) - first) / max(1, last - first), 0, 1)


def decay(fall: Fall, horizon: int, warmup: int, *, floor: float = 0.0) -> Schedule:
    """A straight rise, then the fall over the rest of the run."""

    def schedule(update: jax.Array) -> jax.Array:
        share = floor + (1 - floor) * fall(_progress(update, warmup, horizon))
        return jnp.where(update < warmup, _progress(update, 0, warmup), share)

    return schedule


def inverse_sqrt(warmup: int, timescale: int) -> Schedule:
    """Falls with the square root of the updates since `timescale` before the end of warm-up."""

    def schedule(update: jax.Array) -> jax.Array:
        since = jnp.maximum(jnp.float32(update) - warmup, 0) + timescale
        return jnp.where(update < warmup, _progress(update, 0, warmup), jnp.sqrt(timescale / since))

    return schedule


def cosine_from(
    horizon: int, warmup: int, *, first: float | None, floor: float, num_cycles: float
) -> Schedule:
    """A wave whose warm-up begins at `first`, with a last update that reaches `floor`."""

    def schedule(update: jax.Array) -> jax.Array:
        now = jnp.float32(update)
        # It counts updates from 1, unlike the others, as the closed form of `transformers` does.
        if first is None:
            rise = _progress(update + 1, 0, warmup)
        else:
            rise = first + (1 - first) * now / max(1, warmup - 1)
        progress = jnp.clip((now - warmup + 1) / max(1, horizon - warmup), 0, 1)
        return jnp.where(update < warmup, rise, floor + (1 - floor) * wave(num_cycles)(progress))

    return schedule


def warmup_stable_decay(
    warmup: int,
    stable: int,
    decay: int,
    *,
    floor: float,
    warmup_type: Kind = "linear",
    decay_type: Kind = "linear",
    num_cycles: float = 0.5,
) -> Schedule:
    """Rise, stay at the peak, fall (Hu et al. 2024, arXiv:2404.06395)."""
    rise, fall, begin = _of_kind(warmup_type), _of_kind(decay_type, num_cycles), warmup + stable

    def schedule(update: jax.Array) -> jax.Array:
        progress = _progress(update, begin, begin + decay)
        falling = jnp.where(progress >= 1, 0.0, fall(progress))
        rising = rise(1 - _progress(update, 0, warmup))
        share = jnp.where(update < warmup, rising, jnp.where(update < begin, 1.0, falling))
        return floor + (1 - floor) * share

    return schedule
