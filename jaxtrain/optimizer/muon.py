"""Muon (Jordan et al. 2024), with the scale of Liu et al. 2025, arXiv:2502.16982: one learning rate
suits matrices and the parameters that adam updates.

R rows, C columns of a matrix.
"""

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax import GradientTransformation

from jaxtrain.optimizer.matrices import Layout, map_matrices
from jaxtrain.optimizer.optimizers import OptimizerFactory, descend
from jaxtrain.recipe.optimizer import MuonConfig

HIDDEN = {
    "qkv", "out", "gate_up", "down", "expert_gate_up", "expert_down", "in_qkv", "in_gate", "in_bcx",
    "conv_out", "q", "q_a", "q_b", "kv_a", "kv_b", "project", "narrow", "widen",
}  # fmt: skip
"""Names of the parameters that hold matrices of layers."""
RMS = 0.2  # of an update, about that of adamw
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-8  # norm below which a matrix counts as zero


class MuonFactory(OptimizerFactory):
    name = "muon"
    config: MuonConfig

    def create_optimizer(self, model: Any, optimizer_config: MuonConfig) -> GradientTransformation:
        config = optimizer_config
        parts: dict[Hashable, GradientTransformation] = {
            "muon": scale_by_muon(config.momentum, config.nesterov),
            "adam": optax.scale_by_adam(*config.betas, eps=config.eps),
        }
        return descend(config, optax.partition(parts, choose_parts))


def choose_parts(params: Any) -> Any:
    """`muon` for each parameter that holds matrices of layers, `adam` for all others."""
    choose = lambda path, _: "muon" if path[-1].key in HIDDEN else "adam"
    return jax.tree_util.tree_map_with_path(choose, params)


class MuonState(NamedTuple):
    count: Array
    """int32 []: number of updates"""
    mu: Any
    """average of the gradients"""


def scale_by_muon(momentum: float, nesterov: bool) -> GradientTransformation:
    """Turns each matrix of an average of gradients into the nearest orthogonal one."""

    def init(params: Any) -> MuonState:
        return MuonState(jnp.int32(0), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        count = state.count + 1
        mu = optax.tree.update_moment(updates, state.mu, momentum, 1)
        average = optax.tree.bias_correction(mu, momentum, count + nesterov)
        if nesterov:
            updates = optax.tree.bias_correction(updates, momentum, count)
            average = optax.tree.update_moment(updates, average, momentum, 1)
        return map_matrices(_orthogonalize, average), MuonState(count, mu)

    return GradientTransformation(init, update)


def _orthogonalize(layout: Layout, x: Array) -> Array:
    return layout.join([_orthogonalize_part(layout, part) for part in layout.split(x)])


def _orthogonalize_part(layout: Layout, x: Array) -> Array:
    separate = tuple(i for i in range(x.ndim) if i not in layout.rows + layout.columns)
    order = (*separate, *layout.rows, *layout.columns)
    size = lambda dims: math.prod(x.shape[i] for i in dims)
    shape = *(x.shape[i] for i in separate), size(layout.rows), size(layout.columns)
    y = newton_schulz(x.transpose(order).reshape(shape)) * RMS * math.sqrt(max(shape[-2:]))
    inverse = sorted(range(x.ndim), key=order.__getitem__)
    return y.reshape([x.shape[i] for i in order]).transpose(inverse)


def newton_schulz(x: Array) -> Array:
    """Brings the singular values of matrices [..., R, C] near 1, in about 0.7 to 1.2."""
    if x.shape[-2] > x.shape[-1]:  # the smaller product is the cheaper one
        return newton_schulz(x.mT).mT
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), EPS)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
