"""Supervised fine-tuning: the likelihood of the trained tokens."""

import jax

from jaxtrain.batch import Batch
from jaxtrain.trainer.loss import Loss, weigh_documents
from jaxtrain.trainer.trainer import Trainer


class SFTTrainer(Trainer):
    name = "sft"

    def loss_fn(self, model, batch: Batch, key: jax.Array) -> Loss:
        config, weights = self.config, batch.loss_weights
        if config.loss_weighting == "sample":
            weights = weigh_documents(weights, batch.segments)
        # An evaluation is of the likelihood, which smoothing would hide.
        smoothing = config.label_smoothing if batch.is_training else 0.0
        nll = model.weighted_nll(batch, weights, z_loss=config.z_loss, label_smoothing=smoothing)
        weight = weights.sum()
        loss = Loss(nll.total, weight, {"token_accuracy": (nll.correct, weight)})
        if not config.z_loss:
            return loss
        # `z_total` has no gradient: the loss is reported without it, and trained with it.
        metrics = loss.metrics | {"z_loss": (nll.z_total, weight)}
        return loss._replace(total=nll.total - nll.z_total, metrics=metrics)
