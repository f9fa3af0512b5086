"""The training step: a pure function from (state, batch) to (state, metrics).

Batches arrive as M microbatches of B sequences, cut on the host: leaves [M, B, ...]. The loss, its
weight and the gradient of the loss are summed over the microbatches and divided once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.batch import Batch
from jaxtrain.trainer.loss import Loss, check_loss, compute_means
from jaxtrain.trainer.state import PyTree, TrainState, apply_if

Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Batch, jax.Array], Loss]


class Objective(NamedTuple):
    """What is trained, as pure functions: all that the step knows of a trainer."""

    merge: Callable[[PyTree, PyTree], Any]
    """parameters, `TrainState.frozen` → the model that the loss functions receive"""
    loss_fn: LossFn
    eval_fn: LossFn
    """what an evaluation sums"""
    on_gradients: Callable[[PyTree], PyTree]
    """summed gradients of a microbatch → what the optimizer is to receive of them"""
    measure: Callable[[PyTree], Metrics]
    """mean gradients, before clipping → metrics of them"""
    survey: Callable[[Any, Batch], PyTree] = lambda model, batch: None
    """model, microbatch → what the loss of every microbatch depends on, summed over all of them;
    called only where there are several"""


class StepSpec(NamedTuple):
    """What is fixed while a run is stepping."""

    objective: Objective
    optimizer: optax.GradientTransformation
    """of what is trained; its updates are at the peak learning rate"""
    schedule: Callable[[jax.Array], jax.Array]
    """step → fraction of the peak learning rate"""
    average: Callable[[PyTree, PyTree, jax.Array], PyTree]
    """average so far, new parameters, step → their average"""
    select_trained: Callable[[PyTree], PyTree]
    """parameters → those that are trained"""
    replace_trained: Callable[[PyTree, PyTree], PyTree]
    """parameters, new values of those that are trained → parameters"""
    max_grad_norm: float
    """0 is off"""
    seed: int
    count: Callable[[Batch], Metrics]
    """what else to report of a batch: its tokens"""
    compute_shardings: PyTree
    """where the parameters live that the loss reads; the state may hold less of them on a device"""
    grad_shardings: PyTree
    """where the gradients of what is trained are summed"""
    whole_batch: bool
    """call `loss_fn` once on all microbatches; a pipeline cuts them up itself"""
    sequences_per_sample: int = 1
    """neighbouring sequences that stay neighbours, such as those of a pair"""


def step(spec: StepSpec, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One optimizer step.

    A batch in which nothing is trained, or whose loss or gradient norm is not finite, leaves
    parameters and optimizer state as they are; the latter does not count as a step,
    `metrics["finite"]` is 0 then.
    """
    key = jax.random.fold_in(jax.random.key(spec.seed), state.step)
    loss, gradients = grads(spec, state.params, state.frozen, batch, key, state.step)

    per_weight = 1 / jnp.maximum(loss.weight, jnp.finfo(jnp.float32).tiny)
    norm = optax.tree.norm(gradients) * per_weight
    clip = jnp.minimum(1.0, spec.max_grad_norm / norm) if spec.max_grad_norm else 1.0
    lr_scale = spec.schedule(state.step)

    def update(state: TrainState, gradients: PyTree) -> TrainState:
        gradients = jax.tree.map(lambda g: (g * (per_weight * clip)).astype(g.dtype), gradients)
        trained = spec.select_trained(state.params)
        updates, opt_state = spec.optimizer.update(gradients, state.opt_state, trained)
        trained = jax.tree.map(lambda p, u: p + (lr_scale * u).astype(p.dtype), trained, updates)
        params = spec.replace_trained(state.params, trained)
        average = spec.average(state.average, params, state.step)
        return state._replace(params=params, opt_state=opt_state, average=average)

    finite = jnp.isfinite(loss.total) & jnp.isfinite(norm)
    state = apply_if(finite & (loss.weight > 0), update, state, gradients)
    metrics = spec.count(batch) | compute_means(loss)
    metrics |= spec.objective.measure(jax.tree.map(lambda g: g * per_weight, gradients))
    metrics |= {"grad_norm": norm, "lr_scale": lr_scale, "finite": finite.astype(jnp.float32)}
    return state._replace(step=state.step + finite.astype(jnp.int32)), metrics


def loss(spec: StepSpec, params: PyTree, state: TrainState, batch: Batch, key: jax.Array) -> Loss:
    """The summed evaluation loss of a batch with `params`, those of the state or an average."""
    params = jax.lax.with_sharding_constraint(params, spec.compute_shardings)

    def one(microbatch: Batch, key: jax.Array) -> Loss:
        microbatch = microbatch._replace(step=state.step, is_training=False)
        model = spec.objective.merge(params, state.frozen)
        return check_loss(spec.objective.eval_fn(model, microbatch, key), spec.objective.eval_fn)

    return _sum_over_microbatches(spec, batch, key, one)


def grads(
    spec: StepSpec,
    params: PyTree,
    frozen: PyTree,
    batch: Batch,
    key: jax.Array,
    step: jax.Array | int = 0,
) -> tuple[Loss, PyTree]:
    """The summed loss of a batch, and the float32 gradient of its total by what is trained; the one
    place that differentiates."""
    # Gathered here, if at all: once for all microbatches.
    params = jax.lax.with_sharding_constraint(params, spec.compute_shardings)
    whole = None
    if batch.tokens.shape[0] > 1 and not spec.whole_batch:
        model = spec.objective.merge(params, frozen)
        survey = lambda microbatch, key: spec.objective.survey(model, microbatch)
        whole = _sum_over_microbatches(spec, batch, key, survey)

    def one(microbatch: Batch, key: jax.Array) -> tuple[Loss, PyTree]:
        microbatch = microbatch._replace(step=step, is_training=True, whole=whole)

        def total(trained: PyTree) -> tuple[jax.Array, Loss]:
            model = spec.objective.merge(spec.replace_trained(params, trained), frozen)
            loss_fn = spec.objective.loss_fn
            loss = check_loss(loss_fn(model, microbatch, key), loss_fn)
            return loss.total, loss

        differentiate = jax.value_and_grad(total, has_aux=True)
        (_, loss), gradients = differentiate(spec.select_trained(params))
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
        # Said here, since the compiler may else gather the gradients of all shards on every device.
        gradients = jax.lax.with_sharding_constraint(gradients, spec.grad_shardings)
        return loss, spec.objective.on_gradients(gradients)

    return _sum_over_microbatches(spec, batch, key, one)


def _sum_over_microbatches(
    spec: StepSpec, batch: Batch, key: jax.Array, one: Callable[[Batch, jax.Array], Any]
) -> Any:
    """The sum of `one(microbatch, key)` over the microbatches of a batch."""
    num_microbatches = batch.tokens.shape[0]
    if spec.whole_batch:
        return one(jax.tree.map(partial(_samples_first, spec.sequences_per_sample), batch), key)
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
