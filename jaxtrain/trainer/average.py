"""Averaged weights, which are evaluated and exported in place of the trained ones: `ema`."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxtrain.recipe.guards import EmaConfig
from jaxtrain.trainer.state import PyTree, TrainState


@dataclass(frozen=True)
class Average:
    config: EmaConfig | None
    """None keeps no average"""

    def start(self, params: PyTree) -> PyTree:
        """The average before the first update, float32: a copy, since both are donated."""
        if self.config is None:
            return {}
        return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)

    def after(self, average: PyTree, params: PyTree, step: jax.Array) -> PyTree:
        """The average after update `step`, counted from 0, has made `params`."""
        if self.config is None:
            return average
        decay = jnp.where(step < self.config.start_step, 0.0, self.config.decay)
        return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)

    def told(self, state: TrainState) -> PyTree:
        """The parameters that an evaluation, a sample and an export are of."""
        return state.average if self.config and self.config.eval else state.params
