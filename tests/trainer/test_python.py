"""Trainers from Python: as in a notebook, with ready-made objects, read and asked at any time."""

import copy
import json

import jax
import numpy as np
import optax
import pytest

from jaxtrain import Callback, SFTTrainer, get_config
from jaxtrain.metrics.writer import read_rows
from jaxtrain.recipe.errors import DataError, RecipeError, WeightError
from tests.runs import conversations, host, losses, recipe, trainer
from tests.tiny import chat, tiny_tokenizer

CHATS = [{"messages": chat(f"number {n}", "yes " * (n % 4 + 1))} for n in range(24)]


def train_loss(tmp_path, folder, **changes):
    """Training loss of each update of a run of its own folder, as its metrics file has it."""
    written = recipe(tmp_path, train_iters=3) | {"run_dir": str(tmp_path / folder)} | changes
    run = SFTTrainer(get_config(written), devices=jax.devices()[:1])
    run.train()
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
            batch = run.geometry.on_devices(run.data.train.batch(step))
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
    config = get_config({key: v for key, v in written.items() if key != "train_iters"})
    run = SFTTrainer(config, devices=jax.devices()[:1], callbacks=[watch])
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

    run = SFTTrainer(get_config(written), devices=jax.devices()[:1], callbacks=[Listen])
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
    assert "rows read" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="mode 'process-data' prepares rows alone"):
        run.train()
    assert not (tmp_path / "run").exists()


def test_rows_may_be_given(tmp_path):
    written = recipe(tmp_path, data={"sources": ["given"]})
    with pytest.raises(DataError, match="given: no rows; give them as `train_data`"):
        trainer(written)
    run = SFTTrainer(
        get_config(written), devices=jax.devices()[:1], train_data=CHATS[:16],
        eval_data={"a": CHATS[16:20], "b": iter(CHATS[20:])},
    )  # fmt: skip
    assert run.data.ledger.sources[0].rows == 16
    assert set(run.eval_dataloader) == {"a", "b"}
    assert {"eval/a/loss", "eval/b/loss", "eval/loss"} <= run.evaluate().keys()
    both = get_config(recipe(tmp_path, eval_interval=1, data={"train_eval_split": [0.5, 0.5]}))
    with pytest.raises(RecipeError, match="data.train_eval_split: excludes eval_data"):
        SFTTrainer(both, eval_data=CHATS)


def test_given_rows_may_be_tokens_and_have_the_recipes_keys(tmp_path):
    tokens = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 4
    run = SFTTrainer(get_config(recipe(tmp_path)), train_data=tokens, devices=jax.devices()[:1])
    assert run.data.ledger.sets[0].trained_tokens == 3 * 4
    mapping = {"type": "given", "role_mapping": {"user": "q", "assistant": "a"}}
    written = recipe(tmp_path, data={"sources": [mapping]})
    rows = [{"q": "why", "a": "so"}] * 3
    run = SFTTrainer(get_config(written), train_data=rows, devices=jax.devices()[:1])
    assert run.data.ledger.sources[0].rows == 3


def test_an_optimizer_and_a_schedule_may_be_given(tmp_path):
    run = SFTTrainer(
        get_config(recipe(tmp_path, max_grad_norm=0)), devices=jax.devices()[:1],
        optimizer=optax.sgd(0.5), scheduler=lambda step: (step == 0) * 1.0,
    )  # fmt: skip
    before = host(run.state.params)
    losses(run, 1)
    after = host(run.state.params)
    assert any((after[name] != before[name]).any() for name in before)
    losses(run, 1)  # the schedule is 0 from here on
    again = host(run.state.params)
    assert all((after[name] == again[name]).all() for name in before)
    assert run.peak_lr == 1.0


def test_weights_and_a_tokenizer_may_be_given(tmp_path):
    first = trainer(recipe(tmp_path))
    losses(first, 2)
    given = first.model_unwrapped
    tokenizer = tiny_tokenizer()
    changed = recipe(tmp_path) | {"seed": 7}
    devices = jax.devices()[:1]
    second = SFTTrainer(
        get_config(changed), devices=devices, model=given, processing_class=tokenizer
    )
    assert second.tokenizer is tokenizer
    trained = host(first.state.params)
    for name, array in host(second.state.params).items():
        np.testing.assert_array_equal(array, trained[name])
    losses(second, 1)  # gives its own arrays away, not those it was made of
    assert np.isfinite(losses(first, 1)[0])
    with pytest.raises(
        WeightError, match=r"model: embed/embedding is float32\[384, 32\] in the given"
    ):
        (tmp_path / "other").mkdir()
        written = recipe(tmp_path / "other")
        (tmp_path / "other/model/config.json").write_text(
            (tmp_path / "model/config.json")
            .read_text()
            .replace('"hidden_size": 32', '"hidden_size": 64')
        )
        SFTTrainer(get_config(written), devices=devices, model=given).start()


class Chatty(SFTTrainer):
    name = "chatty-of-test"

    @classmethod
    def default_callbacks(cls):
        return [Watch]


def test_default_callbacks_hold_until_others_are_given(tmp_path):
    run = trainer(recipe(tmp_path), cls=Chatty)
    assert isinstance(run.pop_callback(Watch), Watch)
    run = Chatty(get_config(recipe(tmp_path)), devices=jax.devices()[:1], callbacks=[])
    assert run.pop_callback(Watch) is None


def test_an_argument_that_no_trainer_has_is_named(tmp_path):
    with pytest.raises(TypeError, match="a trainer takes no 'tokeniser'; did you mean `tokenizer`"):
        SFTTrainer(get_config(recipe(tmp_path)), tokeniser=None)


def test_an_event_that_does_not_exist_is_refused_when_the_class_is_made():
    with pytest.raises(ValueError, match="no event 'on_step_ends'; did you mean `on_step_end`"):

        class Mistaken(Callback):
            def on_step_ends(self): ...
