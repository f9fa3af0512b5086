"""Adafactor (Shazeer and Stern 2018, arXiv:1804.04235) with a given learning rate, no momentum."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from optax import GradientTransformation

from jaxtrain.optimizer.matrices import Layout, map_matrices
from jaxtrain.optimizer.optimizers import OptimizerFactory, descend
from jaxtrain.recipe.optimizer import AdafactorConfig

DECAY_POWER = -0.8  # of the number of the step
EPS = 1e-30  # added to squared gradients
MAX_RMS = 1.0  # of the update of a matrix


class AdafactorFactory(OptimizerFactory):
    name = "adafactor"
    config: AdafactorConfig

    def create_optimizer(
        self, model: Any, optimizer_config: AdafactorConfig
    ) -> GradientTransformation:
        return descend(optimizer_config, scale_by_adafactor())


class AdafactorState(NamedTuple):
    count: Array
    """int32 []: number of updates"""
    rows: Any
    """average of the squared gradient of each row; of each entry of a vector"""
    columns: Any
    """average of the squared gradient of each column; of the whole of a vector"""


def scale_by_adafactor() -> GradientTransformation:
    """Divides gradients by the root of their factored second moment, then clips each matrix."""

    def init(params: Any) -> AdafactorState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdafactorState(
            jnp.int32(0), map_matrices(_rows, zeros), map_matrices(_columns, zeros)
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdafactorState]:
        count = state.count + 1
        decay = 1 - count.astype(jnp.float32) ** DECAY_POWER
        squares = jax.tree.map(lambda g: jnp.square(g) + EPS, updates)
        average = lambda old, new: jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new)
        rows = average(state.rows, map_matrices(_rows, squares))
        columns = average(state.columns, map_matrices(_columns, squares))
        updates = map_matrices(_normalize, updates, rows, columns)
        return updates, AdafactorState(count, rows, columns)

    return GradientTransformation(init, update)


def _rows(layout: Layout, x: Array) -> Array:
    return layout.means(x, layout.columns)


def _columns(layout: Layout, x: Array) -> Array:
    return layout.means(x, layout.rows)


def _normalize(layout: Layout, grad: Array, rows: Array, columns: Array) -> Array:
    # For a vector, rows are entries and `columns` is the mean of the rows: its moment is not
    # factored.
    rows /= layout.repeat(layout.means(rows, layout.rows), rows)
    update = grad * layout.repeat(rows, grad) ** -0.5 * layout.repeat(columns, grad) ** -0.5
    rms = jnp.sqrt(layout.means(jnp.square(update), layout.rows + layout.columns))
    return update / layout.repeat(jnp.maximum(1.0, rms / MAX_RMS), grad)
