"""The step is pure, and how rows are cut changes nothing."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import Loss, SFTTrainer
from tests.runs import first_batch, host, loss_and_gradients, recipe, trainer


@pytest.mark.covers("gradient_accumulation_steps")
def test_accumulation_equals_one_larger_batch(tmp_path):
    whole = trainer(recipe(tmp_path, micro_batch_size=4))
    cut = trainer(recipe(tmp_path, micro_batch_size=1, gradient_accumulation_steps=4))
    trained = np.asarray(first_batch(cut).loss_weights).sum((1, 2))
    assert len(set(trained)) == 4, "the microbatches must differ in trained tokens"
    (a, grads_a), (b, grads_b) = loss_and_gradients(whole), loss_and_gradients(cut)
    assert float(a.weight) == float(b.weight)
    np.testing.assert_allclose(a.total, b.total, rtol=1e-6)
    grads_b = host(grads_b)
    for name, g in host(grads_a).items():
        assert np.abs(g - grads_b[name]).max() <= 1e-6 * np.abs(g).max(), name


def test_step_and_loss_are_pure_and_compile_once(tmp_path):
    run = trainer(recipe(tmp_path, micro_batch_size=2, train_iters=6))
    start = jax.tree.map(jnp.copy, run.state)
    batch = first_batch(run)
    key = jax.random.key(1)
    before = run.loss(start, batch, key)
    one, first = run.step(jax.tree.map(jnp.copy, start), batch)
    two, second = run.step(jax.tree.map(jnp.copy, start), batch)
    for a, b in zip(jax.tree.leaves((one, first)), jax.tree.leaves((two, second)), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(before, run.loss(start, batch, key), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    for batch in run.data.train_batches(0, 6):
        one, _ = run.step(one, run.layout.on_devices(batch))
    assert (run.step.num_compilations, run.loss.num_compilations) == (1, 1)


def test_a_batch_without_trained_tokens_changes_nothing_but_the_count(tmp_path):
    run = trainer(recipe(tmp_path))
    batch = first_batch(run)
    masked = batch._replace(loss_weights=jnp.zeros_like(batch.loss_weights))
    before = host(run.state)
    state, metrics = run.step(run.state, masked)
    assert np.isnan(metrics["loss"]) and metrics["finite"] == 1
    for name, array in host(state).items():
        if name != ".step":
            np.testing.assert_array_equal(array, before[name])
    assert int(state.step) == 1


def test_a_loss_that_is_not_finite_leaves_the_state(tmp_path):
    class Broken(SFTTrainer):
        name = "broken"

        def loss_fn(self, model, batch, key):
            loss = super().loss_fn(model, batch, key)
            return loss._replace(total=loss.total * jnp.nan)

    run = trainer(recipe(tmp_path) | {"type": "sft"}, cls=Broken)
    before = host(run.state.params)
    state, metrics = run.step(run.state, first_batch(run))
    assert metrics["finite"] == 0 and int(state.step) == 0
    for name, array in host(state.params).items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (lambda loss: loss.total, r"return Loss\(total, weight, metrics\): sums"),
        (
            lambda loss: loss._replace(total=loss.total[None]),
            r"total must be a scalar, found shape \(1,\)",
        ),
        (lambda loss: loss._replace(weight=jnp.int32(3)), "weight must be float32, found int32"),
        (lambda loss: loss._replace(metrics={"m": loss.total}), r"metric 'm' must be a pair"),
    ],
)
def test_a_loss_of_the_wrong_form_is_told_what_to_return(tmp_path, result, expected):
    class Wrong(SFTTrainer):
        name = f"wrong-{expected[:12]}"

        def loss_fn(self, model, batch, key):
            return result(super().loss_fn(model, batch, key))

    run = trainer(recipe(tmp_path), cls=Wrong)
    with pytest.raises(TypeError, match=expected):
        run.step(run.state, first_batch(run))


@pytest.mark.covers("max_grad_norm")
def test_the_norm_is_of_the_mean_gradient_and_before_clipping(tmp_path):
    run = trainer(recipe(tmp_path, max_grad_norm=1e-3))
    loss, grads = loss_and_gradients(run)
    squares = sum(float((g.astype(np.float64) ** 2).sum()) for g in host(grads).values())
    _, metrics = run.step(copy.copy(run.state), first_batch(run))
    np.testing.assert_allclose(metrics["grad_norm"], squares**0.5 / float(loss.weight), rtol=1e-5)


def test_metrics_count_the_tokens_of_the_batch(tmp_path):
    run = trainer(recipe(tmp_path, micro_batch_size=2))
    batch = next(run.data.train_batches(0, 1))
    run.state, metrics = run.step(run.state, run.layout.on_devices(batch))
    assert metrics["tokens"] == (batch.segments > 0).sum()
    assert metrics["trained_tokens"] == (batch.loss_weights > 0).sum()
    documents = [
        (row == segment).sum() for row in batch.segments[0] for segment in range(1, row.max() + 1)
    ]
    assert metrics["pairs"] == 6 * sum(n * (n + 1) // 2 for n in documents)
    assert isinstance(run.loss(run.state, run.layout.on_devices(batch), jax.random.key(0)), Loss)
