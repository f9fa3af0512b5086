"""Lion (Chen et al. 2023, arXiv:2302.06675)."""

from typing import Any

import optax

from jaxtrain.optimizer.factory import OptimizerFactory, decayed
from jaxtrain.recipe.optimizer import LionConfig


class LionFactory(OptimizerFactory):
    name = "lion"
    config: LionConfig

    def create_optimizer(
        self, model: Any, optimizer_config: LionConfig
    ) -> optax.GradientTransformation:
        return optax.lion(
            optimizer_config.learning_rate,
            *optimizer_config.betas,
            weight_decay=optimizer_config.weight_decay,
            mask=decayed,
        )
