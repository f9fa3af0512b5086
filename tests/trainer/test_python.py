"""Trainers from Python: as in a notebook, with ready-made objects, read and asked at any time."""

import copy
import gc
import json
import weakref

import jax
import numpy as np
import optax
import pytest
import yaml

from jaxtrain import Callback, GradLogger, SFTTrainer, WeightNormLogger, get_config
from jaxtrain.metrics.log import log
from jaxtrain.metrics.writer import read_rows
from jaxtrain.recipe.errors import CheckpointError, DataError, RecipeError, WeightError
from jaxtrain.recipe.guards import EarlyStoppingConfig
from jaxtrain.trainer.interface import Interface
from jaxtrain.trainer.run_state import RunState
from tests.runs import (
    assert_same,
    conversations,
    first_batch,
    host,
    losses,
    metrics_of,
    model_folder,
    recipe,
    trainer,
)
from tests.tiny import chat, tiny_tokenizer

CHATS = [{"messages": chat(f"number {n}", "yes " * (n % 4 + 1))} for n in range(24)]


def train_loss(tmp_path, folder, **changes):
    """Training loss of each update of a run of its own folder, as its metrics file has it."""
    written = recipe(tmp_path, train_iters=3) | {"run_dir": str(tmp_path / folder)} | changes
    trainer(written).train()
    return [row["loss"] for row in read_rows(tmp_path / folder / "train-log-metrics.jsonl")]


def test_a_recipe_as_a_dict_trains_twice_in_a_row(tmp_path):
    written = recipe(tmp_path, train_iters=3)
    before = copy.deepcopy(written)
    config = get_config(written, ["optimizer.lr=1e-3"])
    assert written == before and config.optimizer.learning_rate == 1e-3
    first = train_loss(tmp_path, "one")
    assert train_loss(tmp_path, "two") == first
    assert len(first) == 3


def test_trainers_side_by_side_do_not_touch_each_other(tmp_path):
    expected = losses(trainer(recipe(tmp_path)), 3)
    runs = [trainer(recipe(tmp_path)), trainer(recipe(tmp_path, optimizer={"lr": 1e-4}))]
    found = {0: [], 1: []}
    for step in range(3):
        for number, run in enumerate(runs):
            batch = run.layout.on_devices(run.data.train.batch(run.data.train.advance(0, step)))
            run.state, metrics = run.step(run.state, batch)
            found[number].append(float(metrics["loss"]))
    assert found[0] == expected
    assert found[1][0] == expected[0] and found[1][2] != expected[2]


