"""`jaxtrain plan` and `jaxtrain export`: a run without data, and without weights that it needs not."""

import json
import re
import subprocess
import sys

import click
import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from jaxtrain.cli import cli
from jaxtrain.export import find_checkpoint
from jaxtrain.plan import device_bytes
from jaxtrain.recipe.errors import CheckpointError, RecipeError
from tests.runs import environment, recipe, trainer


def saved_recipe(folder, **changes):
    written = recipe(folder, **changes)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(written))
    return folder / "recipe.yaml"


def test_a_plan_simulates_devices_and_reads_no_data(tmp_path):
    file = saved_recipe(tmp_path, mesh={"fsdp": 4}, micro_batch_size=2)
    (tmp_path / "rows.jsonl").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "jaxtrain", "plan", str(file), "--devices", "4"],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = dict(re.split(r" +", line, maxsplit=1) for line in done.stdout.splitlines())
    assert facts["devices"] == "4 x cpu, mesh fsdp 4"
    assert facts["batch"] == "8 sequences of 128 tokens per step"
    assert facts["state"].startswith("0.") and "optimizer" in facts["state"]
    state, step, peak = (
        float(re.search(r"[\d.]+(?= MiB)", facts[name])[0]) for name in ("state", "step", "peak")
    )
    assert peak == pytest.approx(state + step, abs=0.2) and step > 0
    assert not (tmp_path / "run").exists()


def test_the_bytes_of_a_plan_are_those_that_a_device_holds(tmp_path):
    run = trainer(recipe(tmp_path, mesh={"fsdp": 4}), devices=4)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(run.state))
    assert device_bytes(run.run.state_shapes) == held


def trained(folder, **changes):
    entries = [
        {"output_dir": str(folder / "state"), "save_every_n_steps": 1},
        {"type": "huggingface", "output_dir": str(folder / "out"), "save_every_n_steps": 1},
    ]
    run = trainer(recipe(folder, train_iters=2, checkpoint=entries, **changes), devices=1)
    run.train()
    return run


@pytest.mark.parametrize("ema", [None, {"decay": 0.5}], ids=["weights", "average"])
def test_an_export_is_what_the_run_would_have_exported(tmp_path, ema, capsys):
    trained(tmp_path, ema=ema) if ema else trained(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    for source, step in (("run", 2), ("state/global_step_1", 1)):
        to = tmp_path / f"exported {step}"
        cli(["export", str(tmp_path / source), "--to", str(to)], standalone_mode=False)
        assert f"global_step_{step} → " in capsys.readouterr().out
        expected = load_file(tmp_path / "out" / f"global_step_{step}" / "model.safetensors")
        found = load_file(to / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_array_equal(found[name], tensor, err_msg=name)
        assert json.loads((to / "config.json").read_text())["model_type"] == "llama"
        assert (to / "tokenizer.json").is_file()


def test_what_cannot_be_exported_is_named(tmp_path):
    run = trained(tmp_path)
    for folder, near in ((tmp_path, ""), (tmp_path / "state", ".*did you mean `.*/global_step_2`")):
        with pytest.raises(RecipeError, match=f"is neither a run folder, with recipe.yaml{near}"):
            find_checkpoint(folder)
    with pytest.raises(click.UsageError, match="exists already; name a new one"):
        cli(["export", str(tmp_path / "run"), "--to", str(tmp_path)], standalone_mode=False)
    for step in run.checkpoint_engines[0].steps():
        (tmp_path / "state" / f"global_step_{step}").rename(tmp_path / f"moved {step}")
    exported = re.escape(str(tmp_path / "out" / "global_step_2"))
    with pytest.raises(
        CheckpointError, match=f"has saved no full state; it has exported {exported}$"
    ):
        find_checkpoint(tmp_path / "run")
