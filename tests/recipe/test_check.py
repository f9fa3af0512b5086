"""`jaxtrain check` as a person runs it."""

import os
import subprocess
import sys

import pytest
import yaml

from jaxtrain.recipe.check import told
from jaxtrain.recipe.resolve import get_config, resolve

RECIPE = {
    "model": {"name_or_path": "m"},
    "data": {"sources": ["a/b"], "train_eval_split": [0.9, 0.1], "max_length": 2048},
    "eval_interval": 50,
    "train_iters": 200,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "mesh": {"data": 1, "fsdp": 4},
    "run_dir": "runs/one",
    "deepspeed": {"gradient_clipping": 0.5, "steps_per_print": 10},
    "checkpoint": {"output_dir": "state", "save_every_n_steps": 50, "save_end_of_training": True},
}


def children_time():
    """Seconds of processor that finished child processes took; load beside them does not count."""
    spent = os.times()
    return spent.children_user + spent.children_system


def check(folder, recipe, *arguments):
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-X", "importtime", "-m", "jaxtrain", "check", str(file), *arguments]
    # With the allocator set already, the process is not started again.
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    began = children_time()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    imports = {
        line.rpartition("|")[2].strip()
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    said = "\n".join(
        line for line in done.stderr.splitlines() if not line.startswith("import time:")
    )
    return done.returncode, done.stdout, said, imports, children_time() - began


def test_a_clean_recipe_is_told_quickly_without_jax(tmp_path):
    results = [check(tmp_path, RECIPE) for _ in range(3)]
    code, out, said, imports, _ = results[0]
    assert (code, said) == (0, "")
    assert not imports & {"jax", "numpy", "transformers", "optax", "flax", "datasets"}
    assert min(result[-1] for result in results) < 1.0
    for line in (
        "mapped     deepspeed.gradient_clipping: max_grad_norm",
        "no effect  deepspeed.steps_per_print: times, memory and FLOPs are always in the metrics",
        "batch      32 rows an update on 4 devices: 2 x 4 on each batch shard",
        "updates    200",
        "warm-up    20 updates",
        "evaluation every 50 updates, at the end",
        "checkpoint state/global_step_N (orbax), every 50 updates, at the end",
        "rows       at most 2,048 tokens",
    ):
        assert line in out.splitlines(), out
    assert {p.name for p in tmp_path.iterdir()} == {"recipe.yaml"}


def test_faults_come_with_exit_code_two(tmp_path):
    code, _, said, imports, _ = check(tmp_path, RECIPE | {"epoch": 1}, "seed=x", "ema={decay: 0.9}")
    assert code == 2 and "jax" not in imports and "Traceback" not in said
    lines = said.splitlines()
    assert lines[0].endswith("epoch: unknown key (found 1); did you mean `epochs`?")
    assert "command line: seed: must be a number, found 'x'" in lines
    assert "command line: ema: is not built yet, remove it (found {'decay': 0.9})" in lines
    assert lines[-1] == "3 errors in recipe.yaml; nothing was started"


def test_the_dumped_recipe_is_the_same_run(tmp_path):
    code, out, _, _, _ = check(tmp_path, RECIPE, "--dump-config", "epochs=3")
    assert code == 0
    assert get_config(yaml.safe_load(out)) == get_config(RECIPE | {"epochs": 3})


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"mesh": {}},
            "batch      8 rows an update on 1, 64 on 8, 512 on 64 devices: 2 x 4 on each batch shard",
        ),
        (
            {"mesh": {"tensor": 2}},
            "batch      8 rows an update on 2, 64 on 16, 512 on 128 devices: 2 x 4 on each batch shard",
        ),
        ({"train_iters": 0}, "updates    1 epoch, counted when the data is read"),
        (
            {"train_iters": 0, "scheduler": {"warmup_ratio": "3%"}},
            "warm-up    3% of the updates",
        ),
        ({"train_iters": 0, "scheduler": {"warmup_steps": 7}}, "warm-up    7 updates"),
        ({"exit_iteration": 20}, "updates    200, ends at 20"),
        ({"epochs": 2}, "updates    200, or 2 epochs, counted when the data is read"),
        (
            {"eval_at_start": True, "eval_at_end": False},
            "evaluation every 50 updates, at the start",
        ),
        (
            {"data": {"sources": ["a/b"]}, "eval_interval": 0},
            "rows       length still open: the model's positions, read when it is there; see "
            "data.max_length",
        ),
    ],
)
def test_the_run_follows_the_recipe(change, line):
    assert line in told(resolve(RECIPE | change)).splitlines()


def test_the_length_of_rows_comes_from_a_local_model(tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 512}')
    recipe = RECIPE | {
        "model": {"name_or_path": str(tmp_path)},
        "data": {"sources": ["a/b"]},
        "eval_interval": 0,
    }
    assert "rows       at most 512 tokens, the model's positions" in told(resolve(recipe))


def test_the_updates_of_local_rows_are_counted(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}\n\n' * 100)
    recipe = {"model": {"name_or_path": "m"}, "micro_batch_size": 8}
    for sources, expected in (
        ([str(rows)], "13 updates each on 1 device: 100 local rows"),
        (
            [{"type": "jsonl", "path": str(rows), "sample_count": 30}],
            "4 updates each on 1 device: 30 local rows",
        ),
        (
            [str(rows), {"type": "synthetic", "rows": 20}],
            "15 updates each on 1 device: 120 local rows",
        ),
        ([str(rows), "a/b"], "counted when the data is read"),
        ([f"{rows}:train[:10]"], "counted when the data is read"),
    ):
        said = told(resolve(recipe | {"data": {"sources": sources}}))
        assert expected in said, said


def test_what_stands_below_a_refused_key_is_refused_with_it():
    changed = {"deepspeed": {"zero_optimisation": {"stage": 3}}}
    report = resolve(RECIPE | changed).report
    assert [line.key for line in report.of("refused")] == ["deepspeed.zero_optimisation"]


def test_of_an_unknown_trainer_no_other_key_is_told():
    report = resolve(RECIPE | {"type": "mlp_speculator", "gen_train": True}).report
    assert [(line.key, line.standing) for line in report.lines] == [("type", "refused")]
