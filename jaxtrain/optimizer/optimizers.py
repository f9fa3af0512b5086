"""The base class of optimizer factories, and the optimizers that optax provides."""

from typing import Any

import jax
import optax
from optax import GradientTransformation

from jaxtrain.recipe.optimizer import (
    AdamWConfig,
    LionConfig,
    OptimizerConfig,
    SGDConfig,
)
from jaxtrain.registry import Factory


class OptimizerFactory(Factory, kind="optimizer"):
    events = {"create-optimizer": "create_optimizer"}
    config: OptimizerConfig

    def create_optimizer(self, model: Any, optimizer_config: Any) -> GradientTransformation:
        """Returns an optax transformation at the peak learning rate; the training step multiplies
        its updates by the schedule.

        `model` is the tree of the trained parameters' shapes.
        """
        raise NotImplementedError(
            f"{type(self).__qualname__} defines no create_optimizer(model, optimizer_config)"
        )


def decay_mask(params: Any) -> Any:
    """True for each parameter that weight decay applies to: all but norms, biases and scales."""
    is_decayed = lambda path, _: not str(path[-1].key).endswith(("norm", "bias", "scale"))
    return jax.tree_util.tree_map_with_path(is_decayed, params)


def descend(config: OptimizerConfig, *direction: GradientTransformation) -> GradientTransformation:
    """Steps along a direction with decoupled weight decay."""
    return optax.chain(
        *direction,
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(config.learning_rate),
    )


class AdamWFactory(OptimizerFactory):
    """Loshchilov and Hutter 2019, arXiv:1711.05101."""

    name = "adamw"
    config: AdamWConfig

    def create_optimizer(self, model: Any, optimizer_config: AdamWConfig) -> GradientTransformation:
        adam = optax.scale_by_adam(*optimizer_config.betas, eps=optimizer_config.eps)
        return descend(optimizer_config, adam)


class LionFactory(OptimizerFactory):
    """Chen et al. 2023, arXiv:2302.06675."""

    name = "lion"
    config: LionConfig

    def create_optimizer(self, model: Any, optimizer_config: LionConfig) -> GradientTransformation:
        return descend(optimizer_config, optax.scale_by_lion(*optimizer_config.betas))


class SGDFactory(OptimizerFactory):
    """SGD with decoupled weight decay."""

    name = "sgd"
    config: SGDConfig

    def create_optimizer(self, model: Any, optimizer_config: SGDConfig) -> GradientTransformation:
        momentum = optimizer_config.momentum
        trace = optax.trace(momentum, optimizer_config.nesterov) if momentum else optax.identity()
        return descend(optimizer_config, trace)
