"""What the built-in objective adds to the likelihood, and what it weighs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import Loss, SFTTrainer
from tests.runs import first_batch, host, loss_and_gradients, recipe, trainer

KEY = jax.random.key(0)


def by_definition(run, batch, *, z_loss=0.0, smoothing=0.0, weights=None):
    """(told loss, gradient of what is trained), from all logits at once."""
    rows = jax.tree.map(lambda a: a[0], batch)
    weights = rows.loss_weights if weights is None else weights

    def trained(params):
        logits = run.language_model.merge(params)(rows)[:, :-1]
        log_probs = jax.nn.log_softmax(logits)
        targets, w = rows.tokens[:, 1:, None], weights[:, 1:]
        nll = -jnp.take_along_axis(log_probs, targets, -1)[..., 0]
        nll = (1 - smoothing) * nll - smoothing * log_probs.mean(-1)
        z = z_loss * jax.nn.logsumexp(logits, -1) ** 2
        return (w * (nll + z)).sum(), ((w * nll).sum(), (w * z).sum())

    differentiate = jax.jit(jax.value_and_grad(trained, has_aux=True))
    (_, told), grads = differentiate(run.state.params)
    return told, host(grads)


def assert_close(found, expected):
    found = host(found)
    for name, array in expected.items():
        assert np.abs(found[name] - array).max() <= 2e-5 * np.abs(array).max(), name


@pytest.mark.covers("z_loss")
def test_z_loss_is_trained_and_told_apart(tmp_path):
    run = trainer(recipe(tmp_path, micro_batch_size=2, z_loss=0.01))
    batch = first_batch(run)
    (nll, z), expected = by_definition(run, batch, z_loss=0.01)
    loss, grads = loss_and_gradients(run)
    np.testing.assert_allclose(loss.total, nll, rtol=1e-5)
    assert_close(grads, expected)
    _, metrics = run.step(run.state, batch)
    np.testing.assert_allclose(metrics["z_loss"], z / loss.weight, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], nll / loss.weight, rtol=1e-5)


@pytest.mark.covers("label_smoothing")
def test_smoothing_is_trained_and_not_evaluated(tmp_path):
    run = trainer(recipe(tmp_path, micro_batch_size=2, label_smoothing=0.2))
    batch = first_batch(run)
    (nll, _), expected = by_definition(run, batch, smoothing=0.2)
    loss, grads = loss_and_gradients(run)
    np.testing.assert_allclose(loss.total, nll, rtol=1e-5)
    assert_close(grads, expected)
    (plain, _), _ = by_definition(run, batch)
    np.testing.assert_allclose(run.loss(run.state, batch, KEY).total, plain, rtol=1e-5)


def test_an_objective_of_the_user_is_evaluated_as_it_is(tmp_path):
    class Doubled(SFTTrainer):
        name = "doubled-of-test-loss"

        def loss_fn(self, model, batch, key):
            loss = super().loss_fn(model, batch, key)
            return Loss(2 * loss.total, loss.weight)

    run = trainer(recipe(tmp_path, label_smoothing=0.2), cls=Doubled)
    batch = first_batch(run)
    (plain, _), _ = by_definition(run, batch)
    np.testing.assert_allclose(run.loss(run.state, batch, KEY).total, 2 * plain, rtol=1e-5)


@pytest.mark.covers("loss_weighting")
def test_by_sample_each_document_counts_once(tmp_path):
    run = trainer(recipe(tmp_path, micro_batch_size=2, loss_weighting="sample"))
    batch = first_batch(run)
    rows = jax.tree.map(lambda a: np.asarray(a[0]), batch)
    weights, documents = np.zeros_like(rows.loss_weights), 0
    for row, segments in enumerate(rows.segments):
        for segment in range(1, segments.max() + 1):
            mine = (segments == segment) & (rows.loss_weights[row] > 0)
            weights[row, mine] = 1 / mine.sum()
            documents += 1
    assert documents > 2
    (nll, _), expected = by_definition(run, batch, weights=jnp.asarray(weights))
    loss, grads = loss_and_gradients(run)
    np.testing.assert_allclose([loss.total, loss.weight], [nll, documents], rtol=1e-5)
    assert_close(grads, expected)


@pytest.mark.parametrize(
    ("rows", "pieces"), [(8, 1), (2, 4)], ids=["one microbatch", "four microbatches"]
)
def test_by_sample_packing_and_cutting_change_nothing(tmp_path, rows, pieces):
    """The evaluation of all documents, and the gradient of all, packed or one to a row."""
    common = {"rows": 8, "loss_weighting": "sample", "train_iters": 1}
    packed = trainer(
        recipe(
            tmp_path / "packed", micro_batch_size=rows, gradient_accumulation_steps=pieces, **common
        )
    )
    apart = trainer(
        recipe(tmp_path / "apart", micro_batch_size=8, data={"pack_samples": False}, **common)
    )
    assert packed.data.steps_per_epoch == apart.data.steps_per_epoch == 1
    (a, grads_a), (b, grads_b) = map(loss_and_gradients, (packed, apart))
    np.testing.assert_allclose([a.total, a.weight], [b.total, 8], rtol=1e-5)
    assert_close(grads_a, host(grads_b))


def test_an_evaluation_by_sample_says_over_how_many(tmp_path):
    changes = {"data": {"train_eval_split": [0.75, 0.25]}, "eval_interval": 1, "train_iters": 1}
    metrics = trainer(recipe(tmp_path, rows=8, loss_weighting="sample", **changes)).train().metrics
    np.testing.assert_allclose(metrics["eval/samples"], 2, rtol=1e-6)
    assert "eval/tokens" not in metrics


def test_an_evaluation_is_over_all_tokens_of_a_set(tmp_path):
    changes = {"data": {"train_eval_split": [0.5, 0.5], "max_length": 64}, "eval_interval": 1}
    run = trainer(recipe(tmp_path, rows=12, **changes))
    batches = list(run.eval_batches)
    weights = [float(batch.loss_weights.sum()) for batch in batches]
    assert len({*weights}) > 1, "batches must weigh differently"
    total = sum(float(by_definition(run, batch)[0][0]) for batch in batches)
    metrics, mean = run.evaluate(), total / sum(weights)
    assert metrics["eval/tokens"] == sum(weights)
    assert metrics["eval/loss"] == pytest.approx(mean, rel=1e-5)
    assert metrics["eval/perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
