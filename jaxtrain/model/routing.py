"""Routers: which experts a token takes, with what shares, and what their losses need to know.

B batch, T tokens, E experts, C experts of a token, G groups of experts, g those of a token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from jaxtrain.model.config import DecoderConfig, Experts
from jaxtrain.recipe.errors import Fault, RecipeError
from jaxtrain.recipe.trainer import TrainerConfig

TINY = 1e-20  # in a sum of scores that may all be 0


class Routing(NamedTuple):
    """Sums over the tokens, padding apart, and the layers with experts; float32."""

    choices_E: Array
    """how often each expert was chosen"""
    probs_E: Array
    """of the softmax over all experts"""
    squares: Array
    """[]: of the logarithm of its denominator"""
    decisions: Array
    """[]: tokens times layers"""


class Chosen(NamedTuple):
    choices_BTC: Array
    """int32: the experts of each token"""
    shares_BTC: Array
    """float32: of each in the sum"""

    def shares(self, experts: int) -> Array:
        """float32 [B, T, E]: of every expert, 0 of those that were not chosen."""
        return (jax.nn.one_hot(self.choices_BTC, experts) * self.shares_BTC[..., None]).sum(-2)


def choose_experts(
    experts: Experts, logits_BTE: Array, segments_BT: Array, bias_E: Array | None = None
) -> tuple[Chosen, Routing]:
    """The experts with the largest logits, float32 [B, T, E], or scores with a bias for the choice
    (Wang et al., 2024, arXiv:2408.15664)."""
    scores_BTE, order_BTE = logits_BTE, lax.stop_gradient(logits_BTE)
    if experts.scores == "sigmoid":
        scores_BTE = jax.nn.sigmoid(logits_BTE)
        order_BTE = lax.stop_gradient(scores_BTE)
    if bias_E is not None:
        order_BTE += lax.stop_gradient(bias_E)
    order_BTE = _in_best_groups(experts, order_BTE)
    _, choices_BTC = lax.top_k(order_BTE, experts.per_token)
    # Named, so that a rematerialisation policy can save it: recomputed logits may be rounded
    # otherwise and choose others.
    choices_BTC = checkpoint_name(choices_BTC, "routing")
    probs_BTE = jax.nn.softmax(logits_BTE)
    chosen_BTC = jnp.take_along_axis(scores_BTE, choices_BTC, axis=-1)
    if experts.scores == "sigmoid":
        total_BT1 = chosen_BTC.sum(-1, keepdims=True) + TINY if experts.is_normalized else 1.0
        shares_BTC = chosen_BTC / total_BT1
    elif experts.is_normalized:  # equal to the chosen probabilities divided by their sum
        shares_BTC = jax.nn.softmax(chosen_BTC)
    else:
        shares_BTC = jnp.take_along_axis(probs_BTE, choices_BTC, axis=-1)
    shares_BTC *= experts.share_scale

    is_token_BT1 = (segments_BT != 0)[..., None]
    total = lambda a_BTX: jnp.where(is_token_BT1, a_BTX, 0).sum((0, 1))
    routing = Routing(
        total(jax.nn.one_hot(choices_BTC, experts.count).sum(-2)),
        total(probs_BTE),
        total(jnp.square(jax.nn.logsumexp(logits_BTE, -1, keepdims=True)))[0],
        is_token_BT1.sum(dtype=jnp.float32),
    )
    return Chosen(choices_BTC, shares_BTC), routing


def _in_best_groups(experts: Experts, order_BTE: Array) -> Array:
    """-inf outside the groups of experts whose two largest numbers have the largest sums."""
    if experts.groups_per_token == experts.groups:
        return order_BTE
    order_BTGE = order_BTE.reshape(*order_BTE.shape[:-1], experts.groups, -1)
    sums_BTG = lax.top_k(order_BTGE, 2)[0].sum(-1)
    _, best_BTg = lax.top_k(sums_BTG, experts.groups_per_token)
    is_best_BTG = jax.nn.one_hot(best_BTg, experts.groups, dtype=bool).any(-2)
    return jnp.where(is_best_BTG[..., None], order_BTGE, -jnp.inf).reshape(order_BTE.shape)


def refuse_idle_experts(config: TrainerConfig, decoder: DecoderConfig) -> None:
    """RecipeError for each setting of experts, if the model has none."""
    if decoder.num_expert_layers:
        return
    settings = {
        "mesh.expert": config.mesh.expert != 1,
        "arctic_moe": config.arctic_moe is True,
        "enable_routing_replay": config.enable_routing_replay,
        "router_z_loss": bool(config.router_z_loss),
    }
    what = f"needs a model with experts, which {decoder.family} has not here; remove it"
    if faults := [Fault(key, what) for key, is_on in settings.items() if is_on]:
        raise RecipeError(faults)


def add_routings(routings: Sequence[Routing | None]) -> Routing | None:
    """Their sum; None where no layer has experts."""
    found = [routing for routing in routings if routing is not None]
    return jax.tree.map(lambda *parts: sum(parts), *found) if found else None
