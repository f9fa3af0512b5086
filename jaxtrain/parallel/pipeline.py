"""Pipeline parallelism: the stages of a layer stack on the devices of the `pipeline` axis."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

PyTree = Any
Stage = Callable[[PyTree, jax.Array, PyTree, jax.Array], jax.Array]


def padded_stack(params: PyTree, *, stages: int) -> PyTree:
    """Stacked layers [L, ...], with zero layers behind the last so that every stage holds as
    many."""

    def pad(a: jax.Array) -> jax.Array:
        missing = -a.shape[0] % stages
        a = jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) if missing else a
        return jax.lax.with_sharding_constraint(a, P("pipeline", *[P.UNCONSTRAINED] * (a.ndim - 1)))

    return jax.tree.map(pad, params)


def gpipe(
    stage: Stage, params: PyTree, xs_MBTD: jax.Array, rows: PyTree, *, stages: int
) -> jax.Array:
    """Microbatches through all stages, all forward and then, by autodiff, all backward (Huang et
    al. 2019, arXiv:1811.06965).

    `stage(params, x_BTD, rows, first_layer)` runs the layers of one stage on one microbatch;
    `params` are stacked layers [stages * n, ...] and `rows` what belongs to each microbatch, leaves
    [M, ...]. Returns hidden states [M, B, T, D] as the last stage leaves them. M + stages - 1
    ticks, of which a device idles for stages - 1. Traced under a mesh with a `pipeline` axis of
    size `stages` > 1.
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
    def run(params: PyTree, xs: jax.Array, rows: PyTree) -> jax.Array:
        rank = jax.lax.axis_index("pipeline")
        first_layer = rank * jax.tree.leaves(params)[0].shape[0]

        def tick(carry: tuple[jax.Array, jax.Array], t: jax.Array):
            received, done = carry
            busy = (t >= rank) & (t - rank < num_microbatches)
            m = jnp.clip(t - rank, 0, num_microbatches - 1)
            x = jnp.where(rank == 0, xs[m].astype(dtype), received)
            mine = jax.tree.map(lambda a: a[m], rows)
            y = jax.lax.cond(busy, lambda: stage(params, x, mine, first_layer), lambda: x)
            last = busy & (rank == stages - 1)
            done = done.at[m].set(jnp.where(last, y, done[m]))
            return (jax.lax.ppermute(y, "pipeline", ring), done), None

        start = (jnp.zeros(xs.shape[1:], dtype), jnp.zeros(xs.shape, dtype))
        ticks = jnp.arange(num_microbatches + stages - 1)
        (_, done), _ = jax.lax.scan(jax.checkpoint(tick), start, ticks)
        return done[None]

    # The gradient of an input that every stage holds is summed over the stages. In float32: the
    # sum of bfloat16 over one axis of several aborts XLA on CPU.
    return run(params, xs_MBTD.astype(jnp.float32), rows)[-1]
