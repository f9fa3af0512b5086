"""Cross-entropy with all logits at once: the definition, differentiated by jax itself.

B batch, T tokens, D width, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxtrain.kernels.cross_entropy import NLL, HeadLayout


def logits(
    hidden_BTD: Array,
    head: Array,
    *,
    head_layout: HeadLayout = "DV",
    scale: float = 1.0,
    softcap: float | None = None,
) -> Array:
    """float32 [B, T, V]"""
    head_DV = head if head_layout == "DV" else head.T
    raw = jnp.einsum("btd,dv->btv", hidden_BTD, head_DV, preferred_element_type=jnp.float32)
    return softcap * jnp.tanh(raw * scale / softcap) if softcap else raw * scale


def token_log_probs(
    hidden_BTD: Array,
    head: Array,
    targets_BT: Array,
    **form: Any,
) -> Array:
    logits_BTV = logits(hidden_BTD, head, **form)
    target_BT1 = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)
    return target_BT1[..., 0] - jax.nn.logsumexp(logits_BTV, axis=-1)


def weighted_nll(
    hidden_BTD: Array,
    head: Array,
    targets_BT: Array,
    weights_BT: Array,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    **form: Any,
) -> NLL:
    hidden_BTD = jnp.where(weights_BT[..., None] != 0, hidden_BTD, 0)
    logits_BTV = logits(hidden_BTD, head, **form)
    log_probs_BTV = jax.nn.log_softmax(logits_BTV)
    target_BT = jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0]
    loss_BT = -(1 - label_smoothing) * target_BT - label_smoothing * log_probs_BTV.mean(-1)
    z_total = z_loss * jnp.sum(weights_BT * jax.nn.logsumexp(logits_BTV, axis=-1) ** 2)
    correct = jnp.sum(weights_BT * (logits_BTV.argmax(-1) == targets_BT))
    return NLL(jnp.sum(weights_BT * loss_BT) + z_total, z_total, correct)
