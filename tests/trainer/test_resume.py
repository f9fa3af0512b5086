"""A run that stops and goes on is the run that never stopped."""

import json
import re

import jax
import numpy as np
import pytest
import yaml

from jaxtrain import Callback, SFTTrainer, get_config
from jaxtrain.checkpoint.compatibility import Identity, refuse_changes
from jaxtrain.cli import cli
from jaxtrain.metrics.writer import read_rows
from jaxtrain.model import export
from jaxtrain.model.tensor_file import read_folder
from jaxtrain.recipe.errors import CheckpointError, RecipeError
from tests.runs import conversations, host, recipe, trainer

STEPS = 8


def written(folder, **changes):
    changes = {"train_iters": STEPS, "rows": 18, "gradient_accumulation_steps": 2} | changes
    checkpoint = {"output_dir": str(folder / "state"), "save_every_n_steps": 1, "auto_resume": True}
    return recipe(folder, **changes) | {"checkpoint": [checkpoint]}


def rows(folder):
    return {row["iter"]: row for row in read_rows(folder / "run" / "train-log-metrics.jsonl")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run = trainer(written(folder))
    run.train()
    assert 1 < run.data.steps_per_epoch < STEPS, "an epoch must end within the run"
    return folder, host(run.state), run.data.steps_per_epoch


@pytest.mark.parametrize("stop", [1, "epoch", 6])
def test_a_resumed_run_is_bitwise_the_unbroken_one(tmp_path, unbroken, stop):
    """Traps A6 and A7: what is saved under N is the run that stopped at N, also where an epoch
    ends, and the very next row comes next."""
    folder, state, steps_per_epoch = unbroken
    stop = steps_per_epoch if stop == "epoch" else stop
    trainer(written(tmp_path, exit_iteration=stop)).train()
    again = trainer(written(tmp_path))
    again.train()
    for name, array in host(again.state).items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)
    expected, found = rows(folder), rows(tmp_path)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    for step in expected:
        for key in ("loss", "grad_norm", "lr", "tokens", "trained_tokens", "token_accuracy"):
            assert found[step][key] == expected[step][key], (step, key)


def written_at(folder):
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()
            if file.parent.name != "model" and file.name != "rows.jsonl"}  # fmt: skip


def test_a_finished_run_resumes_to_nothing(tmp_path):
    """Traps A27 and F1; nothing is saved where nothing was updated."""
    trainer(written(tmp_path, train_iters=2)).train()
    before = written_at(tmp_path)
    for end in ({}, {"exit_iteration": 1}):
        assert trainer(written(tmp_path, train_iters=2, **end)).train().global_step == 2
    assert written_at(tmp_path) == before


