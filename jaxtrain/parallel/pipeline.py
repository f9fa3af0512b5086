"""Pipeline parallelism: the stages of a layer stack on the devices of the `pipeline` axis."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

PyTree = Any
Stage = Callable[[PyTree, jax.Array, PyTree, jax.Array], jax.Array]


def pad_stack(params: PyTree, *, stages: int) -> PyTree:
    """Pads stacked layers [L, ...] with zeros, so that every stage holds equally many."""

    def pad(a: jax.Array) -> jax.Array:
        missing = -a.shape[0] % stages
        a = jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) if missing else a
        return jax.lax.with_sharding_constraint(a, P("pipeline", *[P.UNCONSTRAINED] * (a.ndim - 1)))

    return jax.tree.map(pad, params)


def gpipe(
    stage: Stage, params: PyTree, xs_MBTD: jax.Array, inputs: PyTree, *, stages: int
) -> jax.Array:
    """Runs microbatches through all stages, forward and then, by autodiff, backward (Huang et al.
    2019, arXiv:1811.06965).

    `stage(params, x_BTD, inputs, first_layer)` runs the layers of one stage on one microbatch;
    `params` are stacked layers [stages * n, ...]; `inputs` hold the further inputs of each
    microbatch, leaves [M, ...]. Returns the last stage's hidden states [M, B, T, D]. Takes
    M + stages - 1 ticks, of which a device idles for stages - 1. Trace it under a mesh with a
    `pipeline` axis of size `stages` > 1.
    """
    dtype, num_microbatches = xs_MBTD.dtype, xs_MBTD.shape[0]
    ring = [(i, (i + 1) % stages) for i in range(stages)]

    @partial(
        jax.shard_map,
        axis_names={"pipeline"},
        check_vma=False,
        in_specs=(P("pipeline"), P(), P()),
        out_specs=P("pipeline"),
    )
    def run(params: PyTree, xs: jax.Array, inputs: PyTree) -> jax.Array:
        rank = jax.lax.axis_index("pipeline")
        first_layer = rank * jax.tree.leaves(params)[0].shape[0]

        def tick(carry: tuple[jax.Array, jax.Array], t: jax.Array):
            received, outputs = carry
            busy = (t >= rank) & (t - rank < num_microbatches)
            m = jnp.clip(t - rank, 0, num_microbatches - 1)
            x = jnp.where(rank == 0, xs[m].astype(dtype), received)
            own_inputs = jax.tree.map(lambda a: a[m], inputs)
            y = jax.lax.cond(busy, lambda: stage(params, x, own_inputs, first_layer), lambda: x)
            last = busy & (rank == stages - 1)
            outputs = outputs.at[m].set(jnp.where(last, y, outputs[m]))
            return (jax.lax.ppermute(y, "pipeline", ring), outputs), None

        start = (jnp.zeros(xs.shape[1:], dtype), jnp.zeros(xs.shape, dtype))
        ticks = jnp.arange(num_microbatches + stages - 1)
        (_, outputs), _ = jax.lax.scan(jax.checkpoint(tick), start, ticks)
        return outputs[None]

    # The gradient of an input that every stage holds is summed over the stages: in float32, since
    # a bfloat16 sum over one of several axes aborts XLA on CPU.
    return run(params, xs_MBTD.astype(jnp.float32), inputs)[-1]
