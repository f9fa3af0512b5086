"""What a run has trained is not lost to a kill, to a second process or to a damaged file."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import Callback
from jaxtrain.files import claim_folders, write_atomically
from jaxtrain.metrics.writer import JsonLines, read_rows
from jaxtrain.recipe.errors import AbortedError, CheckpointError, NonFiniteError, RecipeError
from jaxtrain.trainer.run import Run
from tests.checkpoint.engines import engine
from tests.runs import conversations, host, recipe, trainer


def written(folder, *, every=2, **changes):
    """Full state and an export, both every few steps."""
    changes = {"train_iters": 4, "rows": 12} | changes
    entries = [
        {"output_dir": str(folder / "state"), "save_every_n_steps": every, "auto_resume": True},
        {"type": "huggingface", "output_dir": str(folder / "exports"), "save_every_n_steps": every,
         "save_end_of_training": True, "verify_export": False},
    ]  # fmt: skip
    return recipe(folder, **changes) | {"checkpoint": entries}


def exported(folder):
    return sorted(path.name for path in (folder / "exports").iterdir())


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("cut", [2, 4], ids=["in-between", "at-the-end"])
def test_an_export_that_a_kill_has_cut_is_made_at_the_next_start(tmp_path, monkeypatch, cut):
    """Also when the run has nothing left to train."""
    export = Run.export

    def dying(self, state, folder, *rest):
        if folder.name == f"global_step_{cut}":
            (folder.parent / f".{folder.name}.half").mkdir()
            raise Killed
        export(self, state, folder, *rest)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Run, "export", dying)
        trainer(written(tmp_path)).train()
    assert f"global_step_{cut}" not in exported(tmp_path)
    again = trainer(written(tmp_path))
    again.train()
    assert again.global_step_this_run == 4 - cut
    assert exported(tmp_path) == ["global_step_2", "global_step_4"]


def test_a_run_of_no_steps_still_exports(tmp_path):
    run = written(tmp_path, train_iters=0, epochs=0)
    trainer(run).train()
    assert exported(tmp_path) == ["global_step_0"]


HOLD = """
import sys, time
from pathlib import Path
from jaxtrain.files import claim_folders
with claim_folders({"run_dir": Path(sys.argv[1])}, say=print, on_lost=print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("folder", ["run", "state", "exports"])
def test_a_folder_has_one_process_that_writes_it_and_outlives_its_kill(tmp_path, folder):
    command = [sys.executable, "-c", HOLD, str(tmp_path / folder)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    run = trainer(written(tmp_path, train_iters=1))
    with pytest.raises(
        RecipeError, match=rf"process {holder.pid} on .* is writing .*{folder}; wait"
    ):
        run.train()
    holder.kill()
    holder.wait()
    assert (tmp_path / folder / ".lock").exists()
    trainer(written(tmp_path, train_iters=1)).train()
    assert not list(tmp_path.rglob(".lock*"))


def test_a_process_that_lost_its_folder_saves_nothing_more(tmp_path):
    class Lose(Callback):
        def on_step_end(self, args, state, control):
            state.stop.lost_folder = "its folder was taken over by another process"

    run = trainer(written(tmp_path))
    run.add_callback(Lose())
    with pytest.raises(AbortedError, match="ended at step 1: its folder was taken over"):
        run.train()
    assert not list((tmp_path / "state").glob("global_step_*"))


@pytest.mark.parametrize("key", ["run_dir", "output_dir"])
def test_a_folder_that_cannot_be_written_is_found_before_the_weights_are_read(tmp_path, key):
    (tmp_path / "file").touch()
    changed = written(tmp_path)
    bad = str(tmp_path / "file" / "below")
    if key == "run_dir":
        changed["run_dir"] = bad
    else:
        changed["checkpoint"][0][key] = bad
    run = trainer(changed)
    with pytest.raises(RecipeError, match=rf"{key}: .*file/below cannot be written \(Not a dir"):
        run.train()
    assert run._state is None


CUT = """
import os, sys
from pathlib import Path
from jaxtrain.files import write_atomically
os.fsync = lambda descriptor: os._exit(9)
write_atomically(Path(sys.argv[1]), "text")
"""
"""Ends, as a kill does, while a file is written."""


@pytest.mark.parametrize("name", ["run/recipe.yaml", "run/run.json", "state/scores.json"])
def test_a_kill_while_a_small_file_is_written_leaves_nothing(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir()
    assert subprocess.run([sys.executable, "-c", CUT, str(file)], check=False).returncode == 9
    assert len(list(file.parent.iterdir())) == 1 and not file.exists()
    trainer(written(tmp_path, train_iters=1)).train()
    assert not list(file.parent.glob(".*"))


def test_files_are_replaced_whole_and_never_through_a_link(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("kept")
    link.symlink_to(target)
    write_atomically(link, "new")
    assert (target.read_text(), link.read_text(), link.is_symlink()) == ("kept", "new", False)
    with pytest.raises(FileExistsError):
        write_atomically(link, "newer", must_be_new=True)
    assert link.read_text() == "new" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("taken", [False, True])
def test_a_file_may_be_new_where_there_are_no_links(tmp_path, monkeypatch, taken):
    def no_links(source, target):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    file = tmp_path / "recipe.yaml"
    if not taken:
        write_atomically(file, "new", must_be_new=True)
        assert file.read_text() == "new" and len(list(tmp_path.iterdir())) == 1
        return
    file.write_text("kept")
    with pytest.raises(FileExistsError):
        write_atomically(file, "new", must_be_new=True)
    assert file.read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def test_claimed_folders_may_be_one_by_two_names(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    folders = {"run_dir": tmp_path / "folder", "other": tmp_path / "link"}
    with claim_folders(folders, say=print, on_lost=print):
        assert (tmp_path / "folder" / ".lock").exists()


def test_new_folders_that_a_fault_leaves_empty_are_removed(tmp_path):
    (tmp_path / "old").mkdir()
    names = ("old", "new/state", "new/export", "kept/run", "kept/state")
    folders = {name: tmp_path / name for name in names}
    with pytest.raises(RecipeError), claim_folders(folders, say=print, on_lost=print):
        (tmp_path / "kept" / "run" / "recipe.yaml").touch()
        raise RecipeError("cannot be read")
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")} == {
        "old", "kept", "kept/run", "kept/run/recipe.yaml"
    }  # fmt: skip


def test_weights_that_a_finite_loss_made_infinite_are_not_saved(tmp_path):
    class Overflow(Callback):
        def on_step_end(self, args, state, control):
            if state.global_step == 2:
                bad = {**state.params, "norm": state.params["norm"] * jnp.inf}
                state.state = state.state._replace(params=bad)

    run = trainer(written(tmp_path, every=1))
    run.add_callback(Overflow())
    with pytest.raises(NonFiniteError, match="step 2 has made weights or moments that are not"):
        run.train()
    assert [p.name for p in (tmp_path / "state").glob("global_step_*")] == ["global_step_1"]
    again = trainer(written(tmp_path, every=1, on_nonfinite="rollback"))
    again.add_callback(Overflow())
    with pytest.raises(NonFiniteError, match="rolled back 3 times already"):
        again.train()


def test_a_checkpoint_is_not_loaded_into_a_run_that_is_stepping(tmp_path):
    class Load(Callback):
        def on_step_end(self, args, state, control):
            if state.global_step == 3:
                state.load_checkpoint(2)

    run = trainer(written(tmp_path))
    run.add_callback(Load())
    with pytest.raises(RuntimeError, match="the run is stepping; set control.should_roll_back"):
        run.train()


def test_full_state_may_be_saved_twice_at_one_step_into_a_folder(tmp_path):
    run = trainer(written(tmp_path, train_iters=1))
    run.train()
    first = run.save_checkpoint(tmp_path / "own")
    before = {file: file.stat().st_mtime_ns for file in first.rglob("*")}
    assert run.save_checkpoint(tmp_path / "own") == first
    assert {file: file.stat().st_mtime_ns for file in first.rglob("*")} == before


BROKEN = {
    "recipe.yaml": ["", "a: [", "- 1\n", "\x00"],
    "scores.json": ["", "{", "[1]", '{"x": 1}', '{"1": "best"}'],
}


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, texts in BROKEN.items() for t in texts])
def test_a_damaged_file_is_one_clear_error(tmp_path, name, text):
    trainer(written(tmp_path, train_iters=1)).train()
    folder = tmp_path / ("run" if name == "recipe.yaml" else "state")
    (folder / name).write_text(text)
    with pytest.raises((RecipeError, CheckpointError), match=rf"{name} is damaged.*; remove"):
        trainer(written(tmp_path, train_iters=1)).train()


def test_a_folder_where_the_stop_file_belongs_is_refused(tmp_path):
    (tmp_path / "run" / "stop").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text("{}")
    with pytest.raises(RecipeError, match="kill_switch_path: .*stop is a folder; remove it"):
        trainer(written(tmp_path, train_iters=1)).train()


@pytest.mark.parametrize(
    "name", ["global_step_²", "global_step_01", "global_step_", "global_step_x"]
)
def test_folders_that_are_no_checkpoints_are_none(tmp_path, name):
    (tmp_path / name).mkdir()
    assert engine(tmp_path).steps() == []


@pytest.mark.parametrize("line", ["", "{", "\x00\x00", "7", '"text"'])
def test_a_broken_line_of_metrics_takes_no_other_with_it(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    rows = [{"iter": step} for step in (1, 2, 3)]
    lines = [json.dumps(row) for row in rows]
    file.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    assert read_rows(file) == rows
    JsonLines(file, resumed_at=2).close()
    assert read_rows(file) == rows[:2]


def test_leftovers_are_removed_and_what_links_point_to_is_not(tmp_path):
    state, kept = tmp_path / "state", tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    state.mkdir()
    (state / ".global_step_1.unfinished").touch()
    (state / ".global_step_2.removed").symlink_to(kept)
    (state / ".global_step_3.unfinished").mkdir()
    engine(state).begin(0)
    assert list(state.iterdir()) == [] and (kept / "file").exists()


def test_the_state_of_the_cut_run_is_that_of_the_whole(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = trainer(written(tmp_path / "a"))
    whole.train()
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Run, "export", lambda *_: (_ for _ in ()).throw(Killed))
        trainer(written(tmp_path / "b")).train()
    again = trainer(written(tmp_path / "b"))
    again.train()
    expected = host(whole.state)
    for name, array in host(again.state).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    exports = [Path(tmp_path / run / "exports/global_step_4/model.safetensors") for run in "ab"]
    assert exports[0].read_bytes() == exports[1].read_bytes()


def test_other_rows_under_the_same_path_do_not_continue_a_run(tmp_path):
    trainer(written(tmp_path, every=1, exit_iteration=1)).train()
    changed = written(tmp_path, every=1)
    conversations(tmp_path / "rows.jsonl", 12, seed=1)
    with pytest.raises(
        RecipeError, match=r"data\.digest: is '\w+', .*global_step_1 has '\w+'; a run"
    ):
        trainer(changed).train()
    changed["checkpoint"][0]["reset"] = ["data"]
    assert trainer(changed).train().global_step == 4
