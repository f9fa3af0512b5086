"""Adafactor (Shazeer and Stern 2018, arXiv:1804.04235), with a rate of its own and no momentum."""

from typing import Any

import optax

from jaxtrain.optimizer.factory import OptimizerFactory, decayed
from jaxtrain.recipe.optimizer import AdafactorConfig


class AdafactorFactory(OptimizerFactory):
    name = "adafactor"
    config: AdafactorConfig

    def create_optimizer(
        self, model: Any, optimizer_config: AdafactorConfig
    ) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(optimizer_config.weight_decay, decayed),
            optax.scale_by_learning_rate(optimizer_config.learning_rate),
        )
