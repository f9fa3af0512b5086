"""Supervised fine-tuning: the likelihood of the trained tokens."""

import jax

from jaxtrain.batch import Batch
from jaxtrain.trainer.loss import Loss, of_documents
from jaxtrain.trainer.trainer import Trainer


class SFTTrainer(Trainer):
    name = "sft"

    def loss_fn(self, model, batch: Batch, key: jax.Array) -> Loss:
        config, weights = self.config, batch.loss_weights
        if config.loss_weighting == "sample":
            weights = of_documents(weights, batch.segments)
        nll = model.weighted_nll(
            batch, weights, z_loss=config.z_loss, label_smoothing=config.label_smoothing
        )
        weight = weights.sum()
        loss = Loss(nll.total, weight, {"token_accuracy": (nll.correct, weight)})
        if not config.z_loss:
            return loss
        # `z_total` has no gradient: the loss is told without it, and trained with it.
        metrics = loss.metrics | {"z_loss": (nll.z_total, weight)}
        return loss._replace(total=nll.total - nll.z_total, metrics=metrics)

    def eval_fn(self, model, batch: Batch, key: jax.Array) -> Loss:
        """The objective without smoothing, which would hide the likelihood."""
        config = self.config
        self.config = config.model_copy(update={"label_smoothing": 0.0})
        try:  # while it is traced, so that a `loss_fn` over this one, and callbacks, find it too
            return super().eval_fn(model, batch, key)
        finally:
            self.config = config
