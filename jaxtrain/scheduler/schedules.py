"""Shapes of the learning rate, with the closed forms of `transformers`.

Each makes a function from the update number (from 0) to a share of the peak rate. `horizon` and
`warmup` count updates; `floor` is the share of the peak at which the decay ends.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]
Ramp = Literal["linear", "cosine", "1-sqrt"]


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


def restarts(horizon: int, warmup: int, *, num_cycles: int = 1) -> Schedule:
    """A half cosine wave to zero, `num_cycles` times, each from the peak."""

    def schedule(update: jax.Array) -> jax.Array:
        progress = _progress(update, warmup, horizon)
        wave = 0.5 * (1 + jnp.cos(jnp.pi * ((num_cycles * progress) % 1.0)))
        return jnp.where(
            update < warmup, _ramp(update, warmup), jnp.where(progress >= 1, 0.0, wave)
        )

    return schedule


def polynomial(horizon: int, warmup: int, *, floor: float, power: float = 1.0) -> Schedule:
    def schedule(update: jax.Array) -> jax.Array:
        decay = floor + (1 - floor) * (1 - _progress(update, warmup, horizon)) ** power
        return jnp.where(update < warmup, _ramp(update, warmup), decay)

    return schedule


def inverse_sqrt(warmup: int, timescale: int) -> Schedule:
    """Falls with the square root of the updates since `timescale` before the end of warm-up."""

    def schedule(update: jax.Array) -> jax.Array:
        since = jnp.maximum(jnp.float32(update) - warmup, 0) + timescale
        return jnp.where(update < warmup, _ramp(update, warmup), jnp.sqrt(timescale / since))

    return schedule


def cosine_from(
    horizon: int, warmup: int, *, first: float | None, floor: float, num_cycles: float = 0.5
) -> Schedule:
    """`cosine` whose warm-up begins at `first`, with a last update that reaches `floor`."""
    begin = 0.0 if first is None else first

    def schedule(update: jax.Array) -> jax.Array:
        now = jnp.float32(update)
        # It counts updates from 1, unlike the others, as the closed form of `transformers` does.
        rise = begin + (1 - begin) * now / max(1, warmup - 1)
        ramp = _ramp(update + 1, warmup) if first is None else rise
        progress = jnp.clip((now - warmup + 1) / max(1, horizon - warmup), 0, 1)
        wave = 0.5 * (1 + jnp.cos(2 * jnp.pi * num_cycles * progress))
        return jnp.where(update < warmup, ramp, floor + (1 - floor) * wave)

    return schedule


def warmup_stable_decay(
    warmup: int,
    stable: int,
    decay: int,
    *,
    floor: float = 0.0,
    warmup_type: Ramp = "linear",
    decay_type: Ramp = "cosine",
    num_cycles: float = 0.5,
) -> Schedule:
    """Rise, stay at the peak, fall (Hu et al. 2024, arXiv:2404.06395)."""

    def fallen(kind: Ramp, progress: jax.Array, cycles: float) -> jax.Array:
        shapes = {
            "linear": lambda: 1 - progress,
            "cosine": lambda: 0.5 * (1 + jnp.cos(2 * jnp.pi * cycles * progress)),
            "1-sqrt": lambda: 1 - jnp.sqrt(progress),
        }
        return shapes[kind]()

    def schedule(update: jax.Array) -> jax.Array:
        begin = warmup + stable
        progress = _progress(update, begin, begin + decay)
        falling = jnp.where(progress >= 1, 0.0, fallen(decay_type, progress, num_cycles))
        rising = fallen(warmup_type, 1 - jnp.minimum(1.0, _ramp(update, warmup)), 0.5)
        share = jnp.where(update < warmup, rising, jnp.where(update < begin, 1.0, falling))
        return floor + (1 - floor) * share

    return schedule
