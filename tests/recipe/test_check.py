"""`jaxtrain check` as a person runs it."""

import os
import subprocess
import sys
from importlib import metadata

import pytest
import yaml

from jaxtrain.recipe.check import describe
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
        "batch      32 sequences per step on 4 devices: 2 x 4 per batch shard",
        "steps      200",
        "warm-up    20 steps",
        "evaluation every 50 steps, at the end",
        "checkpoint state/global_step_N (orbax), every 50 steps, at the end",
        "sequences  at most 2,048 tokens",
    ):
        assert line in out.splitlines(), out
    assert {p.name for p in tmp_path.iterdir()} == {"recipe.yaml"}


def test_faults_come_with_exit_code_two(tmp_path):
    code, _, said, imports, _ = check(
        tmp_path, RECIPE | {"epoch": 1}, "seed=x", "replica_check_interval=-5"
    )
    assert code == 2 and "jax" not in imports and "Traceback" not in said
    lines = said.splitlines()
    assert lines[0].endswith("epoch: unknown key (found 1); did you mean `epochs`?")
    assert "command line: seed: must be a number, found 'x'" in lines
    assert "command line: replica_check_interval: must be >= 0, found -5" in lines
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
            "batch      8 sequences per step on 1, 64 on 8, 512 on 64 devices: 2 x 4 per batch shard",
        ),
        (
            {"mesh": {"tensor": 2}},
            "batch      8 sequences per step on 2, 64 on 16, 512 on 128 devices: 2 x 4 per batch shard",
        ),
        ({"train_iters": 0}, "steps      1 epoch, counted when the data is read"),
        (
            {"train_iters": 0, "scheduler": {"warmup_ratio": "3%"}},
            "warm-up    3% of the steps",
        ),
        ({"train_iters": 0, "scheduler": {"warmup_steps": 7}}, "warm-up    7 steps"),
        (
            {"deepspeed": {"zero_optimization": {"stage": "1"}}},
            "mapped     deepspeed.zero_optimization.stage: optimizer state and master weights are "
            "sharded over\n           `mesh.data`, gathered once per step",
        ),
        (
            {"checkpoint": {"output_dir": "a", "save_every_n_epochs": 1}},
            "checkpoint a/global_step_N (orbax), every 1 epoch",
        ),
        ({"exit_iteration": 20}, "steps      200, ends at 20"),
        ({"epochs": 2}, "steps      200, or 2 epochs, counted when the data is read"),
        (
            {"eval_at_start": True, "eval_at_end": False},
            "evaluation every 50 steps, at the start",
        ),
        (
            {"data": {"sources": ["a/b"]}, "eval_interval": 0},
            "sequences  at most as many tokens as the model has positions; see data.max_length",
        ),
        ({"type": "causal"}, "trainer    causal"),
        ({"name": "causal"}, "trainer    causal"),
        (
            {"run_dir": None, "logger": {"output_dir": "logs"}},
            "files      logs: recipe.yaml, run.json, logs, train-log-metrics.jsonl, loss.png",
        ),
        (
            {"model": {"type": "liger", "name_or_path": "m"}},
            "mapped     model.type: the same model as `huggingface`; fused kernels are always on",
        ),
        ({"optimizer": {"type": "fused_adam"}}, "mapped     optimizer.type: `adamw`"),
        (
            {"scheduler": {"type": "wsd", "num_warmup_steps": 7, "num_decay_steps": 9}},
            "warm-up    7 steps",
        ),
        (
            {
                "checkpoint": {
                    "type": "huggingface",
                    "output_dir": "a",
                    "save_end_of_training": True,
                }
            },
            "checkpoint a/global_step_N (huggingface), at the end",
        ),
    ],
)
@pytest.mark.covers("type", "name", "logger.output_dir", "model.type", "optimizer.type")
@pytest.mark.covers("scheduler.type", "scheduler.num_warmup_steps", "checkpoint.*.type")
def test_the_run_follows_the_recipe(change, line):
    assert f"\n{line}\n" in f"\n{describe(resolve(RECIPE | change))}\n"


def test_a_section_without_a_stage_is_told():
    block = {"deepspeed": {"zero_optimization": {"overlap_comm": True}}}
    note = "note       deepspeed.zero_optimization: without a stage it is stage 0"
    assert note in describe(resolve(RECIPE | block)).splitlines()
    assert note not in describe(resolve(RECIPE)).splitlines()


def test_an_entry_that_is_off_keeps_nothing_and_may_still_be_the_start():
    off = {"output_dir": "a", "enabled": False, "keep_best_n": 1, "metric": "mine"}
    resolved = resolve(RECIPE | {"checkpoint": [off | {"auto_resume": True}]})
    assert resolved.faults == ()
    idle = [line.key for line in resolved.report.select("no effect") if "checkpoint" in line.key]
    assert idle == ["checkpoint.0.keep_best_n", "checkpoint.0.metric"]
    assert "checkpoint.0.output_dir" in [line.key for line in resolved.report.select("same")]


