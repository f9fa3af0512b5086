"""Stochastic gradient descent, with decoupled weight decay."""

from typing import Any

import optax

from jaxtrain.optimizer.factory import OptimizerFactory, decayed
from jaxtrain.recipe.optimizer import SGDConfig


class SGDFactory(OptimizerFactory):
    name = "sgd"
    config: SGDConfig

    def create_optimizer(
        self, model: Any, optimizer_config: SGDConfig
    ) -> optax.GradientTransformation:
        momentum = optimizer_config.momentum
        return optax.chain(
            optax.trace(momentum, optimizer_config.nesterov) if momentum else optax.identity(),
            optax.add_decayed_weights(optimizer_config.weight_decay, decayed),
            optax.scale_by_learning_rate(optimizer_config.learning_rate),
        )
