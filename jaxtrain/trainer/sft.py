"""Supervised fine-tuning: the likelihood of the trained tokens."""

import jax

from jaxtrain.batch import Batch
from jaxtrain.trainer.loss import Loss
from jaxtrain.trainer.trainer import Trainer


class SFTTrainer(Trainer):
    name = "sft"

    def loss_fn(self, model, batch: Batch, key: jax.Array) -> Loss:
        nll = model.weighted_nll(batch, batch.loss_weights)
        weight = batch.loss_weights.sum()
        return Loss(nll.total, weight, {"token_accuracy": (nll.correct, weight)})