def test_keys_of_a_named_set_of_sources_are_told_like_others():
    source = {"name_or_path": "c/d", "sample_seed": 3, "split": "test", "kwargs": {"x": 1}}
    named = {"sources": ["a/b"], "eval_sources": {"chat": [source], "more": ["e/f"]}}
    report = resolve(RECIPE | {"data": named}).report
    (idle,) = [line for line in report.select("no effect") if line.key.startswith("data.")]
    assert (idle.key, idle.reason) == ("data.eval_sources.chat.0.sample_seed", "no sample is drawn")
    same = [line.key for line in report.select("same")]
    assert {"data.eval_sources.chat.0.kwargs", "data.eval_sources.more"} <= {*same}


def test_files_lie_in_the_folder_of_a_person(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    said = describe(resolve(RECIPE | {"run_dir": "~/one", "eval_interval": 1}))
    assert "files      /home/ann/one: recipe.yaml, run.json, logs, train-log" in said
    assert "evaluation every 1 step, at the end" in said


def test_on_known_devices_the_batch_is_one():
    recipe = RECIPE | {"mesh": {}}
    batch = "batch      16 sequences per step on 2 devices: 2 x 4 per batch shard"
    assert batch in describe(resolve(recipe), 2).splitlines()


def test_a_model_that_is_not_on_this_machine_is_told():
    recipe = {"model": {"name_or_path": "/no/such/model"}, "data": {"sources": ["a/b"]}}
    said = " ".join(describe(resolve(recipe)).split())
    assert "model /no/such/model, not on this machine" in said


def test_the_length_of_rows_comes_from_a_local_model(tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 512}')
    recipe = RECIPE | {
        "model": {"name_or_path": str(tmp_path)},
        "data": {"sources": ["a/b"]},
        "eval_interval": 0,
    }
    assert "sequences  at most 512 tokens, the model's positions" in describe(resolve(recipe))
    (tmp_path / "config.json").write_text('{"text_config": {"max_position_embeddings": 1536}}')
    recipe["data"]["max_length"] = 2048
    longer = "longer than the 1,536 positions that the model's config names"
    assert f"sequences  at most 2,048 tokens, {longer}" in describe(resolve(recipe)).splitlines()
    recipe["data"]["max_length"] = 1536
    assert "sequences  at most 1,536 tokens" in describe(resolve(recipe)).splitlines()


@pytest.mark.covers("data.sources.*.type")
def test_the_steps_of_local_records_are_counted(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}\n\n' * 100)
    recipe = {"model": {"name_or_path": "m"}, "micro_batch_size": 8}
    for sources, expected in (
        ([str(rows)], "13 steps each on 1 device: 100 local records"),
        (
            [{"type": "jsonl", "path": str(rows), "sample_count": 30}],
            "4 steps each on 1 device: 30 local records",
        ),
        (
            [str(rows), {"type": "synthetic", "rows": 20}],
            "15 steps each on 1 device: 120 local records",
        ),
        ([str(rows), "a/b"], "counted when the data is read"),
        ([f"{rows}:train[:10]"], "counted when the data is read"),
    ):
        said = describe(resolve(recipe | {"data": {"sources": sources}}))
        assert expected in said, said


def test_rows_that_may_not_be_read_are_not_counted(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    recipe = {"model": {"name_or_path": "m"}, "data": {"sources": [str(tmp_path / "rows.jsonl")]}}
    assert "1 epoch, counted when the data is read" in describe(resolve(recipe))


def test_what_stands_below_a_refused_key_is_refused_with_it():
    changed = {"deepspeed": {"zero_optimisation": {"stage": 3}}}
    report = resolve(RECIPE | changed).report
    assert [line.key for line in report.select("refused")] == ["deepspeed.zero_optimisation"]


HELD_OUT = {"sources": ["a/b"], "train_eval_split": [0.9, 0.1]}
SAVES = {"output_dir": "a", "save_every_n_steps": 1}
IDLE = {  # what is written; its key; what would make it count
    "optimizer.nesterov": (
        {"optimizer": {"type": "sgd", "nesterov": True}}, {"optimizer": {"type": "sgd", "nesterov": True, "momentum": 0.9}}
    ),
    "wandb.project": ({"wandb": {"project": "x"}}, {"wandb": {"mode": "offline", "enable": True}}),
    "tensorboard.dir": (
        {"tensorboard": {"dir": "x", "enable": False}}, {"tensorboard": {"dir": "x"}},
    ),
    "mem_profiler_dir": ({"mem_profiler_dir": "x"}, {"mem_profiler": "e2e"}),
    "eval_at_end": ({"eval_at_end": False}, {"data": HELD_OUT, "eval_interval": 1}),
    "max_eval_batches": ({"max_eval_batches": 1}, {"data": HELD_OUT, "eval_interval": 1}),
    "eval_log_iter_interval": (
        {"eval_log_iter_interval": 2}, {"data": HELD_OUT, "eval_interval": 1},
    ),
    "eval_after_step": (
        {"eval_after_step": 5, "data": HELD_OUT, "eval_at_end": True}, {"eval_interval": 2},
    ),
    "eval_samples.top_p": (
        {"eval_samples": {"prompts": ["x"], "top_p": 0.5}},
        {"eval_samples": {"prompts": ["x"], "top_p": 0.5, "temperature": 1}},
    ),
    "tokenizer.tokenize_kwargs": (
        {"tokenizer": {"tokenize_kwargs": {"truncation": True}}}, {"type": "causal"},
    ),
    "data.packing": (
        {"data": {"sources": ["a/b"], "packing": "next_fit"}},
        {"data": {"sources": ["a/b"], "packing": "next_fit", "pack_samples": True}},
    ),
    "data.filter_samples": (
        {"data": {"sources": ["a/b"], "filter_samples": False, "overlong": "error"}},
        {"data": {"sources": ["a/b"], "filter_samples": False}},
    ),
    "data.ignore_empty_think": (
        {"data": {"sources": ["a/b"], "ignore_empty_think": True, "mask_inputs": False}},
        {"data": {"sources": ["a/b"], "ignore_empty_think": True}},
    ),
    "data.sources.0.sample_seed": (
        {"data": {"sources": [{"name_or_path": "a/b", "sample_seed": 1}]}},
        {"data": {"sources": [{"name_or_path": "a/b", "sample_seed": 1, "sample_count": 2}]}},
    ),
    "data.div_length": (
        {"data": {"sources": ["a/b"], "div_length": 8, "pack_samples": True}},
        {"data": {"sources": ["a/b"], "div_length": 8}},
    ),
    "data.max_length_buckets": (
        {"type": "causal", "data": {"sources": ["a/b"], "max_length_buckets": 2}},
        {"type": "sft"},
    ),
    "scheduler.warmup_ratio": (
        {"scheduler": {"name": "constant", "warmup_ratio": 0.5}},
        {"scheduler": {"name": "linear", "warmup_ratio": 0.5}},
    ),
    "checkpoint.0.metric": (
        {"checkpoint": [SAVES | {"metric": "eval/loss"}]},
        {
            "checkpoint": [SAVES | {"metric": "eval/loss", "keep_best_n": 1}],
            "data": HELD_OUT, "eval_interval": 1,
        },
    ),
    "checkpoint.0.save_after_step": (
        {"checkpoint": [{"output_dir": "a", "save_after_step": 4}]},
        {"checkpoint": [SAVES | {"save_after_step": 4}]},
    ),
    "checkpoint.0.save_every_n_steps": (
        {"checkpoint": [SAVES | {"enabled": False}]}, {"checkpoint": [SAVES]},
    ),
    "pipeline.schedule": (
        {"pipeline": {"schedule": "gpipe"}}, {"mesh": {"pipeline": 2}},
    ),
    "deepspeed.train_batch_size": (
        {"deepspeed": {"train_batch_size": "auto"}}, {"deepspeed": {"train_batch_size": 8}},
    ),
}  # fmt: skip


IDLE_BY_VALUE = {  # what only the typed value shows
    "wandb.project": (
        {"wandb": {"enable": True, "mode": "disabled", "project": "x"}},
        {"wandb": {"enable": True, "mode": "offline", "project": "x"}},
    ),
    "optimizer.nesterov": (
        {"optimizer": {"type": "sgd", "nesterov": True, "momentum": "0.0"}},
        {"optimizer": {"type": "sgd", "nesterov": True, "momentum": "90%"}},
    ),
    "eval_samples.top_p": (
        {"eval_samples": {"prompts": ["x"], "top_p": 0.5, "temperature": "0%"}},
        {"eval_samples": {"prompts": ["x"], "top_p": 0.5, "temperature": "70%"}},
    ),
    "max_eval_batches": (
        {"max_eval_batches": 3, "data": {"sources": ["a/b"], "train_eval_split": ["100%", "0%"]}},
        {"data": {"sources": ["a/b"], "train_eval_split": ["90%", "10%"]}, "eval_interval": 1},
    ),
}


@pytest.mark.parametrize(("key", "recipes"), [*IDLE.items(), *IDLE_BY_VALUE.items()])
def test_a_key_without_effect_beside_the_others_is_reported(key, recipes, monkeypatch):
    monkeypatch.setattr(metadata, "distribution", lambda name: None)  # every extra is installed
    recipe = {"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}}
    idle, counts = recipes
    for change, expected in ((idle, True), (idle | counts, False)):
        resolved = resolve(recipe | change)
        assert resolved.faults == ()
        told_idle = {line.key: line.reason for line in resolved.report.select("no effect")}
        assert (len(told_idle.get(key, "")) > 10) == expected, told_idle


def test_of_a_type_that_is_not_known_no_other_key_is_told():
    change = {
        "optimizer": {"type": "adamv", "learning_rte": 1},
        "checkpoint": {"type": "x", "y": 1},
    }
    report = resolve({"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}} | change).report
    assert [line.key for line in report.lines if line.word != "refused"] == [
        "model.name_or_path",
        "data.sources",
    ]


def test_of_an_unknown_trainer_no_other_key_is_told():
    report = resolve(RECIPE | {"type": "mlp_speculator", "gen_train": True}).report
    assert [(line.key, line.word) for line in report.lines] == [("type", "refused")]
