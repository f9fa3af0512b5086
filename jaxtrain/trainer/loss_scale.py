"""Loss scaling for float16, in which gradients below 6e-8 are 0: the loss is multiplied before it
is differentiated, and its gradients are divided in float32.

The factor is the scale over the weight of the loss, which is a sum: a scale means what it does to a
mean. The weight is rounded to a power of two, so that a scale of one changes no digit.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtrain.recipe.deepspeed import FP16Config

GROWTH = 2.0
MAX_SCALE = 2.0**64  # where every gradient is 0, it would grow until it is infinite


class LossScale(NamedTuple):
    """A scale that moves, and what it depends on; part of the state of a run."""

    scale: jax.Array
    """float32 []"""
    good_steps: jax.Array
    """int32 []: since the newest overflow or growth"""
    patience: jax.Array
    """int32 []: overflows until it shrinks, from 1"""


@dataclass(frozen=True)
class Scaling:
    """How the loss is scaled; without a config it is not."""

    config: FP16Config | None

    def start(self) -> Any:
        """The first scale; empty where none moves."""
        if self.config is None or self.config.loss_scale:
            return {}
        scale = jnp.float32(2.0**self.config.initial_scale_power)
        return LossScale(scale, jnp.int32(0), jnp.int32(self.config.hysteresis))

    def of(self, state: Any) -> jax.Array | None:
        """The present scale; None without one."""
        if self.config is None:
            return None
        return state.scale if state else jnp.float32(self.config.loss_scale)

    def update(self, state: Any, finite: jax.Array) -> Any:
        """The scale after a step that was finite, or was not."""
        config = self.config
        if config is None or not state:
            return state
        good_steps = jnp.where(finite, state.good_steps + 1, 0)
        grows = finite & (good_steps == config.loss_scale_window)
        shrinks = ~finite & (state.patience == 1)
        scale = jnp.where(grows, jnp.minimum(state.scale * GROWTH, MAX_SCALE), state.scale)
        least = jnp.minimum(state.scale, config.min_loss_scale)
        scale = jnp.where(shrinks, jnp.maximum(state.scale / GROWTH, least), scale)
        recovers = finite if config.consecutive_hysteresis else grows
        patience = jnp.where(finite | shrinks, state.patience, state.patience - 1)
        patience = jnp.where(recovers, config.hysteresis, patience)
        return LossScale(scale, jnp.where(grows, 0, good_steps), patience)

    def metrics(self, state: Any, finite: jax.Array) -> dict[str, jax.Array]:
        """The scale of a step; of one that moves also whether it would have to fall below its
        floor."""
        config, scale = self.config, self.of(state)
        if config is None or scale is None:
            return {}
        if not state:
            return {"loss_scale": scale}
        is_at_floor = (state.scale <= config.min_loss_scale) & (state.patience == 1)
        return {"loss_scale": scale, "scale_is_exhausted": ~finite & is_at_floor}


def lift_factor(scale: jax.Array | None, weight: jax.Array) -> jax.Array | float:
    """What to multiply a summed loss of this weight with."""
    if scale is None:
        return 1.0
    weight = jnp.maximum(jax.lax.stop_gradient(weight), 1.0)
    bits = jax.lax.bitcast_convert_type(weight, jnp.uint32) & jnp.uint32(0x7F80_0000)
    return scale / jax.lax.bitcast_convert_type(bits, jnp.float32)
