"""A run ends where its recipe, a file, a signal or a callback says, and goes on later."""

import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml

from jaxtrain import Callback
from jaxtrain.metrics.writer import read_rows
from jaxtrain.recipe.errors import AbortedError, PreemptedError, RecipeError
from jaxtrain.signals import SIGNALS
from tests.runs import assert_same, environment, host, metrics_of, recipe, trainer

FULL_STATE = {"save_every_n_steps": 100, "auto_resume": True}


def written(folder, *, full_state=True, **changes):
    """Four updates an epoch; full state is saved only when somebody asks for it."""
    changes = {"rows": 12, "train_iters": 6, "gradient_accumulation_steps": 2} | changes
    saved = {"checkpoint": {"output_dir": str(folder / "state"), **FULL_STATE}}
    return recipe(folder, **changes) | (saved if full_state else {})


def saved(folder):
    found = (folder / "state").glob("global_step_*")
    return sorted(int(path.name.rpartition("_")[2]) for path in found)


class At(Callback):
    """Does something when so many updates are done, before the next."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control):
        if state.global_step == self.step:
            self.act(control)


def ending(folder, step, act, **changes):
    run = trainer(written(folder, **changes))
    run.add_callback(At(step, act))
    return run


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run = trainer(written(folder))
    assert run.data.steps_per_epoch < 6
    run.train()
    return host(run.state)


@pytest.fixture(autouse=True)
def handlers():
    """A background job ignores SIGINT; these tests do not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_finishes_the_update_and_saves_and_the_run_goes_on(tmp_path, unbroken, number):
    before = {n: signal.getsignal(n) for n in SIGNALS}
    run = ending(tmp_path, 2, lambda control: signal.raise_signal(number))
    with pytest.raises(PreemptedError, match=rf"{number.name}: ended after step 3, its full state"):
        run.train()
    assert PreemptedError.exit_code == 75 and run.early_stop_reason == number.name
    assert {n: signal.getsignal(n) for n in SIGNALS} == before
    assert saved(tmp_path) == [3]
    again = trainer(written(tmp_path))
    again.train()
    assert (again.global_step, again.global_step_this_run) == (6, 3)
    assert_same(again.state, unbroken)


