"""What keys of a recipe change in a run: the facts that it begins with, what it tells, what it
writes."""

import threading

import jax
import numpy as np
import pytest

from jaxtrain.recipe.errors import DataError, RecipeError
from tests.runs import conversations, host, metrics_of, recipe, trainer

CHANGES = {  # the change; devices; the fact and what it says, before and after
    "epochs": ({"epochs": 2, "train_iters": 0}, 1, "steps", "4,", "6, 3 per epoch"),
    "train_iters": ({"train_iters": 5}, 1, "steps", "4,", "5, 3 per epoch"),
    "exit_iteration": ({"exit_iteration": 2}, 1, "steps", "4,", "4, ends at 2, 3 per epoch"),
    "micro_batch_size": ({"micro_batch_size": 2}, 1, "steps", "3 per epoch", "6 per epoch"),
    "gradient_accumulation_steps": (
        {"gradient_accumulation_steps": 2}, 1, "batch", "4 sequences", "8 sequences",
    ),
    "pipeline.microbatches": (
        {"pipeline": {"microbatches": 4}, "mesh": {"pipeline": 2}}, 2, "batch", "per step",
        "in 4 microbatches",
    ),
    "mesh.data": ({"mesh": {"data": 2}}, 2, "devices", "1 x", "mesh data 2"),
    "mesh.fsdp": ({"mesh": {"fsdp": 2}}, 2, "devices", "1 x", "mesh fsdp 2"),
    "mesh.pipeline": ({"mesh": {"pipeline": 2}}, 2, "devices", "1 x", "mesh pipeline 2"),
    "mesh.tensor": ({"mesh": {"tensor": 2}}, 2, "devices", "1 x", "mesh tensor 2"),
    "model.dtype": ({"model": {"dtype": "bf16"}}, 1, "model", "float32", "bfloat16, multiplied by"),
    "model.remat": ({"model": {"remat": "dots"}}, 1, "model", "remat full", "remat dots"),
    "model.remat_every_nth_layer": (
        {"model": {"remat_every_nth_layer": 2}}, 1, "model", "remat full", "full of every 2 layers",
    ),
    "tiled_mlp_compute": ({"tiled_mlp_compute": True}, 1, "model", "remat full", ", tiled MLP"),
    "model.disable_activation_checkpoint": (
        {"model": {"disable_activation_checkpoint": True}}, 1, "model", "remat full", "remat none",
    ),
    "model.attn_implementation": (
        {"model": {"attn_implementation": "eager"}}, 1, "kernels", "no Pallas kernel",
        "as set in the recipe",
    ),
    "data.max_length": ({"data": {"max_length": 64}}, 1, "batch", "128 tokens", "64 tokens"),
    "scheduler.warmup_steps": (
        {"scheduler": {"warmup_steps": 3}}, 1, "steps", "warm-up 0", "warm-up 3",
    ),
}  # fmt: skip


def made(folder, devices=1, **changes):
    base = {"rows": 12, "micro_batch_size": 4, "data": {"pack_samples": False}}
    for key, value in changes.items():
        base[key] = base.get(key, {}) | value if isinstance(value, dict) else value
    return trainer(recipe(folder, **base), devices=devices)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return made(tmp_path_factory.mktemp("plain")).header


@pytest.mark.covers(
    "pipeline.microbatches train_iters micro_batch_size tiled_mlp_compute model.dtype"
)
@pytest.mark.covers("model.attn_implementation model.disable_activation_checkpoint model.remat")
@pytest.mark.covers("model.remat_every_nth_layer data.max_length mesh.data mesh.fsdp mesh.pipeline")
@pytest.mark.covers("mesh.tensor exit_iteration")
@pytest.mark.parametrize("key", CHANGES)
def test_the_facts_of_a_run_follow_the_key(tmp_path, plain, key):
    change, devices, fact, before, after = CHANGES[key]
    assert before in plain[fact], plain[fact]
    found = made(tmp_path, devices, **change).header[fact]
    assert after in found and found != plain[fact], found


