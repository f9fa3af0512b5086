"""The folder of a run is never mixed with another's: refused, continued, or a new one."""

import json

import pytest
import yaml

from jaxtrain.metrics.writer import read_rows
from jaxtrain.recipe.errors import RecipeError
from tests.runs import in_two_processes, recipe, trainer


def steps(file):
    return [row["iter"] for row in read_rows(file)]


def numbered(folder, **changes):
    """Three updates, saved each, in folders that are numbered."""
    state = {"output_dir": "{run_dir}/state", "save_every_n_steps": 1, **changes}
    run_dir = str(folder / "chat-{n}")
    return recipe(folder, train_iters=3, run_dir=run_dir) | {"checkpoint": state}


def names(folder):
    return sorted(path.name for path in folder.glob("chat-*"))


def test_each_run_takes_the_next_number(tmp_path):
    written = numbered(tmp_path)
    (tmp_path / "chat-7-old").mkdir()
    for number in (1, 2):
        trainer(written).train()
        run = tmp_path / f"chat-{number}"
        assert steps(run / "train-log-metrics.jsonl") == [1, 2, 3]
        assert sorted(p.name for p in (run / "state").glob("global_step_*")) == [
            f"global_step_{n}" for n in (1, 2, 3)
        ]
        said = yaml.safe_load((run / "recipe.yaml").read_text())
        assert said["run_dir"] == str(run)
        assert said["checkpoint"][0]["output_dir"] == f"{run}/state"
    assert names(tmp_path) == ["chat-1", "chat-2", "chat-7-old"]
    (tmp_path / "chat-10").mkdir()
    assert trainer(written).run_folder.path == tmp_path / "chat-11"


def test_a_run_with_a_checkpoint_continues_the_newest_number(tmp_path):
    (tmp_path / "chat-1").mkdir()
    written = numbered(tmp_path, auto_resume=True)
    trainer(written | {"exit_iteration": 2}).train()
    trainer(written).train()
    assert names(tmp_path) == ["chat-1", "chat-2"]
    assert steps(tmp_path / "chat-2" / "train-log-metrics.jsonl") == [1, 2, 3]


def test_of_two_runs_that_begin_at_once_one_is_refused(tmp_path):
    written = numbered(tmp_path)
    first, second = trainer(written), trainer(written)
    [run.run_folder.refuse_foreign(run.checkpoint_engines) for run in (first, second)]
    first.run_folder.open(resumed_at=0)
    with pytest.raises(RecipeError, match="another run has just begun in .*chat-1"):
        second.run_folder.open(resumed_at=0)
    first.run_folder.close()


@pytest.mark.covers("train_log_metrics_path", "checkpoint.*.auto_resume")
def test_rows_go_where_the_recipe_says_and_are_cut_on_resume(tmp_path):
    """Trap A40."""
    rows = tmp_path / "rows" / "all.jsonl"
    state = {"output_dir": str(tmp_path / "state"), "save_every_n_steps": 2, "auto_resume": True}
    written = recipe(tmp_path, train_log_metrics_path=str(rows)) | {"checkpoint": state}
    trainer(written | {"exit_iteration": 3}).train()
    assert steps(rows) == [1, 2, 3]
    trainer(written).train()  # from step 2
    assert steps(rows) == [1, 2, 3, 4]
    assert not (tmp_path / "run" / "train-log-metrics.jsonl").exists()
    assert (tmp_path / "run" / "loss.png").is_file()


def test_rows_of_another_run_are_not_mixed_in(tmp_path):
    rows = tmp_path / "all.jsonl"
    first = recipe(tmp_path, train_iters=1, train_log_metrics_path=str(rows))
    trainer(first).train()
    before = rows.read_bytes()
    with pytest.raises(RecipeError, match=r"train_log_metrics_path: .* holds rows of another run"):
        trainer(first | {"run_dir": str(tmp_path / "second")}).train()
    assert rows.read_bytes() == before and not (tmp_path / "second").exists()


@pytest.mark.slow
def test_of_two_processes_one_names_the_run_and_the_recipe_says_who_tells(tmp_path):
    ranks = {"print_output_ranks": [1], "file_output_ranks": [1]}
    written = recipe(tmp_path, train_iters=2, run_dir=str(tmp_path / "chat-{n}"), logger=ranks)
    (tmp_path / "chat-1").mkdir()
    outputs = in_two_processes("run.train()", written)
    assert ["finished: 2 steps" in output for output in outputs] == [False, True]
    assert names(tmp_path) == ["chat-1", "chat-2"]
    run = tmp_path / "chat-2"
    assert [file.name for file in (run / "logs").iterdir()] == ["rank_1.log"]
    assert steps(run / "train-log-metrics.jsonl") == [1, 2]


def test_the_command_line_is_kept_without_its_secrets(tmp_path, monkeypatch):
    word = "data.sources.0.kwargs.token=hf_not_to_be_seen"
    source = {"type": "huggingface", "name_or_path": str(tmp_path / "rows.jsonl")}
    run = recipe(tmp_path, data={"sources": [source | {"kwargs": {"token": "hf_not_to_be_seen"}}]})
    monkeypatch.setattr("sys.argv", ["jaxtrain", "recipe.yaml", word])
    trainer(run).train()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["argv"][2] == (
        "data.sources.0.kwargs.token=${env}"
    )
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or b"hf_not_to_be_seen" not in file.read_bytes(), file
