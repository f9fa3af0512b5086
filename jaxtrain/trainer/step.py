"""The training step: a pure function from (state, batch) to (state, metrics).

Batches arrive as M microbatches of B rows, cut on the host: leaves [M, B, T]. The loss, its weight
and the gradient of the loss are summed over them and divided once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.batch import Batch
from jaxtrain.trainer.loss import Loss, checked, means
from jaxtrain.trainer.state import PyTree, TrainState

Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Batch, jax.Array], Loss]


class StepSpec(NamedTuple):
    """What is fixed while a run is stepping."""

    merge: Callable[[PyTree], Any]
    """parameters → the model that `loss_fn` is given"""
    loss_fn: LossFn
    on_gradients: Callable[[PyTree], PyTree]
    """what callbacks make of the summed gradients of a microbatch"""
    measure: Callable[[PyTree], Metrics]
    """mean gradients, before clipping → what callbacks report of them"""
    optimizer: optax.GradientTransformation
    """updates at the peak rate"""
    schedule: Callable[[jax.Array], jax.Array]
    """update number → share of the peak rate"""
    average: Callable[[PyTree, PyTree, jax.Array], PyTree]
    """average so far, new parameters, update number → their average"""
    max_grad_norm: float
    """0 is off"""
    seed: int
    counts: Callable[[Batch], Metrics]
    """what else to report of a batch: its tokens"""
    compute_shardings: PyTree
    """where the parameters live that the loss reads; the state may hold less of them on a device"""
    grad_shardings: PyTree
    """where the gradients are summed"""
    whole_batch: bool
    """call `loss_fn` once on all microbatches; a pipeline cuts them up itself"""


def step(spec: StepSpec, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One optimizer update.

    A batch in which nothing is trained, or whose loss or gradient norm is not finite, leaves
    parameters and optimizer state as they are; the latter is no update, `metrics["finite"]` is 0
    then.
    """
    key = jax.random.fold_in(jax.random.key(spec.seed), state.step)
    loss, grads = loss_and_grads(spec, state.params, batch, key, state.step)

    per_weight = 1 / jnp.maximum(loss.weight, jnp.finfo(jnp.float32).tiny)
    norm = optax.tree.norm(grads) * per_weight
    clip = jnp.minimum(1.0, spec.max_grad_norm / norm) if spec.max_grad_norm else 1.0
    share = spec.schedule(state.step)

    def updated(state: TrainState, grads: PyTree) -> TrainState:
        grads = jax.tree.map(lambda g: (g * (per_weight * clip)).astype(g.dtype), grads)
        updates, opt_state = spec.optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p + (share * u).astype(p.dtype), state.params, updates)
        average = spec.average(state.average, params, state.step)
        return state._replace(params=params, opt_state=opt_state, average=average)

    finite = jnp.isfinite(loss.total) & jnp.isfinite(norm)
    state = apply_if(finite & (loss.weight > 0), updated, state, grads)
    metrics = spec.counts(batch) | means(loss)
    metrics |= spec.measure(jax.tree.map(lambda g: g * per_weight, grads))
    metrics |= {"grad_norm": norm, "lr_share": share, "finite": finite.astype(jnp.float32)}
    return state._replace(step=state.step + finite.astype(jnp.int32)), metrics


def apply_if(
    ok: jax.Array,
    update: Callable[[TrainState, PyTree], TrainState],
    state: TrainState,
    grads: PyTree,
) -> TrainState:
    """`update(state, grads)` where `ok`, else `state` bit for bit; either way in its memory."""
    # A loop of one turn or none, since XLA updates what a loop carries in place. It copies the
    # whole state out of a `cond` on GPU, and on CPU a `where` keeps the old and the new one alive.
    # The barrier keeps products of the gradients alone, two more trees of them, inside the loop.
    body = lambda _, state: update(*jax.lax.optimization_barrier((state, grads)))
    return jax.lax.fori_loop(0, ok.astype(jnp.int32), body, state)


def loss(
    spec: StepSpec, params: PyTree, batch: Batch, key: jax.Array, step: jax.Array | int = 0
) -> Loss:
    """The summed loss of a batch, without a gradient."""
    params = jax.lax.with_sharding_constraint(params, spec.compute_shardings)
    one = lambda rows, key: _call(spec, params, rows._replace(step=step), key)
    return _over_microbatches(spec, batch, key, one)


def loss_and_grads(
    spec: StepSpec, params: PyTree, batch: Batch, key: jax.Array, step: jax.Array | int = 0
) -> tuple[Loss, PyTree]:
    """The summed loss of a batch and the gradient of its total."""
    # Gathered here, if at all: once for all microbatches.
    params = jax.lax.with_sharding_constraint(params, spec.compute_shardings)

    def one(rows: Batch, key: jax.Array) -> tuple[Loss, PyTree]:
        def total(params: PyTree) -> tuple[jax.Array, Loss]:
            loss = _call(spec, params, rows._replace(step=step), key)
            return loss.total, loss

        (_, loss), grads = jax.value_and_grad(total, has_aux=True)(params)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        # Said here, since the compiler may else gather the gradients of all shards on every device.
        grads = jax.lax.with_sharding_constraint(grads, spec.grad_shardings)
        return loss, spec.on_gradients(grads)

    return _over_microbatches(spec, batch, key, one)


def _call(spec: StepSpec, params: PyTree, rows: Batch, key: jax.Array) -> Loss:
    name = getattr(spec.loss_fn, "__qualname__", "loss_fn")
    return checked(spec.loss_fn(spec.merge(params), rows, key), name)


def _over_microbatches(
    spec: StepSpec, batch: Batch, key: jax.Array, one: Callable[[Batch, jax.Array], Any]
) -> Any:
    """The sum of `one(rows, key)` over the microbatches of a batch."""
    num_microbatches = batch.tokens.shape[0]
    if spec.whole_batch:
        return one(jax.tree.map(_rows_first, batch), key)
    if num_microbatches == 1:
        return one(jax.tree.map(lambda a: a[0], batch), key)

    def body(total: Any, x: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(*x)), None

    keys = jax.random.split(key, num_microbatches)
    first = jax.tree.map(lambda a: a[0], batch)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(one, first, keys[0]))
    return jax.lax.scan(body, zeros, (batch, keys))[0]


def _rows_first(a: jax.Array) -> jax.Array:
    """[M, B, ...] → [B * M, ...]. Rows lead, so that each device keeps its own rows."""
    return a.swapaxes(0, 1).reshape(-1, *a.shape[2:])
