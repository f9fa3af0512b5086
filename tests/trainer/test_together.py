"""What guards, signals, averages, rollbacks and resumes do to one another."""

import signal
import time

import numpy as np
import pytest

from jaxtrain import Callback
from jaxtrain.recipe.errors import AbortedError, NonFiniteError, PreemptedError, RecipeError
from tests.runs import host, recipe, trainer
from tests.trainer.test_guards import breaking, rows


def state_entry(folder, every=2, **keys):
    return {"output_dir": str(folder / "state"), "save_every_n_steps": every, **keys}


def assert_same_state(run, other):
    expected = host(other.state)
    for name, array in host(run.state).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert (run.global_step, run.position) == (other.global_step, other.position)


def losses_told(folder):
    return [(row["iter"], row["loss"]) for row in rows(folder) if "loss" in row]


class SignalAt(Callback):
    """A signal comes at the n-th of these events."""

    def __init__(self, event, count):
        self.left = count
        setattr(self, event, self._come)

    def _come(self):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGTERM)


def preempted(run, event, count):
    run.add_callback(SignalAt(event, count))
    with pytest.raises(PreemptedError) as error:
        run.train()
    return str(error.value)


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    """Never broken; its batches 2 and 3 are skipped."""
    folder = tmp_path_factory.mktemp("skipping")
    run = breaking(folder, "skip", [2, 3], every=3)
    run.train()
    return folder, run


@pytest.mark.parametrize("batches", [3, 4])
def test_a_run_that_ends_around_a_skip_goes_on_as_if_it_had_not(tmp_path, skipping, batches):
    """Between two batches that are skipped, and right after them."""
    folder, whole = skipping
    preempted(breaking(tmp_path, "skip", [2, 3], every=3), "on_step_begin", batches)
    again = breaking(tmp_path, "skip", [2, 3], every=3)
    again.train()
    assert_same_state(again, whole)
    assert losses_told(tmp_path) == losses_told(folder)
    assert rows(tmp_path)[-1]["skipped_updates"] == 2


def test_a_skip_does_not_count_towards_a_limit_and_asks_for_nothing(tmp_path):
    run = breaking(
        tmp_path, "skip", [0, 1], exit_iteration=2, eval_interval=2,
        data={"train_eval_split": [0.8, 0.2]},
    )  # fmt: skip
    run.train()
    assert (run.global_step, run.train_batch_idx) == (2, 4)
    assert [row["iter"] for row in rows(tmp_path) if "eval/loss" in row] == [2]


def test_a_run_that_went_back_and_ended_goes_on_as_if_it_had_not(tmp_path):
    whole = breaking(tmp_path / "whole", "rollback", [3], steps=7)
    whole.train()
    preempted(breaking(tmp_path / "cut", "rollback", [3], steps=7), "on_step_begin", 6)
    again = breaking(tmp_path / "cut", "rollback", [3], steps=7)
    again.train()
    assert_same_state(again, whole)
    assert losses_told(tmp_path / "cut") == losses_told(tmp_path / "whole")