def test_a_kernel_that_cannot_run_here_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"model.attn_implementation: .*'cpu'"):
        made(tmp_path, model={"attn_implementation": "pallas"})


@pytest.mark.covers("epochs eval_interval eval_at_start eval_at_end max_eval_batches")
@pytest.mark.covers("eval_samples.system eval_samples.every_n_evals optimizer.learning_rate")
@pytest.mark.covers("checkpoint.*.output_dir checkpoint.*.enabled checkpoint.*.save_every_n_epochs")
@pytest.mark.covers("checkpoint.*.save_end_of_training checkpoint.*.async_save run_dir")
def test_a_run_follows_its_keys(tmp_path, capfd):
    """Two epochs of six updates, and only what the recipe asks for."""
    entries = [
        {"output_dir": str(tmp_path / "off"), "enabled": False, "save_every_n_steps": 1},
        {"output_dir": str(tmp_path / "full"), "save_every_n_epochs": 1, "async_save": False},
        {
            "type": "huggingface",
            "output_dir": str(tmp_path / "out"),
            "save_end_of_training": True,
        },
    ]
    run = made(
        tmp_path,
        rows=32,
        epochs=2,
        train_iters=0,
        eval_interval=8,
        eval_at_start=True,
        eval_at_end=False,
        max_eval_batches=1,
        eval_samples={
            "prompts": ["Yes?"],
            "system": "Be brief.",
            "max_new_tokens": 2,
            "every_n_evals": 2,
        },
        data={"train_eval_split": [0.75, 0.25], "pack_samples": False},
        micro_batch_size=1,
        gradient_accumulation_steps=4,
        optimizer={"lr": 0.02},
        scheduler={"name": "constant"},
        checkpoint=entries,
    )
    assert len(list(run.data.eval_batches("eval"))) > 1 == len(list(run.eval_batches))
    run.train()
    rows = list(metrics_of(tmp_path))
    assert [row["lr"] for row in rows if "loss" in row] == [0.02] * 12
    assert run.config.optimizer.learning_rate == 0.02
    scores = [row for row in rows if "eval/loss" in row]
    assert [row["iter"] for row in scores] == [0, 8]  # none at the end
    assert not (tmp_path / "off").exists()
    saved = {
        name: sorted(p.name for p in (tmp_path / name).glob("global_step_*"))
        for name in ("full", "out")
    }
    assert saved == {"full": ["global_step_12", "global_step_6"], "out": ["global_step_12"]}
    assert capfd.readouterr().out.count("'Yes?' →") == 1


@pytest.mark.covers("seed")
def test_the_seed_makes_the_weights(tmp_path):
    found = [host(made(tmp_path, seed=seed).state.params) for seed in (1, 1, 2)]
    same = [
        [np.array_equal(found[0][name], other[name]) for name in found[0]] for other in found[1:]
    ]
    assert all(same[0]) and not all(same[1])


@pytest.mark.covers("data.dl_num_workers")
def test_a25_batches_are_made_ahead_or_in_the_loop(tmp_path):
    """Trap A25: `dl_num_workers: 0` makes the same batches, and no thread."""
    batches, threads = [], []
    for workers in (0, 3):
        run = made(tmp_path, data={"dl_num_workers": workers})
        before = threading.active_count()
        ahead = run.data.train_batches(0, 6)
        batches.append([next(ahead)])
        threads.append(threading.active_count() - before)
        batches[-1] += ahead
    assert threads[0] == 0 < threads[1] <= 3
    jax.tree.map(np.testing.assert_array_equal, *batches)


@pytest.mark.covers("data.sources.*.format")
def test_a_format_is_what_all_files_are(tmp_path):
    """A file with a suffix that says something else is read as the recipe says."""
    path = str(conversations(tmp_path / "rows.txt", 9))
    source = {"type": "local", "path": path, "format": "jsonl"}
    assert "9 records read" in made(tmp_path, data={"sources": [source]}).header["data"]
    with pytest.raises(DataError, match="hold no conversation"):
        made(tmp_path, data={"sources": [{"type": "local", "path": path}]})
