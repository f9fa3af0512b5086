"""Rows that are taken more than once, and when evaluations fall."""

import pytest

from jaxtrain.recipe.errors import DataError
from tests.runs import metrics_of, recipe, trainer


def rows(folder, key):
    found = metrics_of(folder)
    return {row["iter"]: row[key] for row in found if key in row}


@pytest.mark.covers("overfit_first_batch")
def test_the_first_batch_for_ever_is_learnt_by_heart(tmp_path):
    run = trainer(recipe(tmp_path, rows=18, train_iters=60, overfit_first_batch=True))
    assert run.data.steps_per_epoch < 60
    numbers = {tuple(batch.rows.ravel()) for batch in run.data.train_batches(0, 60)}
    assert len(numbers) == 1
    run.train()
    losses = rows(tmp_path, "loss")
    assert losses[1] > 5 and losses[60] < 0.5


@pytest.mark.covers("min_iterations")
def test_training_rows_are_repeated_until_they_fill_an_epoch(tmp_path):
    once = trainer(recipe(tmp_path, rows=18, train_iters=0))
    wanted = once.data.steps_per_epoch * 2 + 1
    run = trainer(recipe(tmp_path, rows=18, train_iters=0, min_iterations=wanted))
    assert run.training_horizon == run.data.steps_per_epoch >= wanted
    assert run.data.train_rows == 3 * once.data.train_rows


def test_fewer_rows_than_shards_are_refused_and_can_be_repeated(tmp_path):
    changes = {"rows": 4, "data": {"max_length": 256}}
    with pytest.raises(DataError, match=r"fewer than the 8 batch shards; write min_iterations"):
        trainer(recipe(tmp_path, **changes), devices=8)
    assert trainer(recipe(tmp_path, **changes, min_iterations=2), devices=8).data.train_rows >= 8


def evaluations(folder, **changes):
    run = trainer(
        recipe(
            folder, rows=40, train_iters=0, epochs=2, gradient_accumulation_steps=2,
            data={"train_eval_split": [0.8, 0.2]}, **changes,
        )
    )  # fmt: skip
    run.train()
    return run.data.steps_per_epoch, list(rows(folder, "eval/loss"))


@pytest.mark.covers("eval_after_step", "eval_every_n_epochs")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eval_every_n_epochs": 1}, lambda epoch: [epoch, 2 * epoch]),
        ({"eval_every_n_epochs": 2, "eval_at_end": False}, lambda epoch: [2 * epoch]),
        (
            {"eval_interval": 2, "eval_after_step": 5, "eval_at_end": False},
            lambda epoch: list(range(6, 2 * epoch + 1, 2)),
        ),
        (
            {"eval_every_n_epochs": 1, "eval_after_step": 10**6, "eval_at_start": True},
            lambda epoch: [0, 2 * epoch],  # start and end are not periodic
        ),
    ],
)
def test_evaluations_fall_where_the_recipe_says(tmp_path, changes, expected):
    epoch, found = evaluations(tmp_path, **changes)
    assert epoch > 2 and found == expected(epoch)