class Watch(Callback):
    """Reads everything there is to read, in the middle of a run."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, control, state, params, lr_scheduler, tokenizer):
        assert params is state.params and lr_scheduler is state.scheduler
        assert tokenizer is state.tokenizer
        self.seen.append((state.global_step, state.epoch_idx, state.train_batch_idx,
                          state.epoch_finished, state.training_finished))  # fmt: skip


def test_where_a_run_is_can_be_read_from_a_callback(tmp_path):
    """Trap G7: callbacks get what they name, in whatever order they name it."""
    watch = Watch()
    written = recipe(tmp_path, rows=8, epochs=2, gradient_accumulation_steps=2)
    run = trainer({k: v for k, v in written.items() if k != "train_iters"}, callbacks=[watch])
    of_epoch = run.data.steps_per_epoch
    assert (run.world_size, run.global_rank, run.device) == (1, 0, jax.devices()[0])
    assert run.devices == jax.devices()[:1]
    step, loss, metrics = run.train()
    assert step == run.training_horizon == 2 * of_epoch
    assert loss > 0 and metrics["train_runtime"] > 0
    assert [seen[0] for seen in watch.seen] == list(range(1, step + 1))
    assert watch.seen[-1] == (step, 2, 2 * step, True, True)
    assert [seen[3] for seen in watch.seen] == [s % of_epoch == 0 for s in range(1, step + 1)]
    logits = run.model_unwrapped(jax.tree.map(lambda a: a[0], run.train_dataloader.batch(0)))
    assert logits.shape[-1] == 384
    assert list(run.epochs) == []


def test_evaluation_before_any_training_and_of_other_rows(tmp_path):
    file = conversations(tmp_path / "held-out.jsonl", 12, seed=1)
    written = recipe(tmp_path, eval_interval=1, data={"eval_sources": [str(file)]})
    told = []

    class Listen(Callback):
        def on_evaluate(self, metrics):
            told.append(metrics)

    run = trainer(written, callbacks=[Listen])
    own = run.evaluate()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for dataset in (rows, iter(rows), str(file), [{"type": "jsonl", "path": str(file)}]):
        assert run.evaluate(dataset) == own
    assert run.evaluate(CHATS) != own
    assert told == [own], "the metrics of other rows are returned, and not taken for the recipe's"
    with pytest.raises(RecipeError, match="pth: unknown key"):
        run.evaluate([{"type": "jsonl", "pth": "x"}])
    assert not (tmp_path / "run").exists()


def test_save_model_goes_where_the_recipe_exports_to(tmp_path):
    export = {"checkpoint": {"type": "huggingface", "output_dir": str(tmp_path / "out")}}
    folder = trainer(recipe(tmp_path) | export).save_model()
    assert folder == tmp_path / "out" / "global_step_0"
    assert (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()
    run = trainer(recipe(tmp_path))
    with pytest.raises(
        RecipeError, match=r"no entry of type huggingface .*write save_model\(folder"
    ):
        run.save_model()
    assert run.save_model(tmp_path / "here") == tmp_path / "here"


def test_a_mode_prepares_data_and_nothing_else(tmp_path, capsys):
    run = SFTTrainer(get_config(recipe(tmp_path)), mode="process-data")
    assert run.data.train_rows > 0
    assert "records read" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="mode 'process-data' does not train"):
        run.train()
    assert not (tmp_path / "run").exists()


def test_rows_may_be_given(tmp_path):
    written = recipe(tmp_path, data={"sources": ["given"]})
    with pytest.raises(DataError, match="given: no records; pass them as `train_data`"):
        trainer(written)
    evals = {"a": CHATS[16:20], "b": iter(CHATS[20:])}
    run = trainer(written, train_data=CHATS[:16], eval_data=evals)
    assert run.data.ledger.sources[0].rows == 16
    assert set(run.eval_dataloader) == {"a", "b"}
    assert {"eval/a/loss", "eval/b/loss", "eval/loss"} <= run.evaluate().keys()
    both = recipe(tmp_path, eval_interval=1, data={"train_eval_split": [0.5, 0.5]})
    with pytest.raises(RecipeError, match="data.train_eval_split: excludes eval_data"):
        trainer(both, eval_data=CHATS)


def test_given_rows_may_be_tokens_and_have_the_recipes_keys(tmp_path):
    tokens = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 4
    run = trainer(recipe(tmp_path), train_data=tokens)
    assert run.data.ledger.sets[0].trained_tokens == 3 * 4
    mapping = {"type": "given", "role_mapping": {"user": "q", "assistant": "a"}}
    written = recipe(tmp_path, data={"sources": [mapping]})
    rows = [{"q": "why", "a": "so"}] * 3
    run = trainer(written, train_data=rows)
    assert run.data.ledger.sources[0].rows == 3


def test_an_optimizer_and_a_schedule_may_be_given(tmp_path):
    only_the_first = lambda step: (step == 0) * 1.0
    written = recipe(tmp_path, max_grad_norm=0)
    run = trainer(written, optimizer=optax.sgd(0.5), scheduler=only_the_first)
    before = host(run.state.params)
    losses(run, 1)
    after = host(run.state.params)
    assert any((after[name] != before[name]).any() for name in before)
    losses(run, 1)  # the schedule is 0 from here on
    assert_same(run.state.params, after)
    assert run.peak_lr == 1.0


def test_weights_and_a_tokenizer_may_be_given(tmp_path):
    first = trainer(recipe(tmp_path))
    losses(first, 2)
    given = first.model_unwrapped
    tokenizer = tiny_tokenizer()
    second = trainer(recipe(tmp_path) | {"seed": 7}, model=given, processing_class=tokenizer)
    assert second.tokenizer is tokenizer
    trained = host(first.state.params)
    assert_same(second.state.params, trained)
    losses(second, 1)  # gives its own arrays away, not those it was made of
    assert np.isfinite(losses(first, 1)[0])
    with pytest.raises(
        WeightError, match=r"model: embed/embedding is float32\[384, 32\] in the given"
    ):
        written = recipe(tmp_path / "other")
        model_folder(tmp_path / "other/model", hidden_size=64)
        trainer(written, model=given).start()


class Chatty(SFTTrainer):
    name = "chatty-of-test"

    @classmethod
    def default_callbacks(cls):
        return [Watch]


def test_default_callbacks_hold_until_others_are_given(tmp_path):
    run = trainer(recipe(tmp_path), cls=Chatty)
    assert isinstance(run.pop_callback(Watch), Watch)
    run = trainer(recipe(tmp_path), cls=Chatty, callbacks=[])
    assert run.pop_callback(Watch) is None


def test_an_argument_that_no_trainer_has_is_named(tmp_path):
    with pytest.raises(TypeError, match="a trainer takes no 'tokeniser'; did you mean `tokenizer`"):
        trainer(recipe(tmp_path), tokeniser=None)


def test_an_event_that_does_not_exist_is_refused_when_the_class_is_made():
    with pytest.raises(ValueError, match="no event 'on_step_ends'; did you mean `on_step_end`"):

        class Mistaken(Callback):
            def on_step_ends(self): ...


def test_a_mistake_in_a_call_says_what_is_right(tmp_path):
    config = get_config(recipe(tmp_path))
    for call, expected in (
        (lambda: SFTTrainer("recipe.yaml"), r"found str; write SFTTrainer\(get_config\(…\)\)"),
        (
            lambda: SFTTrainer(config, mode="eval"),
            "mode must be one of train, process-data, plan, found",
        ),
        (lambda: SFTTrainer(config, callbacks=["x"]), "'x' is no callback: it has none of on_"),
        (lambda: SFTTrainer(config, model="x"), "model must be the `model` of another trainer"),
        (lambda: SFTTrainer(config, optimizer="adam"), "optimizer must be an optax transformation"),
        (lambda: SFTTrainer(config, scheduler=1), "scheduler must be a function of the step"),
        (lambda: SFTTrainer(config, early_stopper=1), "early_stopper must be a function of step"),
    ):
        with pytest.raises((TypeError, ValueError), match=expected):
            call()


def evaluated_run(folder, **given):
    written = recipe(
        folder, rows=40, train_iters=6, eval_interval=2, data={"train_eval_split": [0.8, 0.2]},
        checkpoint={"output_dir": str(folder / "state"), "save_every_n_steps": 2},
    )  # fmt: skip
    return trainer(written, **given)


def test_state_is_saved_loaded_and_exported_when_asked(tmp_path):
    """Features, 4.1: each method before, during and after a training."""
    with evaluated_run(tmp_path) as run:
        assert run.resume_path is None
        before = run.save_checkpoint(tmp_path / "before")
        assert before == tmp_path / "before" / "global_step_0"
        start = host(run.state.params)
        run.train()
        (engine,) = run.checkpoint_engines
        worst = max(engine.scores(), key=engine.scores().get)
        trained = host(run.state)
        run.load_checkpoint(before)
        assert run.global_step == run.position == 0
        assert_same(run.state.params, start)
        run.load_checkpoint(2)
        assert run.global_step == 2 and run.eval_metrics["eval/loss"] == engine.scores()[2]
        run.load_checkpoint()
        assert_same(run.state, trained)
        run.load_best_model()
        assert run.global_step == engine.best() != worst
        folder = run.save_model(tmp_path / "out")
        assert run.model_exists(folder) and not run.model_exists(tmp_path)
        (folder / "model.safetensors").unlink()
        assert not run.model_exists(folder)
        with pytest.raises(CheckpointError, match=r"there is no .*global_step_9"):
            run.load_checkpoint(9)
    without = trainer(recipe(tmp_path / "other"))
    for call in (without.save_checkpoint, without.load_checkpoint):
        with pytest.raises(RecipeError, match="no `orbax` entry says where .*; name a folder"):
            call()
    with pytest.raises(CheckpointError, match="no checkpoint of an `orbax` entry has a score"):
        without.load_best_model()


class Reader(Callback):
    """Reads `state` as callbacks of other trainers do, and records numbers of its own."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, state):
        state.metrics.record("twice the step", 2 * state.global_step)
        state.metrics.start_timer("nothing")
        state.metrics.stop_timer("nothing")
        assert state.metrics.get_value("twice the step") == 2 * state.global_step
        with pytest.raises(ValueError, match="'twice the step' was recorded already in this step"):
            state.metrics.record("twice the step", 0)
        self.seen.append(state.epoch)

    def on_train_end(self, state):
        state.log({"word": "done"})

    def on_log(self, logs):
        self.last = logs


