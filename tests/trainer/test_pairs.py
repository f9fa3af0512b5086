"""A trainer of the user on pairs: what its loss is given holds whole pairs, chosen first."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import Loss, SFTTrainer
from jaxtrain.data import DPODataFactory
from tests.runs import losses, recipe, trainer


class MarginTrainer(SFTTrainer):
    """Mean log-probabilities of a pair's replies, compared without a reference."""

    name = "margin-of-test"
    data_factory: DPODataFactory

    def loss_fn(self, model, batch, key):
        w = batch.loss_weights
        means = (model.token_log_probs(batch) * w).sum(-1) / jnp.maximum(w.sum(-1), 1)
        chosen, rejected = means.reshape(-1, 2).T
        is_pair = (batch.rows >= 0).reshape(-1, 2).all(-1)
        rows = batch.rows.reshape(-1, 2)
        broken = (is_pair & ((rows[:, 0] % 2 != 0) | (rows[:, 1] != rows[:, 0] + 1))).sum()
        total = (-jax.nn.log_sigmoid(2.0 * (chosen - rejected)) * is_pair).sum()
        return Loss(total + 1e9 * broken, is_pair.sum().astype(jnp.float32))


def pairs_recipe(folder, count, **changes):
    """A recipe over so many pairs of replies."""
    written = recipe(folder, **changes)
    rows = [
        {"prompt": f"number {n}?", "chosen": "yes " * (n % 4 + 1), "rejected": "no " * (n % 3 + 1)}
        for n in range(count)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"type": "jsonl", "path": str(folder / "rows.jsonl")}
    return written | {"data": {"sources": [source], "max_length": 64, "num_proc": 1}}


@pytest.fixture
def pairs(tmp_path):
    changes = {"micro_batch_size": 2, "gradient_accumulation_steps": 2}
    return pairs_recipe(tmp_path, 14, type="margin-of-test", **changes)


def test_a_batch_holds_twice_as_many_rows_as_pairs(pairs):
    made = trainer(pairs, cls=MarginTrainer)
    assert made.layout.global_batch == 8 and made.data.steps_per_epoch == 4
    (batch,) = made.data.train_batches(0, 1)
    assert batch.tokens.shape[:2] == (2, 4)
    found = losses(made, 8)
    assert np.mean(found[4:]) < np.mean(found[:4]) < 1e3


def test_the_loss_of_pairs_does_not_depend_on_the_mesh(pairs):
    one = losses(trainer(pairs | {"gradient_accumulation_steps": 4}, cls=MarginTrainer), 3)
    two = losses(trainer(pairs, cls=MarginTrainer, devices=2), 3)
    assert two == pytest.approx(one, rel=1e-5)
