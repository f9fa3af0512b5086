"""Callbacks see what happens in the documented order, may change it, and go on after a resume."""

import jax
import jax.numpy as jnp
import pytest

from jaxtrain import Callback, SFTTrainer
from jaxtrain.metrics.writer import read_rows
from jaxtrain.recipe.errors import CheckpointError
from jaxtrain.trainer.callbacks import EVENTS
from tests.runs import assert_same, host, losses, metrics_of, recipe, trainer


class Recorder(Callback):
    def __init__(self):
        self.events = []

    def __getattr__(self, name):
        if name not in EVENTS:
            raise AttributeError(name)
        return lambda args, state, control, **more: self.events.append((name, state.global_step))


@pytest.mark.covers("checkpoint.*.save_every_n_steps")
def test_events_come_in_the_documented_order(tmp_path):
    written = recipe(
        tmp_path, rows=40, train_iters=2, eval_interval=2, gradient_accumulation_steps=2,
        data={"train_eval_split": [0.8, 0.2]},
    )  # fmt: skip
    run = trainer(
        written | {"checkpoint": {"output_dir": str(tmp_path / "s"), "save_every_n_steps": 2}}
    )
    recorder = Recorder()
    run.add_callback(recorder)
    run.train()
    assert recorder.events == [
        ("on_init_end", 0), ("on_train_begin", 0), ("on_epoch_begin", 0),
        ("on_step_begin", 0), ("on_substep_end", 1), ("on_pre_optimizer_step", 1),
        ("on_optimizer_step", 1), ("on_step_end", 1),
        ("on_step_begin", 1), ("on_train_metrics", 2), ("on_log_step", 2), ("on_log", 2),
        ("on_substep_end", 2), ("on_pre_optimizer_step", 2), ("on_optimizer_step", 2),
        ("on_step_end", 2), ("on_train_metrics", 2), ("on_log_step", 2), ("on_log", 2),
        *[("on_prediction_step", 2)] * 3, ("on_evaluate", 2), ("on_save", 2),
        ("on_epoch_end", 2), ("on_train_end", 2),
    ]  # fmt: skip
    run.evaluate(str(tmp_path / "rows.jsonl"))
    assert recorder.events[-1] == ("on_predict", 2)
    assert {event for event, _ in recorder.events} == set(EVENTS)


class StopAt(Callback):
    """Saves and stops after so many updates, over all processes."""

    limit = 3

    def __init__(self):
        self.updates = 0

    def on_step_end(self, args, state, control, **more):
        self.updates += 1
        if self.updates == self.limit:
            control.should_save = control.should_training_stop = True

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]


def test_a_callback_may_stop_and_save_and_its_state_goes_on(tmp_path):
    checkpoint = {"output_dir": str(tmp_path / "s"), "auto_resume": True}
    written = recipe(tmp_path, train_iters=5) | {"checkpoint": checkpoint}
    first = trainer(written)
    first.add_callback(StopAt)
    assert first.train().global_step == 3
    second = trainer(written)
    counter = StopAt()
    second.add_callback(counter)
    assert second.train().global_step == 5
    assert counter.updates == 5
    with pytest.raises(CheckpointError, match=r"state of callback StopAt\.0, and the run has none"):
        trainer(written).train()


def test_callbacks_can_be_taken_out_by_object_or_class(tmp_path):
    run = trainer(recipe(tmp_path))
    one, two = StopAt(), Recorder()
    run.add_callback(one)
    run.add_callback(two)
    assert run.pop_callback(StopAt) is one
    assert run.pop_callback(StopAt) is None
    run.remove_callback(two)
    assert run.pop_callback(two) is None


