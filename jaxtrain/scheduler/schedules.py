"""Learning-rate schedules, with the closed forms of `transformers`.

A schedule maps the step (from 0) to a fraction of the peak learning rate. A fall maps the progress
of the decay, from 0 to 1, to a value from 1 to 0. `horizon` and `warmup` count steps; `floor` is
the fraction at which the decay ends.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]
Fall = Callable[[jax.Array], jax.Array]
Kind = Literal["linear", "cosine", "1-sqrt"]


def polynomial(power: float = 1.0) -> Fall:
    return lambda x: (1 - x) ** power


def cosine(num_cycles: float = 0.5) -> Fall:
    """A cosine wave; half a cycle falls from 1 to 0."""
    return lambda x: 0.5 * (1 + jnp.cos(2 * jnp.pi * num_cycles * x))


def cosine_restarts(num_cycles: int) -> Fall:
    """`num_cycles` half cosine waves, each from the peak."""
    return lambda x: jnp.where(x >= 1, 0.0, cosine()((num_cycles * x) % 1.0))


def _fall_of(kind: Kind, num_cycles: float = 0.5) -> Fall:
    if kind == "1-sqrt":
        return lambda x: 1 - jnp.sqrt(x)
    return polynomial() if kind == "linear" else cosine(num_cycles)


def _progress(step: jax.Array, first: int, last: int) -> jax.Array:
    """0 up to `first`, 1 from `last` on."""
    return jnp.clip((jnp.float32(step) - first) / max(1, last - first), 0, 1)


def _warm_up(warmup: int, after: Schedule) -> Schedule:
    """A linear warmup before another schedule."""
    return lambda step: jnp.where(step < warmup, _progress(step, 0, warmup), after(step))


def decay(fall: Fall, horizon: int, warmup: int, *, floor: float = 0.0) -> Schedule:
    """A linear warmup, then the fall over the rest of the run."""
    falling = lambda step: floor + (1 - floor) * fall(_progress(step, warmup, horizon))
    return _warm_up(warmup, falling)


def inverse_sqrt(warmup: int, timescale: int) -> Schedule:
    """sqrt(timescale / (timescale + steps since warmup)), after a linear warmup."""
    since = lambda step: jnp.maximum(jnp.float32(step) - warmup, 0) + timescale
    return _warm_up(warmup, lambda step: jnp.sqrt(timescale / since(step)))


def cosine_from_initial_rate(
    horizon: int, warmup: int, *, first: float | None, floor: float, num_cycles: float
) -> Schedule:
    """A cosine whose warmup begins at `first` and whose last step reaches `floor`."""

    def schedule(step: jax.Array) -> jax.Array:
        now = jnp.float32(step)
        # Counts steps from 1, unlike the other schedules, as `transformers` does.
        if first is None:
            rise = _progress(step + 1, 0, warmup)
        else:
            rise = first + (1 - first) * now / max(1, warmup - 1)
        progress = jnp.clip((now - warmup + 1) / max(1, horizon - warmup), 0, 1)
        return jnp.where(step < warmup, rise, floor + (1 - floor) * cosine(num_cycles)(progress))

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
    """Warmup, plateau at the peak, decay (Hu et al. 2024, arXiv:2404.06395)."""
    rise, fall, begin = _fall_of(warmup_type), _fall_of(decay_type, num_cycles), warmup + stable

    def schedule(step: jax.Array) -> jax.Array:
        progress = _progress(step, begin, begin + decay)
        falling = jnp.where(progress >= 1, 0.0, fall(progress))
        rising = rise(1 - _progress(step, 0, warmup))
        scale = jnp.where(step < warmup, rising, jnp.where(step < begin, 1.0, falling))
        return floor + (1 - floor) * scale

    return schedule
