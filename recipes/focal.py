"""A loss of one's own: hard tokens count more (Lin et al. 2017, arXiv:1708.02002)."""

import jax.numpy as jnp

from jaxtrain import Loss, SFTTrainer, TrainerConfig, register


class FocalConfig(TrainerConfig):
    gamma: float = 2.0
    """How much less a token counts that is likely already; 0 is the plain likelihood."""


@register
class FocalTrainer(SFTTrainer):
    name = "focal"
    config: FocalConfig

    def loss_fn(self, model, batch, key):
        nll = -model.token_log_probs(batch)
        w = batch.loss_weights
        return Loss((nll * (1 - jnp.exp(-nll)) ** self.config.gamma * w).sum(), w.sum())