def test_a_checkpoint_restores_onto_another_mesh(tmp_path):
    trainer(written(tmp_path, micro_batch_size=4, exit_iteration=3)).train()
    alone = trainer(written(tmp_path, micro_batch_size=4))
    sharded = trainer(
        written(tmp_path, micro_batch_size=2, mesh={"fsdp": 2, "tensor": 2}), devices=4
    )
    expected = host(alone.state)
    for name, array in host(sharded.state).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert sharded.global_step == 3
    # Trap A30: one export for every mesh.
    (tmp_path / "model" / "generation_config.json").write_text('{"do_sample": true}')
    one, other = (run.save_model(tmp_path / f"on {run.mesh.size}") for run in (alone, sharded))
    files = sorted(file.name for file in one.iterdir())
    assert {"generation_config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert files == sorted(file.name for file in other.iterdir())
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_other_data_cannot_continue_a_run_unless_allowed(tmp_path, monkeypatch, capsys):
    trainer(written(tmp_path, exit_iteration=1)).train()
    other = conversations(tmp_path / "other.jsonl", 18, seed=1)
    changed = written(tmp_path)
    changed["data"]["sources"] = [str(other)]
    with pytest.raises(RecipeError, match=r"data\.sources: is .* a run cannot be continued"):
        trainer(changed).train()
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(changed))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    arguments = [str(file), "train_iters=2", "--allow-change", "data.sources"]
    with pytest.raises(RecipeError, match="^global_batch: is 16, .* has 2; .* --allow-change glob"):
        cli(arguments, standalone_mode=False)  # on the eight devices of the tests
    cli([*arguments, "--allow-change", "global_batch"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "continuing after step 1" in said and "finished: 2 steps" in said
    assert re.search("changed since global_step_1: data.sources, .*global_batch\n", said)


class Taking(SFTTrainer):
    """Notes the sequences that it is given."""

    name = "taking"

    def __init__(self, *args, **named):
        self.taken = []
        super().__init__(*args, **named)

    @property
    def train_batches(self):
        for batch in super().train_batches:
            self.taken += [int(row) for row in np.asarray(batch.rows).ravel() if row >= 0]
            yield batch


def test_steps_of_another_size_continue_at_the_next_sequence_and_to_the_end_of_the_passes(tmp_path):
    def continued(pieces, end):
        written_here = written(
            tmp_path, train_iters=0, epochs=2, gradient_accumulation_steps=pieces,
            exit_iteration=end, scheduler={"name": "linear"},
        )  # fmt: skip
        run = trainer(written_here, cls=Taking)
        run.allowed_changes = ("global_batch",)
        run.train()
        return run

    first = continued(2, 4)
    plan = first.data.train
    assert (first.position, plan.epoch_sequences) == (8, 11)
    taken, runs = first.taken, [first]
    for pieces, end in ((4, 5), (4, 7), (3, 0)):
        runs.append(continued(pieces, end))
        taken += runs[-1].taken
    order = [plan.batches(n * plan.epoch_sequences, plan.steps_per_epoch, 0) for n in range(2)]
    expected = [row for batches in order for batch in batches for row in batch.rows.ravel()]
    assert taken == [row for row in expected if row >= 0]
    last = runs[-1]
    assert last.epochs_done == 2 and last.global_step == last.planned_updates
    rates = [row["lr"] for row in rows(tmp_path).values()]
    assert rates[-1] == pytest.approx(0.01 / last.planned_updates)
    assert runs[1].planned_updates == runs[2].planned_updates > last.global_step - 4


def test_another_model_cannot_continue_a_run(tmp_path):
    trainer(written(tmp_path, exit_iteration=1)).train()
    changed = written(tmp_path)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 80}))
    with pytest.raises(CheckpointError, match=r"does not fit the recipe's model: .* arrays differ"):
        trainer(changed).train()


@pytest.mark.parametrize("key", ["model.peft_config", "data.a_newer_key"])
def test_a_key_that_an_older_checkpoint_lacks_may_be_left_out_and_not_set(tmp_path, key):
    saved = {"lineage": {"seed": 1}, "recipe": {}}
    assert refuse_changes(Identity({"seed": 1, key: None}, {}, ()), saved, tmp_path, ()) == []
    with pytest.raises(RecipeError, match=rf"{key}: is 8, .* has null; a run cannot be continued"):
        refuse_changes(Identity({"seed": 1, key: 8}, {}, ()), saved, tmp_path, ())


