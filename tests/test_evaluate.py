"""`jaxtrain eval`: what a run reports of its weights, and nothing is written."""

import json

import click
import pytest
import yaml

from jaxtrain.cli import cli
from jaxtrain.recipe.errors import CheckpointError, RecipeError
from tests.runs import conversations, metrics_of, recipe, trainer


def test_an_evaluation_has_the_metrics_that_the_run_had(tmp_path):
    state = {"output_dir": str(tmp_path / "state"), "save_every_n_steps": 2}
    written = recipe(
        tmp_path, train_iters=4, eval_interval=2, eval_at_start=True,
        data={"train_eval_split": [0.8, 0.2]}, checkpoint=[state],
    )  # fmt: skip
    trainer(written, devices=1).train()
    told = {row["iter"]: row for row in metrics_of(tmp_path) if "eval/loss" in row}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(written))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    found = {}
    for step, words in {
        0: [],
        2: ["--checkpoint", str(tmp_path / "state" / "global_step_2")],
        4: ["--checkpoint", str(tmp_path / "run")],
    }.items():
        out = tmp_path / f"metrics {step}.json"
        arguments = ["eval", str(file), *words, "--out", str(out), "--num_gpus", "1"]
        cli(arguments, standalone_mode=False)
        found[step] = json.loads(out.read_text())
        out.unlink()
    for step, metrics in found.items():
        assert metrics == {key: told[step][key] for key in metrics} and "eval/loss" in metrics
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_other_data_and_batches_are_evaluated_and_another_model_is_not(tmp_path):
    state = {"output_dir": str(tmp_path / "state"), "save_every_n_steps": 1}
    trainer(recipe(tmp_path, train_iters=1, checkpoint=[state]), devices=1).train()
    other = conversations(tmp_path / "other.jsonl", 12, seed=3)
    written = recipe(
        tmp_path, train_iters=1, micro_batch_size=2, eval_interval=1,
        data={"eval_sources": {"chat": [str(other)]}},
    )  # fmt: skip
    file, out = tmp_path / "recipe.yaml", tmp_path / "metrics.json"
    file.write_text(yaml.safe_dump(written))
    arguments = ["eval", str(file), "--checkpoint", str(tmp_path / "run")]
    cli([*arguments, "--out", str(out)], standalone_mode=False)
    assert json.loads(out.read_text())["eval/chat/loss"] > 0
    with pytest.raises(click.UsageError, match="metrics.json exists already"):
        cli([*arguments, "--out", str(out)], standalone_mode=False)
    with pytest.raises(CheckpointError, match="does not fit .* such as .'weights'."):
        cli([*arguments, "model.hf_config_kwargs.intermediate_size=80"], standalone_mode=False)
    with pytest.raises(RecipeError, match="no evaluation data"):
        cli([*arguments, "del:data.eval_sources", "del:eval_interval"], standalone_mode=False)
