"""A run that stops and goes on is the run that never stopped."""

import json

import numpy as np
import pytest

from jaxtrain import get_config
from jaxtrain.metrics.writer import read_rows
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


def test_a_finished_run_resumes_to_nothing(tmp_path):
    trainer(written(tmp_path, train_iters=2)).train()
    before = (tmp_path / "run" / "train-log-metrics.jsonl").read_bytes()
    output = trainer(written(tmp_path, train_iters=2)).train()
    assert output.global_step == 2
    assert (tmp_path / "run" / "train-log-metrics.jsonl").read_bytes() == before


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


def test_other_data_cannot_continue_a_run(tmp_path):
    trainer(written(tmp_path, exit_iteration=1)).train()
    other = conversations(tmp_path / "other.jsonl", 18, seed=1)
    changed = written(tmp_path)
    changed["data"]["sources"] = [str(other)]
    with pytest.raises(RecipeError, match=r"data\.sources: is .* a run cannot be continued"):
        trainer(changed).train()


def test_another_model_cannot_continue_a_run(tmp_path):
    trainer(written(tmp_path, exit_iteration=1)).train()
    changed = written(tmp_path)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 80}))
    with pytest.raises(CheckpointError, match=r"does not fit the recipe's model: .* arrays differ"):
        trainer(changed).train()


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
