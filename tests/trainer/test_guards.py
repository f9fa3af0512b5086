"""What watches a run: early stopping, updates that are not finite, a loss that diverges."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import Callback, SFTTrainer
from jaxtrain.metrics.log import log
from jaxtrain.recipe.errors import NonFiniteError, RecipeError
from jaxtrain.recipe.guards import DivergenceConfig, EarlyStoppingConfig
from jaxtrain.trainer.callbacks import Control
from jaxtrain.trainer.guards import Divergence, EarlyStopping
from tests.runs import assert_same, host, recipe, trainer
from tests.runs import metrics_of as rows


class Asked:
    """As much of a trainer as a guard sees."""

    def __init__(self):
        self.reasons = []

    def request_stop(self, reason):
        self.reasons.append(reason)


def stopping(**keys):
    return EarlyStopping(EarlyStoppingConfig(**({"patience": 2} | keys)))


def evaluations_until_stop(guard, values, metric="eval/loss"):
    asked = Asked()
    for count, value in enumerate(values, start=1):
        guard.on_evaluate(asked, {metric: value})
        if asked.reasons:
            return count
    return None


@pytest.mark.covers("early_stopping.metric early_stopping.mode early_stopping.patience")
@pytest.mark.covers("early_stopping.min_delta")
@pytest.mark.parametrize(
    ("keys", "values", "expected"),
    [
        ({}, [3, 2, 2.5, 1.9, 2, 2.1, 1], 6),
        ({}, [3, 2, 1, 0, -1], None),
        ({}, [1, 0.0, 0.0, 0.0], 4),  # 0.0 is a value, an equal one is no better
        ({}, [0.0, 1, 2], 3),
        ({}, [math.nan, 2, math.nan, 1.5, math.nan, math.nan], 6),
        ({}, [math.nan, math.nan], 2),
        ({"min_delta": 0.5}, [3, 2.6, 2.4, 2.2, 2.0], 5),
        ({"min_delta": 0.5}, [3, 2.5, 2.5], 3),
        ({"patience": 1}, [1, 1], 2),
        ({"metric": "eval/token_accuracy"}, [0.1, 0.2, 0.3, 0.2, 0.3], 5),
        ({"mode": "max"}, [1, 2, 3, 2, 1], 5),
    ],
)
def test_early_stopping_counts_evaluations_without_a_better_value(keys, values, expected):
    """Traps F5, G1 and G2."""
    metric = keys.get("metric", "eval/loss")
    assert evaluations_until_stop(stopping(**keys), values, metric) == expected


def test_patience_and_best_value_survive_a_resume():
    first, second = stopping(), stopping()
    assert evaluations_until_stop(first, [2.0, 3.0]) is None
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert evaluations_until_stop(second, [2.5]) == 1


def test_a_run_stops_early_and_is_finished(tmp_path):
    """Trap F5."""

    def written(**changes):
        return recipe(
            tmp_path, rows=40, train_iters=20, eval_interval=1, optimizer={"lr": 0.0},
            data={"train_eval_split": [0.8, 0.2]}, early_stopping={"patience": 2},
            checkpoint={"output_dir": str(tmp_path / "state"), "save_end_of_training": True,
                        "auto_resume": True}, **changes,
        )  # fmt: skip

    run = trainer(written())
    assert run.train().global_step == 3  # the first is the best, two are no better
    assert run.early_stop_reason.startswith("eval/loss got no better in 2 evaluations (best ")
    again = trainer(written())
    output = again.train()
    assert output.global_step == 3 and again.global_step_this_run == 0
    assert output.metrics["eval/loss"] == pytest.approx(run.eval_metrics["eval/loss"])


def test_a_metric_that_no_evaluation_gives_is_an_error():
    with pytest.raises(RecipeError, match=r"early_stopping.metric: no evaluation has 'eval/x'"):
        evaluations_until_stop(stopping(metric="eval/x", mode="min"), [1.0], "eval/loss")


def first_apart(guard, losses, metric="loss"):
    """Number of the first loss at which the guard asks to go back."""
    for count, loss in enumerate(losses):
        control = Control()
        guard.on_train_metrics(control, {metric: loss})
        if control.should_roll_back:
            return count
    return None


FALLING = list(np.linspace(8, 2, 200))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (FALLING, None),
        ([*FALLING, 12.0, *[2.0] * 50], None),  # one spike
        ([*FALLING, *[math.nan] * 50, *[2.0] * 50], None),
        ([2.0] * 100 + [7.0] * 50, 105),  # 5 * (0.99^n - 0.9^n) is 2 or more from n = 6 on
        # 10 / 99 * (99 * (1 - 0.99^n) - 9 * (1 - 0.9^n)) is 2 or more from n = 34 on
        ([2.0] * 100 + list(np.linspace(2, 12, 100)), 134),
    ],
)
def test_divergence_tells_a_rise_from_a_spike(losses, expected):
    assert first_apart(Divergence(DivergenceConfig(action="rollback")), losses) == expected


@pytest.mark.covers("divergence.metric divergence.threshold divergence.short_alpha")
@pytest.mark.covers("divergence.long_alpha")
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        # The first n with 5 * ((1 - long_alpha)^n - (1 - short_alpha)^n) >= threshold.
        ({"threshold": 1.0}, 102),
        ({"threshold": 3.0}, 111),
        ({"short_alpha": 0.5}, 100),
        ({"long_alpha": 0.05}, None),
        ({"metric": "grad_norm"}, 105),
    ],
)
def test_divergence_follows_its_keys(keys, expected):
    guard = Divergence(DivergenceConfig(action="rollback", **keys))
    rise = [2.0] * 100 + [7.0] * 50
    assert first_apart(guard, rise, metric=keys.get("metric", "loss")) == expected


@pytest.mark.covers("divergence.action")
def test_divergence_goes_on_where_it_was_and_may_stop_or_warn(monkeypatch):
    warnings = []
    monkeypatch.setattr(log, "warning", warnings.append)
    rise = [2.0] * 100 + [7.0] * 50
    first = Divergence(DivergenceConfig(action="rollback"))
    assert first_apart(first, rise[:103]) is None
    second = Divergence(DivergenceConfig(action="rollback"))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert first_apart(second, rise[103:]) == 2
    with pytest.raises(NonFiniteError, match="loss diverges: its short average 4.343 is 2 or more"):
        first_apart(Divergence(DivergenceConfig(action="stop")), rise)
    assert first_apart(Divergence(DivergenceConfig(action="warn")), rise) is None
    assert ["diverges" in said for said in warnings] == [True, True]  # one a crossing
    with pytest.raises(RecipeError, match=r"divergence.metric: no row has 'x'; found loss"):
        first_apart(Divergence(DivergenceConfig(metric="x")), rise)


class Breaking(SFTTrainer):
    """Batches with a row among `bad_rows` have a loss that is not a number."""

    name = "breaking"
    bad_rows = ()

    def loss_fn(self, model, batch, key):
        loss = super().loss_fn(model, batch, key)
        is_bad = jnp.isin(batch.rows, jnp.array(self.bad_rows or [-2])).any()
        return loss._replace(total=jnp.where(is_bad, jnp.nan, loss.total))


def breaking(folder, policy, bad, *, steps=6, every=2, **changes):
    """A run of which the batches with these numbers are not finite."""
    state = {"output_dir": str(folder / "state"), "save_every_n_steps": every, "auto_resume": True}
    written = recipe(
        folder, rows=60, train_iters=steps, on_nonfinite=policy, **{"checkpoint": state} | changes
    )
    run = trainer(written, cls=Breaking)
    assert run.data.steps_per_epoch > 11
    plan = run.data.train
    numbers = (plan.sequence_numbers(plan.advance(0, step)).ravel() for step in bad)
    run.bad_rows = [int(number) for one in numbers for number in one]
    return run


def test_stop_keeps_the_last_good_state_and_saves_nothing_of_the_broken_one(tmp_path):
    """Trap F16."""
    run = breaking(tmp_path, "stop", [3], every=1)
    with pytest.raises(NonFiniteError, match="step 4 is not finite: .* it has changed nothing"):
        run.train()
    assert run.checkpoint_engines[0].steps() == [1, 2, 3]


def trained_on(run, batches):
    """Parameters after these batches alone."""
    for number in batches:
        (batch,) = run.data.train_batches(run.data.train.advance(0, number), 1)
        run.state, _ = run.step(run.state, run.layout.on_devices(batch))
    return host(run.state)


@pytest.mark.covers("on_nonfinite")
def test_skip_drops_the_update_and_consumes_the_batch(tmp_path):
    run = breaking(tmp_path, "skip", [2, 4])
    run.train()
    assert (run.global_step, run.train_batch_idx, int(run.state.step)) == (6, 8, 6)
    assert [row["iter"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [row["skipped_updates"] for row in rows(tmp_path)] == [0, 0, 1, 2, 2, 2]
    of_epoch = run.data.steps_per_epoch
    assert [row["epoch"] * of_epoch for row in rows(tmp_path)] == pytest.approx([1, 2, 4, 6, 7, 8])
    expected = trained_on(breaking(tmp_path / "other", "skip", [2, 4]), [0, 1, 3, 5, 6, 7])
    assert_same(run.state, expected)
    again = breaking(tmp_path, "skip", [2, 4], steps=7)
    again.train()
    assert again.train_batch_idx == 9 and rows(tmp_path)[-1]["skipped_updates"] == 2


def test_ten_skips_in_a_row_are_too_many(tmp_path):
    run = breaking(tmp_path, "skip", range(1, 11), steps=20)
    with pytest.raises(NonFiniteError, match="10 steps in a row are not finite"):
        run.train()
    assert (run.global_step, run.train_batch_idx) == (1, 11)
    run = breaking(tmp_path / "apart", "skip", [*range(9), 10], steps=2)
    run.train()
    assert (run.global_step, run.train_batch_idx) == (2, 12)


def test_rollback_restores_and_goes_on_behind_the_offending_batches(tmp_path):
    run = breaking(tmp_path, "rollback", [3])
    run.train()
    assert (run.global_step, run.train_batch_idx, run.num_rollbacks) == (6, 8, 1)
    told = [row for row in rows(tmp_path) if "rollbacks" in row]
    assert told == [{"iter": 2, "rolled_back_from": 3, "rollbacks": 1}]
    assert [row["iter"] for row in rows(tmp_path) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    expected = trained_on(breaking(tmp_path / "other", "rollback", [3]), [0, 1, 4, 5, 6, 7])
    assert_same(run.state, expected)


def test_rollback_needs_a_state_and_gives_up_after_three(tmp_path):
    with pytest.raises(NonFiniteError, match="step 1: no full state was saved yet"):
        breaking(tmp_path / "first", "rollback", [0]).train()
    run = breaking(tmp_path / "second", "rollback", [2, 3, 4, 5])
    with pytest.raises(NonFiniteError, match="step 3: rolled back 3 times already"):
        run.train()
    assert (run.global_step, run.num_rollbacks) == (2, 3)


def test_exports_of_updates_that_were_taken_back_are_made_again(tmp_path):
    class Saves(Callback):
        def __init__(self):
            self.exported = []

        def on_save(self, args, state, control, engine, path):
            self.exported += [state.global_step] * (engine == "huggingface")

    state = {"output_dir": str(tmp_path / "state"), "save_every_n_steps": 2}
    export = {"type": "huggingface", "output_dir": str(tmp_path / "out"), "save_every_n_steps": 1}
    run = breaking(tmp_path, "rollback", [3], steps=4, checkpoint=[state, export])
    saves = Saves()
    run.add_callback(saves)
    run.train()
    assert saves.exported == [1, 2, 3, 3, 4]


def test_a_diverging_run_goes_back(tmp_path):
    class Worse(Callback):
        def on_step_begin(self, args, state, control):
            if state.train_batch_idx == 4:
                worse = jax.tree.map(lambda p: p * 3, state.state.params)
                state.state = state.state._replace(params=worse)

    written = recipe(
        tmp_path, rows=40, train_iters=8,
        divergence={"action": "rollback", "short_alpha": 1.0, "threshold": 1.0},
        checkpoint={"output_dir": str(tmp_path / "state"), "save_every_n_steps": 2},
    )  # fmt: skip
    run = trainer(written)
    run.add_callback(Worse)
    run.train()
    assert (run.global_step, run.train_batch_idx, run.num_rollbacks) == (8, 10, 1)
    losses = [row["loss"] for row in rows(tmp_path) if "loss" in row]
    assert len(losses) == 8 and max(losses) == losses[0]