def test_a_damaged_checkpoint_is_an_error_and_no_fresh_start(tmp_path):
    trainer(written(tmp_path, exit_iteration=1)).train()
    largest = max((tmp_path / "state").rglob("d/*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:10])
    with pytest.raises(
        CheckpointError, match="is damaged: .* found 10 bytes; .* on_corrupt: previous"
    ):
        trainer(written(tmp_path)).train()


def test_a_run_is_not_written_over(tmp_path):
    first = recipe(tmp_path, train_iters=1)
    trainer(first).train()
    with pytest.raises(RecipeError, match="holds a run of this recipe"):
        trainer(first).train()
    with pytest.raises(RecipeError, match=r"the run of another recipe \(differs in train_iters\)"):
        trainer(first | {"train_iters": 2}).train()


def test_a_folder_of_checkpoints_is_not_written_over(tmp_path):
    export = {
        "type": "huggingface",
        "output_dir": str(tmp_path / "out"),
        "save_end_of_training": True,
    }
    first = recipe(tmp_path, train_iters=1) | {"checkpoint": [export]}
    trainer(first).train()
    with pytest.raises(RecipeError, match="holds global_step_1 of another run"):
        trainer(first | {"run_dir": str(tmp_path / "second")}).train()
    assert get_config(first).run_dir == str(tmp_path / "run")


class Counter(Callback):
    updates = 0

    def on_step_end(self, args, state, control, **more):
        self.updates += 1

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]


def is_zero(tree):
    return all(not np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(tree))


def test_each_part_of_the_state_is_reset_alone(tmp_path, capsys):
    """Trap G11: the step is restored whatever is not."""
    first = trainer(written(tmp_path, exit_iteration=5, scheduler={"name": "linear"}))
    first.add_callback(Counter)
    first.train()
    saved = host(first.state)

    def restored(*reset):
        again = written(tmp_path, scheduler={"name": "linear"})
        again["checkpoint"][0]["reset"] = list(reset)
        run, counter = trainer(again), Counter()
        run.add_callback(counter)
        run.start()
        rates = [float(run.scheduler(np.int32(step))) for step in range(5, STEPS)]
        assert run.global_step == int(run.state.step) == 5
        np.testing.assert_array_equal(run.state.params["norm"], saved[".params['norm']"])
        return is_zero(run.state.opt_state), rates, run.train_batch_idx // 2, counter.updates

    left = [1 - step / STEPS for step in range(5, STEPS)]
    anew = [1.0, 2 / 3, 1 / 3]  # over what is left of the run
    for reset, expected in {
        (): (False, left, 5, 5),
        ("optimizer",): (True, left, 5, 5),
        ("scheduler",): (False, anew, 5, 5),
        ("data",): (False, left, 0, 5),
        ("callbacks",): (False, left, 5, 0),
        ("early_stopping", "optimizer", "data"): (True, left, 0, 5),
    }.items():
        found = restored(*reset)
        assert found[0] == expected[0] and found[2:] == expected[2:], reset
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)
        said = capsys.readouterr().out
        assert (f"not restored: {', '.join(sorted(reset))}" in said) == bool(reset)


def test_a_reset_schedule_goes_on_over_further_restarts(tmp_path):
    config = {"scheduler": {"name": "linear"}, "train_iters": 4}
    trainer(written(tmp_path, exit_iteration=2, **config)).train()
    for end in (3, 4):
        again = written(tmp_path, exit_iteration=end, **config)
        again["checkpoint"][0]["reset"] = ["scheduler", "data"]
        run = trainer(again)
        run.train()
    assert [round(row["lr"], 6) for row in rows(tmp_path).values()] == [0.01, 0.0075, 0.01, 0.005]
    assert run.train_batch_idx == 2 * 2


def test_a_score_is_saved_inside(tmp_path):
    """Trap F12: evaluated first, then saved; what the checkpoint says about itself."""
    run = trainer(
        written(
            tmp_path, train_iters=2, rows=24, eval_interval=2, data={"train_eval_split": [0.7, 0.3]}
        )
    )
    run.train()
    (engine,) = run.checkpoint_engines
    about = engine.metadata(2)
    assert engine.latest() == engine.best() == 2 and engine.scores().keys() == {2}
    assert about["eval_metrics"]["eval/loss"] == about["scores"]["2"] == engine.scores()[2]
    assert (
        about["step"] == 2
        and about["sequences"] == 4
        and about["versions"]["jax"] == jax.__version__
    )
    assert about["recipe"]["train_iters"] == 2 and about["epoch"] > 0
    assert engine.metadata(1)["eval_metrics"] == {}


