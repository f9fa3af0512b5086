"""What routers are trained with beside the objective: to use all experts, with small logits.

E experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtrain.batch import Batch
from jaxtrain.model.config import DecoderConfig
from jaxtrain.model.routing import Routing
from jaxtrain.trainer.loss import Loss


class Whole(NamedTuple):
    """Sums over all microbatches of a step."""

    weight: jax.Array
    """of the loss"""
    decisions: jax.Array
    """of all routers"""
    choices_E: jax.Array | None
    """None without a load-balancing loss, which alone depends on them"""


def survey_routers(model, batch: Batch, weight: jax.Array) -> Whole | None:
    """The part of a microbatch in `Whole`, by a forward pass of its own if choices count."""
    config: DecoderConfig = model.config
    if config.experts is None:
        return None
    if config.experts.balance_loss:
        _, routing = model.hidden_and_routing(batch)
        return Whole(weight, routing.decisions, routing.choices_E)
    tokens = (batch.segments != 0).sum(dtype=jnp.float32)
    return Whole(weight, tokens * config.num_expert_layers, None)


def add_router_losses(
    loss: Loss, config: DecoderConfig, routing: Routing, *, z_loss: float, whole: Whole | None
) -> Loss:
    """The loss of a microbatch, told as it is and trained with what its routers add.

    The load-balancing loss is that of transformers (Fedus et al., 2021, arXiv:2101.03961, equations
    4 to 6): E times the sum over experts of the choices of it per decision, times its mean
    probability. The z-loss is the mean square of the logarithm of the softmax's denominator (Zoph
    et al., 2022, arXiv:2202.08906, equation 5). Both are means over the tokens and layers of the
    whole step, so that no cut of it changes them.
    """
    experts = config.experts
    assert experts is not None
    if whole is None:  # this is all of the step
        whole = Whole(loss.weight, routing.decisions, routing.choices_E)
    metrics, added = {}, jnp.float32(0)
    for expert in range(experts.count):
        share = experts.count / experts.per_token * routing.choices_E[expert]
        metrics[f"expert_load/{expert}"] = (share, routing.decisions)
    if experts.balance_loss and whole.choices_E is not None:
        frequency_E = whole.choices_E / jnp.maximum(whole.decisions, 1)
        balance = experts.balance_loss * experts.count * (frequency_E * routing.probs_E).sum()
        metrics["balance_loss"], added = (balance, routing.decisions), added + balance
    if z_loss:
        square = z_loss * routing.squares
        metrics["router_z_loss"], added = (square, routing.decisions), added + square
    added *= whole.weight / jnp.maximum(whole.decisions, 1)
    total = loss.total + (added - jax.lax.stop_gradient(added))
    return loss._replace(total=total, metrics={**loss.metrics, **metrics})
