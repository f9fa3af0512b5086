"""The optimizers that optax provides, built from their recipe sections."""

from typing import Any

import optax
from optax import GradientTransformation

from jaxtrain.optimizer.factory import OptimizerFactory, decay_mask
from jaxtrain.recipe.optimizer import AdafactorConfig, AdamWConfig, LionConfig, SGDConfig


class AdamWFactory(OptimizerFactory):
    """Loshchilov and Hutter 2019, arXiv:1711.05101."""

    name = "adamw"
    config: AdamWConfig

    def create_optimizer(self, model: Any, optimizer_config: AdamWConfig) -> GradientTransformation:
        return optax.adamw(
            optimizer_config.learning_rate,
            *optimizer_config.betas,
            eps=optimizer_config.eps,
            weight_decay=optimizer_config.weight_decay,
            mask=decay_mask,
        )


class LionFactory(OptimizerFactory):
    """Chen et al. 2023, arXiv:2302.06675."""

    name = "lion"
    config: LionConfig

    def create_optimizer(self, model: Any, optimizer_config: LionConfig) -> GradientTransformation:
        return optax.lion(
            optimizer_config.learning_rate,
            *optimizer_config.betas,
            weight_decay=optimizer_config.weight_decay,
            mask=decay_mask,
        )


class AdafactorFactory(OptimizerFactory):
    """Shazeer and Stern 2018, arXiv:1804.04235, with a given learning rate and no momentum."""

    name = "adafactor"
    config: AdafactorConfig

    def create_optimizer(
        self, model: Any, optimizer_config: AdafactorConfig
    ) -> GradientTransformation:
        return optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(optimizer_config.weight_decay, decay_mask),
            optax.scale_by_learning_rate(optimizer_config.learning_rate),
        )


class SGDFactory(OptimizerFactory):
    """SGD with decoupled weight decay."""

    name = "sgd"
    config: SGDConfig

    def create_optimizer(self, model: Any, optimizer_config: SGDConfig) -> GradientTransformation:
        momentum = optimizer_config.momentum
        return optax.chain(
            optax.trace(momentum, optimizer_config.nesterov) if momentum else optax.identity(),
            optax.add_decayed_weights(optimizer_config.weight_decay, decay_mask),
            optax.scale_by_learning_rate(optimizer_config.learning_rate),
        )
