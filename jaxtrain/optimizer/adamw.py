"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

from typing import Any

import optax

from jaxtrain.optimizer.factory import OptimizerFactory, decayed
from jaxtrain.recipe.optimizer import AdamWConfig


class AdamWFactory(OptimizerFactory):
    name = "adamw"
    config: AdamWConfig

    def create_optimizer(
        self, model: Any, optimizer_config: AdamWConfig
    ) -> optax.GradientTransformation:
        return optax.adamw(
            optimizer_config.learning_rate,
            *optimizer_config.betas,
            eps=optimizer_config.eps,
            weight_decay=optimizer_config.weight_decay,
            mask=decayed,
        )
