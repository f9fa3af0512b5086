"""Callbacks that report norms: of the gradients and of the weights, by parameter."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.parallel.host_memory import fetch
from jaxtrain.parallel.sharding import path_name
from jaxtrain.trainer.callbacks import Callback
from jaxtrain.trainer.report import is_due
from jaxtrain.trainer.state import PyTree


class GradLogger(Callback):
    """`grad_norm/<path>` of the mean gradient, before clipping, for each parameter in whose path
    the regular expression is found; the layers of a stack are one parameter."""

    def __init__(self, pattern: str = ""):
        self.pattern = re.compile(pattern)

    def measure(self, gradients: PyTree) -> dict[str, jax.Array]:
        return _norms("grad_norm", gradients, self.pattern)


class WeightNormLogger(Callback):
    """`weight_norm/<path>` likewise, after the steps that have a row."""

    def __init__(self, pattern: str = ""):
        compiled = re.compile(pattern)
        self._norms = jax.jit(lambda params: _norms("weight_norm", fetch(params), compiled))

    def on_optimizer_step(self, state: Any, params: PyTree) -> None:
        if is_due(state.global_step, state.logging_steps):
            for name, norm in self._norms(params).items():
                state.metrics.record(name, norm)


def _norms(kind: str, tree: PyTree, pattern: re.Pattern[str]) -> dict[str, jax.Array]:
    named = ((path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))
    return {
        f"{kind}/{name}": jnp.linalg.norm(leaf.astype(jnp.float32).ravel())
        for name, leaf in named
        if pattern.search(name)
    }