def test_a_callback_reads_the_state_of_other_trainers_and_records(tmp_path):
    """Features, 4.5 and section 2: `state`, `metrics`, what `train` returns."""
    reader = Reader()
    run = evaluated_run(
        tmp_path, callbacks=[reader, GradLogger("^layers"), WeightNormLogger("norm")]
    )
    output = run.train()
    state = RunState(run)
    rows = [r for r in metrics_of(tmp_path) if "loss" in r]
    assert [row["twice the step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert all(row["nothing_time"] >= 0 for row in rows)
    assert reader.last == {"iter": 6, "word": "done"} == state.log_history[-1]
    of_epoch = run.data.steps_per_epoch
    assert reader.seen == [step / of_epoch for step in range(1, 7)]
    scores = run.checkpoint_engines[0].scores()
    assert state.best_metric == scores[6] == min(scores.values())
    assert state.num_input_tokens_seen == sum(row["tokens"] for row in rows)
    flops = sum(row["tokens"] for row in rows) * run.report.meter.flops_per_token
    assert state.total_flos > flops
    assert (state.max_steps, state.train_batch_size, state.save_steps, state.eval_steps) == (
        6,
        1,
        2,
        2,
    )
    assert (state.raw_epoch, state.epoch_start_step, state.logging_steps) == (0, 0, 1)
    assert state.is_world_process_zero and state.num_processes == 1
    assert state.best_model_checkpoint.startswith(str(tmp_path / "state"))
    assert state.num_train_epochs == 6 / of_epoch and state.max_eval_steps == 0
    assert "on_nonfinite" in state.stateful_callbacks and not state.is_hyper_param_search
    metrics = output.metrics
    assert metrics["train_samples"] == 6 and metrics["effective_batch_size"] == 1
    per_second = metrics["train_tokens_per_second"] * metrics["train_runtime"]
    assert per_second == pytest.approx(state.num_input_tokens_seen)
    assert metrics["epoch"] == 6 / of_epoch and "eval/loss" in metrics
    # Norms: of every parameter that the pattern finds, and together what the row says.
    assert {name for name in rows[0] if name.startswith("weight_norm/")} >= {"weight_norm/norm"}
    told = {name for name in rows[0] if name.startswith("grad_norm/")}
    assert told and all(name.startswith("grad_norm/layers") for name in told)
    assert rows[0]["weight_norm/norm"] != rows[1]["weight_norm/norm"]


def test_norms_of_gradients_are_those_that_are_clipped(tmp_path):
    run = trainer(recipe(tmp_path, gradient_accumulation_steps=2))
    run.add_callback(GradLogger)
    _, metrics = run.step(run.state, first_batch(run))
    parts = [float(v) for name, v in metrics.items() if name.startswith("grad_norm/")]
    assert np.sqrt(np.sum(np.square(parts))) == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_loss_may_depend_on_the_update(tmp_path, pieces):
    class Warming(SFTTrainer):
        name = "warming-of-test"

        def loss_fn(self, model, batch, key):
            loss = super().loss_fn(model, batch, key)
            metrics = loss.metrics | {"plain": (loss.total, loss.weight)}
            return loss._replace(total=loss.total * (batch.step + 1), metrics=metrics)

    run = trainer(recipe(tmp_path, gradient_accumulation_steps=pieces), cls=Warming)
    for number, batch in enumerate(run.data.train_batches(0, 3), start=1):
        run.state, metrics = run.step(run.state, run.layout.on_devices(batch))
        assert metrics["loss"] == pytest.approx(number * float(metrics["plain"]), rel=1e-5)


def test_a_stopper_may_be_given(tmp_path):
    asked = []

    class Second:
        def should_stop(self, step, score):
            asked.append((step, score))
            return len(asked) == 2

    run = evaluated_run(tmp_path, early_stopper=Second())
    assert run.train().global_step == 4
    assert asked == list(run.checkpoint_engines[0].scores().items())
    assert "the early_stopper ended it at eval/loss" in run.early_stop_reason
    written = recipe(tmp_path / "other")
    with pytest.raises(RecipeError, match="early_stopper: needs evaluation data"):
        trainer(written, early_stopper=lambda step, score: True).train()
    assert not (tmp_path / "other" / "run").exists()
    stopping = {"early_stopping": EarlyStoppingConfig(patience=1)}
    both = get_config(written).model_copy(update=stopping)
    with pytest.raises(RecipeError, match="early_stopping: excludes a given early_stopper"):
        SFTTrainer(both, early_stopper=lambda step, score: True)


def test_what_came_from_the_environment_is_in_no_file_of_the_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "w").mkdir()
    written = recipe(tmp_path / "w", train_iters=1, tensorboard=True) | {
        "checkpoint": {"output_dir": str(tmp_path / "w" / "state"), "save_end_of_training": True}
    }
    monkeypatch.setenv("WHERE", secret := str(tmp_path / "quite-secret.jsonl"))
    monkeypatch.setattr("sys.argv", ["jaxtrain", f"data.sources.0={secret}"])
    (tmp_path / "w" / "rows.jsonl").rename(secret)
    written["data"]["sources"] = ["${env:WHERE}"]
    (tmp_path / "w" / "recipe.yaml").write_text(yaml.safe_dump(written))
    run = trainer(tmp_path / "w" / "recipe.yaml")

    class Warn(Callback):
        def on_step_end(self):
            log.warning("of %s", secret)

    run.add_callback(Warn)
    run.train()
    files = [file for file in (tmp_path / "w").rglob("*") if file.is_file()]
    assert any(file.name == "rank_0.log" for file in files)
    assert [file for file in files if b"quite-secret" in file.read_bytes()] == []
    assert "quite-secret" not in capsys.readouterr().out


def test_a_checkpoint_of_another_schedule_changes_the_rates_of_the_compiled_step(tmp_path):
    """A run whose schedule was reset at step 2 is loaded into one that has stepped already."""
    entry = {"output_dir": str(tmp_path / "state"), "save_every_n_steps": 1}
    keys = {"scheduler": {"name": "linear"}, "train_iters": 6}
    first = trainer(recipe(tmp_path, checkpoint=[entry], exit_iteration=2, **keys))
    first.train()
    reset = entry | {"auto_resume": True, "reset": ["scheduler"]}
    again = trainer(recipe(tmp_path, checkpoint=[reset], exit_iteration=3, **keys))
    again.train()
    run = trainer(recipe(tmp_path, checkpoint=[reset], **keys))
    run.load_checkpoint(tmp_path / "state" / "global_step_1")
    batch = run.layout.on_devices(run.data.train.batch(0))
    rates = []
    for step in (1, 3):
        run.load_checkpoint(tmp_path / "state" / f"global_step_{step}")
        run.state, metrics = run.step(run.state, batch)
        rates.append(float(metrics["lr_scale"]))
    assert rates == pytest.approx([1 - 1 / 6, 1 - 1 / 4]), "4 steps are left from step 2 on"


def test_callbacks_and_factories_cannot_set_what_the_loop_reads(tmp_path):
    state = RunState(trainer(recipe(tmp_path)))
    for name in ("global_step", "gloabl_step", "config"):
        with pytest.raises(AttributeError, match=rf"trainer.{name}: a trainer is read-only here"):
            setattr(state, name, 1)
    with pytest.raises(AttributeError, match=r"trainer.gloabl_step: no such attribute here"):
        state.gloabl_step  # noqa: B018
    state.state = state.state._replace(step=state.state.step + 1)
    assert int(state.trainer.state.step) == 1


def test_a_trainer_that_nobody_holds_gives_its_memory_back(tmp_path):
    run = trainer(recipe(tmp_path, train_iters=2))
    run.train()
    gone = weakref.ref(run)
    del run
    gc.collect()
    assert gone() is None


def test_every_name_of_the_interface_is_there(tmp_path):
    run = trainer(recipe(tmp_path))
    names = [name for name, held in vars(Interface).items() if isinstance(held, property)]
    assert len(names) > 40
    for name in names:
        getattr(RunState(run), name)
