"""Supervised fine-tuning: the likelihood of the trained tokens."""

from typing import Any

import jax

from jaxtrain.batch import Batch
from jaxtrain.model import Decoder
from jaxtrain.trainer.loss import Loss, weigh_documents
from jaxtrain.trainer.router_loss import add_router_losses, survey_routers
from jaxtrain.trainer.trainer import Trainer


class SFTTrainer(Trainer):
    name = "sft"

    def survey(self, model, batch: Batch) -> Any:
        if not isinstance(model, Decoder):  # what `merge` of a subclass made, for its own loss
            return None
        return survey_routers(model, batch, self._weights(batch).sum())

    def loss_fn(self, model, batch: Batch, key: jax.Array) -> Loss:
        config, weights = self.config, self._weights(batch)
        # An evaluation is of the likelihood, which smoothing would hide.
        smoothing = config.label_smoothing if batch.is_training else 0.0
        hidden_BTD, routing = model.hidden_and_routing(batch)
        nll = model.weighted_nll(
            batch, weights, z_loss=config.z_loss, label_smoothing=smoothing, hidden_BTD=hidden_BTD
        )
        weight = weights.sum()
        loss = Loss(nll.total, weight, {"token_accuracy": (nll.correct, weight)})
        if config.z_loss:
            # `z_total` has no gradient: the loss is reported without it, and trained with it.
            metrics = loss.metrics | {"z_loss": (nll.z_total, weight)}
            loss = loss._replace(total=nll.total - nll.z_total, metrics=metrics)
        if routing is None or not batch.is_training:
            return loss
        return add_router_losses(
            loss, model.config, routing, z_loss=config.router_z_loss, whole=batch.whole
        )

    def _weights(self, batch: Batch) -> jax.Array:
        if self.config.loss_weighting == "sample":
            return weigh_documents(batch.loss_weights, batch.segments)
        return batch.loss_weights
