"""The training step: a pure function from (state, batch) to (state, metrics).

Batches arrive as M microbatches of B sequences, cut on the host: leaves [M, B, ...]. The loss, its
weight and the gradient of the loss are summed over the microbatches and divided once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.batch import Batch
from jaxtrain.parallel.host_memory import call_on_devices
from jaxtrain.trainer.loss import Loss, check_loss, compute_means
from jaxtrain.trainer.loss_scale import Scaling, lift_factor
from jaxtrain.trainer.microbatches import sum_over_microbatches
from jaxtrain.trainer.state import Moving, PyTree, TrainState, Update

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
    """average so far, new parameters, step → their average; of any of them"""
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
    scaling: Scaling
    apply_if: Callable[[jax.Array, Update, Moving, PyTree], Moving]
    """whether, how, what, gradients → what it has become: the update, where it is to be made"""
    sequences_per_sample: int = 1
    """neighbouring sequences that stay neighbours, such as those of a pair"""

    def sum_over_microbatches(
        self, batch: Batch, key: jax.Array, one: Callable[[Batch, jax.Array], Any]
    ) -> Any:
        """The sum of `one(microbatch, key)` over the microbatches of a batch."""
        how = {"whole_batch": self.whole_batch, "sequences_per_sample": self.sequences_per_sample}
        return sum_over_microbatches(batch, key, one, **how)


def step(spec: StepSpec, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One optimizer step.

    A batch in which nothing is trained, or whose loss or gradient norm is not finite, leaves
    parameters and optimizer state as they are; the latter does not count as a step,
    `metrics["finite"]` is 0 then.
    """
    key = jax.random.fold_in(jax.random.key(spec.seed), state.step)
    scale = spec.scaling.of(state.loss_scale)
    loss, gradients = grads(spec, state.params, state.frozen, batch, key, state.step, scale)

    per_weight = 1 / jnp.maximum(loss.weight, jnp.finfo(jnp.float32).tiny)
    norm = optax.tree.norm(gradients) * per_weight
    clip = jnp.minimum(1.0, spec.max_grad_norm / norm) if spec.max_grad_norm else 1.0
    lr_scale = spec.schedule(state.step)

    def update(moving: Moving, gradients: PyTree) -> Moving:
        gradients = jax.tree.map(lambda g: (g * (per_weight * clip)).astype(g.dtype), gradients)
        updates, opt_state = spec.optimizer.update(gradients, moving.opt_state, moving.trained)
        change = lambda p, u: p + (lr_scale * u).astype(p.dtype)
        trained = jax.tree.map(change, moving.trained, updates)
        return Moving(trained, opt_state, spec.average(moving.average, trained, state.step))

    finite = jnp.isfinite(loss.total) & jnp.isfinite(norm)
    trained, average = (spec.select_trained(t) if t else t for t in (state.params, state.average))
    moving = Moving(trained, state.opt_state, average)
    moved = spec.apply_if(finite & (loss.weight > 0), update, moving, gradients)
    state = state._replace(
        params=spec.replace_trained(state.params, moved.trained),
        opt_state=moved.opt_state,
        average=spec.replace_trained(state.average, moved.average) if average else average,
    )
    metrics = spec.count(batch) | compute_means(loss)
    metrics |= spec.objective.measure(jax.tree.map(lambda g: g * per_weight, gradients))
    metrics |= {"grad_norm": norm, "lr_scale": lr_scale, "finite": finite.astype(jnp.float32)}
    metrics |= spec.scaling.metrics(state.loss_scale, finite)
    loss_scale = spec.scaling.update(state.loss_scale, finite)
    return state._replace(step=state.step + finite, loss_scale=loss_scale), metrics


def loss(spec: StepSpec, params: PyTree, state: TrainState, batch: Batch, key: jax.Array) -> Loss:
    """The summed evaluation loss of a batch with `params`, those of the state or an average."""
    params = jax.lax.with_sharding_constraint(params, spec.compute_shardings)

    def one(microbatch: Batch, key: jax.Array) -> Loss:
        microbatch = microbatch._replace(step=state.step, is_training=False)
        model = spec.objective.merge(params, state.frozen)
        return check_loss(spec.objective.eval_fn(model, microbatch, key), spec.objective.eval_fn)

    return spec.sum_over_microbatches(batch, key, one)


def grads(
    spec: StepSpec,
    params: PyTree,
    frozen: PyTree,
    batch: Batch,
    key: jax.Array,
    step: jax.Array | int = 0,
    scale: jax.Array | None = None,
) -> tuple[Loss, PyTree]:
    """The summed loss of a batch, and the float32 gradient of its total by what is trained; the one
    place that differentiates. On the way the loss is multiplied as `scale` says."""
    # Gathered here, if at all: once for all microbatches.
    params = jax.lax.with_sharding_constraint(params, spec.compute_shardings)
    whole = None
    if batch.tokens.shape[0] > 1 and not spec.whole_batch:
        model = spec.objective.merge(params, frozen)
        survey = lambda microbatch, key: spec.objective.survey(model, microbatch)
        whole = spec.sum_over_microbatches(batch, key, survey)

    def one(microbatch: Batch, key: jax.Array) -> tuple[Loss, PyTree]:
        microbatch = microbatch._replace(step=step, is_training=True, whole=whole)

        def total(trained: PyTree) -> tuple[jax.Array, Any]:
            model = spec.objective.merge(spec.replace_trained(params, trained), frozen)
            loss_fn = spec.objective.loss_fn
            loss = check_loss(loss_fn(model, microbatch, key), loss_fn)
            factor = lift_factor(scale, loss.weight)
            return loss.total * factor, (loss, factor)

        differentiate = jax.value_and_grad(total, has_aux=True)
        (_, (loss, factor)), gradients = differentiate(spec.select_trained(params))
        in_float32 = lambda g: g.astype(jnp.float32) / factor
        gradients = jax.tree.map(in_float32, call_on_devices(gradients))
        # Said here, since the compiler may else gather the gradients of all shards on every device.
        gradients = jax.lax.with_sharding_constraint(gradients, spec.grad_shardings)
        return loss, spec.objective.on_gradients(gradients)

    return spec.sum_over_microbatches(batch, key, one)