def test_going_back_takes_all_engines_averages_and_exports_along(tmp_path):
    """Saves of both full-state entries may be under way; the newest of them is restored."""

    def entries(folder):
        return [
            state_entry(folder, 3),
            {"output_dir": str(folder / "often"), "save_every_n_steps": 2},
            {"output_dir": str(folder / "light"), "save_every_n_steps": 1, "save_model_only": True},
            {"type": "huggingface", "output_dir": str(folder / "out"), "save_every_n_steps": 5,
             "save_end_of_training": True},
        ]  # fmt: skip

    def run_of(folder, bad, **changes):
        changes |= {"checkpoint": entries(folder), "ema": {"decay": 0.5}}
        return breaking(folder, "rollback", bad, steps=7, **changes)

    run = run_of(tmp_path / "a", [5])
    run.train()
    assert [engine.steps() for engine in run.checkpoint_engines] == [
        [3, 6], [2, 4, 6], [1, 2, 3, 4, 5, 6, 7], [5, 7],
    ]  # fmt: skip
    assert [r["iter"] for r in rows(tmp_path / "a") if "rollbacks" in r] == [4]
    other = run_of(tmp_path / "b", [])
    for number in (0, 1, 2, 3, 6, 7, 8):
        (batch,) = other.data.train_batches(other.data.train.advance(0, number), 1)
        other.state, _ = other.step(other.state, other.layout.on_devices(batch))
    expected = host(other.state)
    for name, array in host(run.state).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_a_run_whose_last_batch_is_taken_back_is_still_evaluated_and_exported(tmp_path):
    export = {"type": "huggingface", "output_dir": str(tmp_path / "out")}
    changes = {
        "checkpoint": [state_entry(tmp_path, 2), {**export, "save_end_of_training": True}],
        "data": {"train_eval_split": [0.8, 0.2]}, "eval_interval": 10**6, "epochs": 1,
    }  # fmt: skip
    first = breaking(tmp_path, "rollback", [], steps=0, **changes)
    last = first.data.steps_per_epoch - 1
    run = breaking(tmp_path, "rollback", [last], steps=0, **changes)
    run.train()
    assert run.num_rollbacks == 1 and run.global_step == last - last % 2
    assert "eval/loss" in run.eval_metrics
    assert run.checkpoint_engines[1].steps() == [run.global_step]


class Worse(Callback):
    """The weights that one batch is trained with are far off."""

    def __init__(self, position):
        self.position = position

    def on_step_begin(self, state):
        if state.train_batch_idx == self.position:
            state.state = state.state._replace(
                params={**state.params, "norm": state.params["norm"] * 30}
            )


@pytest.mark.parametrize("saves", [2, 6])
def test_the_last_update_is_guarded_like_any_other(tmp_path, saves):
    """Whether a save is due there or not."""
    written = recipe(
        tmp_path, rows=40, train_iters=6,
        divergence={"action": "rollback", "short_alpha": 1.0, "threshold": 1.0},
        checkpoint=[state_entry(tmp_path, 2), {"output_dir": str(tmp_path / "end"),
                    "save_every_n_steps": saves, "save_end_of_training": True}],
    )  # fmt: skip
    run = trainer(written)
    run.add_callback(Worse(5))
    assert run.train().global_step == 6
    assert (run.num_rollbacks, run.train_batch_idx) == (1, 8)
    assert run.report.last_loss < 7
    assert [engine.steps()[-1] for engine in run.checkpoint_engines] == [6, 6]


def evaluating(folder, **changes):
    return trainer(
        recipe(
            folder, rows=40, train_iters=8, eval_interval=2, data={"train_eval_split": [0.8, 0.2]},
            early_stopping={"patience": 2}, optimizer={"lr": 0.0}, **changes,
            checkpoint=state_entry(folder, 100, auto_resume=True, keep_best_n=1, keep_last_n=1),
        )
    )  # fmt: skip


def told_evaluations(folder):
    return [(row["iter"], row["eval/loss"]) for row in rows(folder) if "eval/loss" in row]


@pytest.mark.parametrize(("event", "count"), [("on_prediction_step", 2), ("on_step_end", 4)])
def test_an_evaluation_that_a_signal_cut_short_is_made_by_the_next_start(tmp_path, event, count):
    """So that early stopping ends the run where it would have ended, and no score is lost."""
    whole = evaluating(tmp_path / "whole")
    whole.train()
    assert whole.global_step == 6, "the first evaluation is the best, two are no better"
    preempted(evaluating(tmp_path / "cut"), event, count)
    again = evaluating(tmp_path / "cut")
    again.train()
    assert again.early_stop_reason == whole.early_stop_reason
    assert_same_state(again, whole)
    assert told_evaluations(tmp_path / "cut") == told_evaluations(tmp_path / "whole")
    scores = [run.checkpoint_engines[0].scores() for run in (again, whole)]
    assert scores[0] == scores[1] and len(scores[0]) == 3


