"""What a loss function returns: sums, never means."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Loss(NamedTuple):
    """Sums over the trained tokens (or pairs) of a batch. The step adds them up over microbatches,
    devices and hosts and divides once, so a loss does not depend on how a batch was cut."""

    total: jax.Array
    """float32 []: in nats"""
    weight: jax.Array
    """float32 []: what to divide by"""
    metrics: dict[str, tuple[jax.Array, jax.Array]] = {}
    """name → (sum, weight), each float32 []"""


def weigh_documents(weights_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Weights that sum to 1 over each document of a packed sequence; 0 where nothing is trained."""

    def weigh(weights_T: jax.Array, segments_T: jax.Array) -> jax.Array:
        sums = jax.ops.segment_sum(weights_T, segments_T, num_segments=len(segments_T) + 1)
        return weights_T / jnp.where(sums > 0, sums, 1)[segments_T]

    return jax.vmap(weigh)(weights_BT, segments_BT)


def add_losses(a: Loss, b: Loss) -> Loss:
    """The loss of two batches together."""
    return jax.tree.map(lambda x, y: x + y, a, b)


def compute_means(loss: Loss) -> dict[str, jax.Array]:
    """The loss and its metrics, each divided by its weight; NaN where nothing was trained."""
    values = {"loss": (loss.total, loss.weight), **loss.metrics}
    return {name: jnp.where(w > 0, s / w, jnp.nan) for name, (s, w) in values.items()}


def eval_metrics(prefix: str, loss: Loss, unit: str) -> dict[str, float]:
    """What an evaluation reports: means, perplexity, and how many tokens or samples, which `unit`
    says, they are means over."""
    metrics = {f"{prefix}/{name}": float(mean) for name, mean in compute_means(loss).items()}
    perplexity = math.exp(min(metrics[f"{prefix}/loss"], 700.0))
    return metrics | {f"{prefix}/perplexity": perplexity, f"{prefix}/{unit}s": float(loss.weight)}


def check_loss(loss: Any, function: Any) -> Loss:
    """Returns the loss of a user's function if it is a `Loss` of scalars; TypeError else."""
    where = getattr(function, "__qualname__", "loss_fn")
    right = "return Loss(total, weight, metrics): sums over the batch, float32 scalars"
    if not isinstance(loss, Loss):
        raise TypeError(f"{where} returned {type(loss).__name__}; {right}")
    parts = {"total": loss.total, "weight": loss.weight}
    for name, pair in loss.metrics.items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(
                f"{where}: metric {name!r} must be a pair (sum, weight), found {pair!r}"
            )
        parts |= {f"metrics[{name!r}][{i}]": part for i, part in enumerate(pair)}
    for name, part in parts.items():
        if jnp.shape(part) != ():
            raise TypeError(
                f"{where}: {name} must be a scalar, found shape {jnp.shape(part)}; {right}"
            )
    for name in ("total", "weight"):
        if not jnp.issubdtype(jnp.result_type(parts[name]), jnp.floating):
            kind = jnp.result_type(parts[name])
            raise TypeError(f"{where}: {name} must be float32, found {kind}; {right}")
    return jax.tree.map(lambda part: jnp.asarray(part, jnp.float32), loss)