def test_a_fresh_start_is_said_and_a_missing_start_is_an_error(tmp_path, capsys):
    """Trap A29."""
    run = trainer(written(tmp_path))
    run.start()
    assert f"no checkpoint in {tmp_path / 'state'}: starting fresh" in capsys.readouterr().out
    missing = written(tmp_path)
    missing["checkpoint"][0] |= {"resume_from": 7, "output_dir": "{run_dir}/state"}
    with pytest.raises(CheckpointError, match="resume_from: there is no .*state/global_step_7"):
        trainer(missing).start()
    missing["checkpoint"][0]["output_dir"] = str(tmp_path / "state")
    with pytest.raises(RecipeError, match=r"resume_from: must be a folder global_step_N"):
        trainer(missing)


def test_an_earlier_start_leaves_the_later_ones_aside(tmp_path):
    """Also without `auto_resume`; exports of the other future are written over."""
    base = written(tmp_path, train_iters=3)
    del base["checkpoint"][0]["auto_resume"]
    export = {"type": "huggingface", "output_dir": str(tmp_path / "out"), "keep_last_n": 1}
    base["checkpoint"].append({**export, "save_every_n_steps": 1})
    trainer(base).train()
    before = (tmp_path / "out" / "global_step_3" / "model.safetensors").stat().st_mtime_ns
    base["checkpoint"][0]["resume_from"] = 1
    base["optimizer"]["lr"] = 1e-3
    run = trainer(base)
    run.train()
    state, exports = run.checkpoint_engines
    assert state.steps() == [1, 2, 3] and exports.steps() == [3]
    assert sorted(p.name for p in (tmp_path / "state").glob("*.aside")) == [
        "global_step_2.aside", "global_step_3.aside",
    ]  # fmt: skip
    after = (tmp_path / "out" / "global_step_3" / "model.safetensors").stat().st_mtime_ns
    assert after > before and state.metadata(3)["started_from"].endswith("global_step_1")


def test_an_export_that_cannot_be_written_ends_the_run(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "global_step_1").write_text("a file")
    export = {"type": "huggingface", "output_dir": str(tmp_path / "out"), "save_every_n_steps": 1}
    with pytest.raises(CheckpointError, match="out/global_step_1 cannot be written: "):
        trainer(recipe(tmp_path, train_iters=1) | {"checkpoint": [export]}).train()


@pytest.mark.covers("checkpoint.*.max_shard_size", "checkpoint.*.verify_export")
def test_an_export_is_written_as_its_entry_says(tmp_path, monkeypatch):
    def exported(name, **keys):
        entry = {"type": "huggingface", "output_dir": str(tmp_path / name), **keys}
        entry["save_end_of_training"] = True
        trainer(recipe(tmp_path / name, train_iters=1) | {"checkpoint": [entry]}).train()
        return list((tmp_path / name / "global_step_1").glob("*.safetensors"))

    assert len(exported("one")) == 1
    sizes = [file.stat().st_size for file in exported("many", max_shard_size="30KB")]
    assert len(sizes) > 5 and sum(size > 31_000 for size in sizes) <= 2  # a tensor is never cut
    right = export.write_folder

    def zeroed(folder, tensors, max_shard_bytes):
        tensors = {
            name: to_write._replace(make=lambda t=to_write: np.zeros_like(t.make()))
            for name, to_write in tensors.items()
        }
        right(folder, tensors, max_shard_bytes)

    monkeypatch.setattr(export, "write_folder", zeroed)
    with pytest.raises(CheckpointError, match="differ when read back"):
        exported("damaged")
    assert exported("unseen", verify_export=False)


@pytest.mark.covers("model.dtype")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_has_the_dtype_of_the_computation(tmp_path, dtype):
    run = trainer(recipe(tmp_path, model={"dtype": dtype}))
    folder = run.save_model(tmp_path / "out")
    norm = read_folder(folder)["model.norm.weight"].read()
    assert (
        norm.dtype.name == json.loads((folder / "config.json").read_text())["torch_dtype"] == dtype
    )
    np.testing.assert_array_equal(norm, run.state.params["norm"].astype(dtype))