def test_a_signal_before_the_first_update_claims_no_saved_state(tmp_path):
    run = evaluating(tmp_path, eval_at_start=True)
    said = preempted(run, "on_prediction_step", 1)
    assert said == "SIGTERM: ended before the first step; run it again"
    assert run.checkpoint_engines[0].steps() == []
    again = evaluating(tmp_path, eval_at_start=True)
    again.train()
    assert [step for step, _ in told_evaluations(tmp_path)] == [0, 2, 4]
    assert again.evaluate() == again.evaluate() != {}


def test_a_fresh_start_after_a_try_has_the_rows_of_its_own_alone(tmp_path):
    class Abort(Callback):
        def on_step_end(self, control):
            control.should_abort_without_save = True

    run = evaluating(tmp_path, eval_at_start=True)
    run.add_callback(Abort)
    with pytest.raises(AbortedError, match="nothing was saved"):
        run.train()
    assert told_evaluations(tmp_path)
    evaluating(tmp_path, eval_at_start=True).train()
    assert [step for step, _ in told_evaluations(tmp_path)] == [0, 2, 4]


def test_after_an_interrupt_the_trainer_still_evaluates_and_exports(tmp_path):
    run = evaluating(tmp_path)
    preempted(run, "on_step_begin", 2)
    assert run.evaluate()["eval/loss"] > 0
    assert run.save_model(tmp_path / "out").is_dir()


def test_what_is_being_saved_when_a_run_fails_is_on_disk_when_it_has_failed(tmp_path):
    run = breaking(tmp_path, "stop", [2], every=2)
    (engine,) = run.checkpoint_engines
    commit, waited = engine._commit, []

    def slowly(*values):
        time.sleep(1.5)
        commit(*values)
        waited.append(True)

    engine._commit = slowly
    with pytest.raises(NonFiniteError):
        run.train()
    assert waited and engine.steps() == [2]


@pytest.mark.parametrize("reset", [("optimizer",), ("callbacks", "data")])
def test_an_average_goes_on_whatever_is_reset(tmp_path, reset):
    def run_of(**changes):
        entry = state_entry(tmp_path, 2, auto_resume=True, reset=list(reset))
        return trainer(
            recipe(tmp_path, train_iters=4, ema={"decay": 0.9}, checkpoint=[entry], **changes)
        )

    first = run_of(exit_iteration=2)
    first.train()
    again = run_of()
    expected = host(first.state.average)
    for name, array in host(again.state.average).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_an_average_may_be_added_and_dropped_between_starts(tmp_path):
    def run_of(end, **changes):
        entry = state_entry(tmp_path, 1, auto_resume=True)
        return trainer(
            recipe(tmp_path, train_iters=6, exit_iteration=end, checkpoint=[entry], **changes)
        )

    first = run_of(2)
    first.train()
    added = run_of(4, ema={"decay": 0.9})
    added.start()
    saved = host(first.state.params)
    for name, array in host(added.state.average).items():
        np.testing.assert_array_equal(array, saved[name], err_msg=name)
    added.train()
    dropped = run_of(6)
    dropped.train()
    assert dropped.global_step == 6 and dropped.state.average == {}


def test_repeats_of_the_rows_are_kept_over_a_resume(tmp_path):
    def run_of(end=0, **changes):
        entry = state_entry(tmp_path, 1, auto_resume=True)
        keys = {"train_iters": 0, "rows": 18, "min_iterations": 30} | changes
        return trainer(recipe(tmp_path, exit_iteration=end, checkpoint=[entry], **keys))

    run_of(2, overfit_first_batch=True).train()
    again = run_of(3, overfit_first_batch=True)
    again.train()
    told = [row["trained_tokens"] for row in rows(tmp_path)]
    assert again.global_step == 3 and len(set(told)) == 1
    with pytest.raises(RecipeError, match="overfit_first_batch: is false, .* has true"):
        run_of().train()
    with pytest.raises(RecipeError, match="min_iterations: is 40, .* has 30"):
        run_of(overfit_first_batch=True, min_iterations=40).train()
