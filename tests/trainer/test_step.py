"""The step is pure, and how rows are cut changes nothing."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import Loss, SFTTrainer
from jaxtrain.trainer import step as pure
from tests.runs import assert_same, first_batch, host, loss_and_gradients, recipe, trainer


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


@pytest.mark.parametrize(
    "change",
    [
        lambda total, zero: total * jnp.nan,
        lambda total, zero: total + jnp.inf,  # the gradient is finite
        lambda total, zero: total + jnp.sqrt(zero),  # the gradient alone is not
    ],
    ids=["both", "the loss", "its gradient"],
)
def test_what_is_not_finite_leaves_the_state(tmp_path, change):
    class Broken(SFTTrainer):
        name = "broken"

        def loss_fn(self, model, batch, key):
            loss = super().loss_fn(model, batch, key)
            return loss._replace(total=change(loss.total, 0 * model.norm[...].sum()))

    run = trainer(recipe(tmp_path) | {"type": "sft"}, cls=Broken)
    before = host(run.state)
    state, metrics = run.step(run.state, first_batch(run))
    assert metrics["finite"] == 0 and int(state.step) == 0
    assert_same(state, before)


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


@pytest.mark.parametrize(
    "limit",
    [pytest.param(0, marks=pytest.mark.slow), 0.1, 1e3],
    ids=["off", "below the norm", "above it"],
)
def test_an_update_is_of_the_mean_gradient_clipped_to_the_norm(tmp_path, limit):
    """Steps of plain SGD in a warmup, the first of which changes nothing."""
    changes = {
        "optimizer": {"type": "sgd", "lr": 0.5, "weight_decay": 0}, "max_grad_norm": limit,
        "scheduler": {"warmup_steps": 4}, "gradient_accumulation_steps": 2, "train_iters": 8,
    }  # fmt: skip
    run = trainer(recipe(tmp_path, **changes))
    batch, first = first_batch(run), host(run.state.params)
    loss, grads = loss_and_gradients(run)
    run.state, metrics = run.step(run.state, batch)
    norm = float(metrics["grad_norm"])
    assert 0.1 < norm < 1e3
    assert_same(run.state.params, first)
    run.state, _ = run.step(run.state, batch)
    rate = 0.5 / 4 * (min(1, limit / norm) if limit else 1)
    found = host(run.state.params)
    for name, g in host(grads).items():
        moved = rate * g / float(loss.weight)
        assert np.abs(first[name] - found[name] - moved).max() <= 1e-3 * np.abs(moved).max(), name


@pytest.mark.covers("seed")
def test_every_microbatch_of_every_step_has_a_key_of_its_own(tmp_path):
    class Drawing(SFTTrainer):
        """Reports the sums of its draws and of their squares."""

        name = "drawing"

        def loss_fn(self, model, batch, key):
            draw, one = jax.random.uniform(key), jnp.float32(1)
            metrics = {"mean": (draw, one), "square": (draw**2, one)}
            return super().loss_fn(model, batch, key)._replace(metrics=metrics)

    def draws(seed):
        """The two draws of each of three steps on one batch."""
        written = recipe(tmp_path, gradient_accumulation_steps=2, seed=seed)
        run, found = trainer(written, cls=Drawing), []
        batch = first_batch(run)
        for _ in range(3):
            run.state, metrics = run.step(run.state, batch)
            mean, square = float(metrics["mean"]), float(metrics["square"])
            apart = max(0.0, square - mean**2) ** 0.5
            found += [round(mean - apart, 4), round(mean + apart, 4)]
        return found

    assert draws(1) == draws(1)
    assert len({*draws(1), *draws(2)}) == 12


def test_gradients_of_weights_in_bfloat16_are_summed_in_float32(tmp_path):
    changes = {"model": {"param_dtype": "bfloat16"}, "gradient_accumulation_steps": 8}
    run = trainer(recipe(tmp_path, **changes))
    batch, key = first_batch(run), jax.random.key(0)
    gradient = jax.jit(lambda p, b: pure.grads(run.step_spec, p, {}, b, key)[1])
    with jax.set_mesh(run.mesh):
        cut = [jax.tree.map(lambda a, i=i: a[i : i + 1], batch) for i in range(8)]
        parts = [host(gradient(run.state.params, microbatch)) for microbatch in cut]
    for name, array in host(loss_and_gradients(run)[1]).items():
        assert array.dtype == np.float32, name
        summed = sum(part[name].astype(np.float64) for part in parts)
        assert np.linalg.norm(array - summed) <= 5e-4 * np.linalg.norm(summed), name


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
