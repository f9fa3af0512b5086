"""Averaged weights, which are evaluated and exported in place of the trained ones: `ema`."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxtrain.parallel.host_memory import fetch
from jaxtrain.recipe.guards import EmaConfig
from jaxtrain.trainer.state import PyTree, TrainState


@dataclass(frozen=True)
class Average:
    config: EmaConfig | None
    """None keeps no average"""

    def start(self, params: PyTree) -> PyTree:
        """The average before the first step, float32: a copy, since both are donated."""
        if self.config is None:
            return {}
        return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), fetch(params))

    def update(self, average: PyTree, params: PyTree, step: jax.Array) -> PyTree:
        """The average after step `step`, counted from 0, has made `params`."""
        if self.config is None:
            return average
        has_begun, share = step >= self.config.start_step, 1 - self.config.decay
        # Written as a difference, so that the average of a frozen parameter stays as it is.
        move = lambda a, p: jnp.where(has_begun, a + share * (p - a), p)
        return jax.tree.map(move, average, params)

    def eval_params(self, state: TrainState) -> PyTree:
        """The parameters that are evaluated, sampled from and exported."""
        return state.average if self.config and self.config.eval else state.params
