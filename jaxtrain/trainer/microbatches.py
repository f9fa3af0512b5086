"""Sums over the microbatches of a batch, [M, B, ...]."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.batch import Batch


def sum_over_microbatches(
    batch: Batch,
    key: jax.Array,
    one: Callable[[Batch, jax.Array], Any],
    *,
    whole_batch: bool,
    sequences_per_sample: int,
) -> Any:
    """The sum of `one(microbatch, key)`; with `whole_batch` it is called once, on all of them."""
    num_microbatches = batch.tokens.shape[0]
    if whole_batch:
        return one(jax.tree.map(partial(_samples_first, sequences_per_sample), batch), key)
    first = jax.tree.map(lambda a: a[0], batch)
    if num_microbatches == 1:
        return one(first, key)

    def body(total: Any, x: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(*x)), None

    keys = jax.random.split(key, num_microbatches)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(one, first, keys[0]))
    return jax.lax.scan(body, zeros, (batch, keys))[0]


def _samples_first(sequences_per_sample: int, a: jax.Array) -> jax.Array:
    """[M, B, ...] → [B * M, ...]. Samples lead, so that each device keeps its own."""
    samples = a.reshape(a.shape[0], -1, sequences_per_sample, *a.shape[2:])
    return samples.swapaxes(0, 1).reshape(-1, *a.shape[2:])