def test_what_is_requested_happens_at_that_update(tmp_path):
    class Ask(Callback):
        def on_step_end(self, args, state, control, **more):
            control.should_evaluate = state.global_step == 1
            control.should_log = state.global_step == 2

    written = recipe(
        tmp_path, rows=40, train_iters=4, eval_interval=4, train_log_iter_interval=100,
        data={"train_eval_split": [0.8, 0.2]},
    )  # fmt: skip
    run = trainer(written)
    run.add_callback(Ask)
    run.train()
    rows = metrics_of(tmp_path)
    assert [row["iter"] for row in rows if "eval/loss" in row] == [1, 4]
    assert [row["iter"] for row in rows if "loss" in row] == [1, 2]  # 1 is due, 2 was asked for


order = []


class Parent(SFTTrainer):
    name = "hooks-parent"
    callbacks = [("pre-step", lambda self, state, batch: order.append("parent list"))]

    def post_step_callback(self, result):
        order.append("parent post")


class Child(Parent):
    name = "hooks-child"
    callbacks = [("pre_step", lambda self, state, batch: order.append("child list"))]

    def pre_step_callback(self, state, batch):
        order.append("child method")
        return state, batch._replace(loss_weights=jnp.zeros_like(batch.loss_weights))

    def post_init_callback(self):
        order.append("made")


def test_method_callbacks_run_parents_first_and_may_change_arguments(tmp_path):
    order.clear()
    run = trainer(recipe(tmp_path), cls=Child)
    before = host(run.state.params)
    losses(run, 1)
    assert order == ["made", "parent list", "child list", "child method", "parent post"]
    assert_same(run.state.params, before)


def test_traced_callbacks_change_loss_and_gradients(tmp_path):
    class Frozen(SFTTrainer):
        name = "hooks-frozen"

        def post_loss_callback(self, loss):
            return loss._replace(total=loss.total * 2)

        def post_backward_callback(self, gradients):
            return jax.tree.map(jnp.zeros_like, gradients)

    plain = losses(trainer(recipe(tmp_path, optimizer={"weight_decay": 0})), 1)
    run = trainer(recipe(tmp_path, optimizer={"weight_decay": 0}), cls=Frozen)
    before = host(run.state.params)
    assert losses(run, 1)[0] == pytest.approx(2 * plain[0])
    assert_same(run.state.params, before)


@pytest.mark.parametrize(
    "request_",
    ["should_training_stop", "should_save", "should_evaluate", "should_log", "should_epoch_stop"],
)
def test_a_request_at_the_end_of_an_epoch_is_for_the_step_before_it(tmp_path, request_):
    class Ask(Callback):
        def on_epoch_end(self, args, state, control):
            if state.epoch == 1:
                setattr(control, request_, True)

    written = recipe(
        tmp_path, rows=40, train_iters=0, epochs=3, eval_interval=1000, eval_at_end=False,
        train_log_iter_interval=1000, micro_batch_size=4, data={"train_eval_split": [0.8, 0.2]},
    )  # fmt: skip
    run = trainer(written | {"checkpoint": {"output_dir": str(tmp_path / "s")}})
    of_epoch = run.data.steps_per_epoch
    assert of_epoch > 1
    run.add_callback(Ask)
    run.train()
    rows = read_rows(tmp_path / "run" / "train-log-metrics.jsonl")
    found = {
        "should_training_stop": run.global_step,
        "should_save": run.checkpoint_engines[0].latest(),
        "should_evaluate": next((row["iter"] for row in rows if "eval/loss" in row), None),
        "should_log": next((r["iter"] for r in rows if "lr" in r and r["iter"] > 1), None),
    }
    before = {"should_training_stop": 3 * of_epoch} | dict.fromkeys([*found][1:])
    assert found == before | ({request_: of_epoch} if request_ in found else {})


def test_an_evaluation_without_data_is_a_warning(tmp_path):
    class Ask(Callback):
        def on_step_end(self, args, state, control):
            control.should_evaluate = True

    run = trainer(recipe(tmp_path, train_iters=2))
    run.add_callback(Ask)
    assert run.train().global_step == 2
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert log.count("asked for an evaluation, and there is no evaluation data") == 2