def test_a_second_interrupt_ends_at_once(tmp_path):
    def twice(control):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    run = ending(tmp_path, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.global_step == 2 and saved(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_nothing_can_be_saved_for_says_so(tmp_path):
    run = ending(tmp_path, 1, lambda control: signal.raise_signal(signal.SIGTERM), full_state=False)
    with pytest.raises(AbortedError, match=r"after step 2; nothing could be saved: .* `orbax`"):
        run.train()
    assert AbortedError.exit_code == 1


def test_a_signal_does_not_wait_for_an_evaluation(tmp_path):
    class Leave(Callback):
        def on_step_end(self, args, state, control):
            if state.global_step == 2:
                signal.raise_signal(signal.SIGTERM)

    run = trainer(
        written(tmp_path, eval_interval=2, data={"train_eval_split": [0.8, 0.2]}, train_iters=4)
    )
    run.add_callback(Leave)
    with pytest.raises(PreemptedError):
        run.train()
    rows = metrics_of(tmp_path)
    assert not any("eval/loss" in row for row in rows) and saved(tmp_path) == [2]


def test_outside_the_main_thread_signals_are_left_alone(tmp_path):
    run, before, seen = trainer(written(tmp_path, train_iters=1)), signal.getsignal(15), []
    run.add_callback(At(0, lambda control: seen.append(signal.getsignal(15))))
    thread = threading.Thread(target=run.train)
    thread.start()
    thread.join()
    assert seen == [before] and run.global_step == 1


@pytest.mark.covers("kill_switch_path")
@pytest.mark.parametrize("where", ["default", "explicit"])
def test_a_stop_file_ends_the_run_and_is_removed(tmp_path, where):
    """Traps A15, F2 and G13."""
    file = tmp_path / ("run/stop" if where == "default" else "mine")
    changes = {} if where == "default" else {"kill_switch_path": str(file)}
    if where == "default":  # what an earlier run has left there ends nothing
        trainer(written(tmp_path, exit_iteration=1)).train()
        file.touch()
    run = ending(tmp_path, 3, lambda control: file.touch(), **changes)
    assert run.train().global_step == 4
    assert run.early_stop_reason == f"the stop file {file}"
    assert not file.exists() and saved(tmp_path) == [4]
    assert trainer(written(tmp_path, **changes)).train().global_step == 6


def test_an_explicit_stop_file_that_is_there_already_is_refused(tmp_path):
    """Trap A15."""
    (tmp_path / "mine").touch()
    with pytest.raises(RecipeError, match=r"kill_switch_path: '.*mine' exists already; remove it"):
        trainer(written(tmp_path, kill_switch_path=str(tmp_path / "mine")))


@pytest.mark.covers("exit_iteration_this_run")
def test_the_updates_of_one_process_can_be_limited(tmp_path):
    """Trap A27: a resume at or beyond the limit ends at once."""
    changes = {"exit_iteration_this_run": 2}
    found = []
    for _ in range(4):
        run = trainer(
            written(tmp_path, **changes)
            | {"checkpoint": {"output_dir": str(tmp_path / "state"), "save_end_of_training": True,
                              "auto_resume": True}}
        )  # fmt: skip
        assert run.training_horizon == 6
        run.train()
        found.append((run.global_step, run.global_step_this_run))
    assert found == [(2, 2), (4, 2), (6, 2), (6, 0)]


def test_a_callback_may_end_the_run_without_a_save(tmp_path):
    def abort(control):
        control.should_abort_without_save = control.should_save = True

    run = ending(tmp_path, 1, abort)
    with pytest.raises(AbortedError, match="ended the run at step 2; nothing was saved"):
        run.train()
    assert saved(tmp_path) == []


def test_a_callback_may_go_on_with_the_next_epoch(tmp_path):
    """The data position is apart from the step, and saved beside it."""

    class SkipFirst(Callback):
        def on_step_end(self, args, state, control):
            if state.global_step == 1:
                control.should_epoch_stop = True

    def run(folder, **changes):
        found = trainer(written(folder, train_iters=0, epochs=2, rows=36, **changes))
        found.add_callback(SkipFirst)
        found.train()
        return found

    whole = run(tmp_path / "whole")
    of_epoch = whole.data.steps_per_epoch
    assert of_epoch > 2 and whole.training_horizon == 2 * of_epoch
    done = whole.global_step, whole.train_batch_idx // 2, whole.epoch_idx
    assert done == (1 + of_epoch, 2 * of_epoch, 2)
    epochs = [r["epoch"] for r in metrics_of(tmp_path / "whole")]
    one = whole.layout.global_batch / whole.data.train_rows
    assert epochs[:2] == pytest.approx([one, 1 + one]) and epochs[-1] == 2
    (tmp_path / "part").mkdir()

    part = written(tmp_path / "part", train_iters=0, epochs=2, rows=36)
    part["checkpoint"]["save_every_n_steps"] = 2
    first = trainer(part | {"exit_iteration": 2})
    first.add_callback(SkipFirst)
    first.train()
    second = trainer(part)
    second.train()
    assert second.global_step == whole.global_step
    assert_same(second.state, host(whole.state))


def test_a_trainer_trains_once(tmp_path):
    run = trainer(written(tmp_path, train_iters=1))
    run.train()
    with pytest.raises(RuntimeError, match="has trained already; make a new one"):
        run.train()


@pytest.mark.slow
def test_exit_codes_of_a_signal_and_a_stop_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(written(tmp_path, train_iters=100_000)))
    metrics = tmp_path / "run" / "train-log-metrics.jsonl"

    def started():
        command = [sys.executable, "-m", "jaxtrain", str(file)]
        own = environment(JAXTRAIN_CACHE=str(tmp_path / "cache"))
        pipe = subprocess.PIPE
        steps = len(read_rows(metrics)) if metrics.exists() else 0
        process = subprocess.Popen(command, env=own, stdout=pipe, stderr=pipe, text=True)
        while process.poll() is None and not (
            metrics.exists() and len(read_rows(metrics)) > steps + 1
        ):
            time.sleep(0.1)
        return process

    process = started()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 75, err
    assert "full state is saved; run it again to continue" in err and "Traceback" not in err
    (step,) = saved(tmp_path)
    process = started()
    (tmp_path / "run" / "stop").touch()
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"from step {step}" in out and "ended early, the stop file" in out
    steps = [row["iter"] for row in read_rows(metrics)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > step
