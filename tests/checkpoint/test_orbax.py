"""A checkpoint of full state is whole or not there, and damage to it is found."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from engines import assert_same, engine, listed, saved, shapes, state

from jaxtrain.checkpoint import CheckpointEngine, OrbaxEngine
from jaxtrain.checkpoint.engine import SavePoint
from jaxtrain.recipe.checkpoint import CheckpointConfig
from jaxtrain.recipe.errors import CheckpointError, RecipeError

SIZE = 5_000  # rows of an array that has a file of its own


def truncated(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file):
    content = bytearray(file.read_bytes() or b" ")
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def removed(file):
    file.unlink()


@pytest.mark.parametrize("harm", [truncated, flipped, removed])
def test_damage_to_any_file_is_found(tmp_path, harm):
    """A bit that is flipped in an array would be read without a word."""
    saved(tmp_path / "good", [7], size=SIZE)
    good = tmp_path / "good" / "global_step_7"
    files = [file.relative_to(good) for file in good.rglob("*") if file.is_file()]
    files = [file for file in files if (good / file).stat().st_size]  # one of Orbax's is empty
    assert len(files) > 8
    for file in files:
        bad = tmp_path / "bad" / "global_step_7"
        shutil.copytree(good, bad)
        harm(bad / file)
        with pytest.raises(CheckpointError, match=r"global_step_7.* remove it, or write"):
            engine(tmp_path / "bad").load(shapes(SIZE))
        shutil.rmtree(bad)
    assert_same(engine(tmp_path / "good").load(shapes(SIZE)), 7, SIZE)


@pytest.mark.covers("checkpoint.*.on_corrupt")
def test_a_damaged_newest_is_passed_over_when_the_recipe_says_so(tmp_path, capsys):
    saved(tmp_path, [1, 2, 3], size=SIZE)
    for step in (2, 3):
        flipped(max((tmp_path / f"global_step_{step}").rglob("*"), key=lambda f: f.stat().st_size))
    with pytest.raises(CheckpointError, match=r"global_step_3 is damaged: .* on_corrupt: previous"):
        engine(tmp_path).load(shapes(SIZE))
    again = engine(tmp_path, on_corrupt="previous")
    assert_same(again.load(shapes(SIZE)), 1, SIZE)
    said = capsys.readouterr().out
    assert "WARNING: " in said and "resuming from global_step_2" in said
    assert "resuming from global_step_1" in said
    # The damaged ones are out of the way when the run begins: it writes the same steps again.
    again.begin(1)
    assert again.steps() == [1]
    assert {p.name for p in tmp_path.glob("*.aside")} == {
        "global_step_2.aside", "global_step_3.aside",
    }  # fmt: skip
    again.save(again.run.snapshot(2, SIZE))
    again.wait()
    assert_same(engine(tmp_path).load(shapes(SIZE)), 2, SIZE)


def test_nothing_readable_is_an_error_and_no_fresh_start(tmp_path):
    saved(tmp_path, [1])
    removed(tmp_path / "global_step_1" / "metadata.json")
    with pytest.raises(CheckpointError, match="there is none before it"):
        engine(tmp_path, on_corrupt="previous").load(shapes())


def test_a_background_save_has_the_bytes_of_a_blocking_one(tmp_path):
    """Also when the arrays are given away for the next update at once."""
    step = jax.jit(lambda state: jax.tree.map(lambda a: a * 0, state), donate_argnums=0)
    for name, background in (("async", True), ("blocking", False)):
        saver = engine(tmp_path / name, async_save=background)
        snapshot = saver.run.snapshot(4, SIZE)
        saver.save(snapshot)
        jax.block_until_ready(step(snapshot.state))
        if not background:
            assert listed(tmp_path / name) == [4]
        saver.wait()
        assert_same(engine(tmp_path / name).load(shapes(SIZE)), 4, SIZE)


def test_a_failed_background_write_is_not_silent(tmp_path):
    saver = saved(tmp_path, [1], size=SIZE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(CheckpointError, match="global_step_2 cannot be written"):
            saver.save(saver.run.snapshot(2, SIZE))
            saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert listed(tmp_path) == [1]
    again = engine(tmp_path)
    again.begin(1)
    assert [p.name for p in tmp_path.iterdir()] == ["global_step_1"]
    assert_same(again.load(shapes(SIZE)), 1, SIZE)


SAVING = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from engines import engine
saver = engine({folder!r}, keep_last_n=2)
saver.begin(0)
print("begun", flush=True)
for step in range(1, 10_000):
    saver.save(saver.run.snapshot(step, {size}))
"""


@pytest.mark.parametrize("delay_s", [0.3, 0.62, 0.97])
def test_a_kill_during_a_save_leaves_the_one_before(tmp_path, delay_s):
    """Trap A31: kill -9 at any moment; whatever has a checkpoint's name can be restored."""
    here = os.path.dirname(__file__)
    root = os.path.dirname(os.path.dirname(here))
    code = SAVING.format(tests=here, root=root, folder=str(tmp_path), size=SIZE)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    while not listed(tmp_path):
        time.sleep(0.01)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = listed(tmp_path)
    assert steps and len(steps) <= 3
    for step in steps:
        alone = engine(tmp_path, resume_from=step)
        assert_same(alone.load(shapes(SIZE)), step, SIZE)
    again = engine(tmp_path)
    again.begin(steps[-1])
    assert not list(tmp_path.glob(".global_step_*"))


def test_weights_alone_do_not_resume_and_what_does_is_named(tmp_path):
    """Trap F11."""
    saved(tmp_path, [1, 2])
    saved(tmp_path, [3], save_model_only=True)
    assert not (tmp_path / "global_step_3" / "optimizer").exists()
    expected = r"weights only: .*global_step_3 .* there: global_step_1, global_step_2; resume_from"
    with pytest.raises(CheckpointError, match=expected):
        engine(tmp_path).load(shapes())
    assert_same(engine(tmp_path, resume_from=2).load(shapes()), 2)


@pytest.mark.covers("checkpoint.*.reset")
def test_weights_alone_are_enough_when_the_optimizer_is_reset(tmp_path):
    saved(tmp_path, [3], save_model_only=True)
    again = engine(tmp_path, auto_resume=True, reset=["optimizer"])
    found = again.load(shapes())
    assert found.opt_state is None and again.resets == ("optimizer",)
    np.testing.assert_array_equal(found.params["w"], state(3).params["w"])


@pytest.mark.covers("checkpoint.*.save_model_only")
def test_all_but_the_newest_are_cut_down_to_weights(tmp_path):
    saver = saved(tmp_path, [1, 2, 3], save_model_only="all_but_last", keep_last_n=2)
    full = [p.parent.name for p in tmp_path.glob("*/optimizer")]
    assert listed(tmp_path) == [2, 3] and full == ["global_step_3"] and saver.is_full_state
    assert_same(engine(tmp_path).load(shapes()), 3)
    with pytest.raises(CheckpointError, match="weights only: .*global_step_2 .* global_step_3;"):
        engine(tmp_path, resume_from=2).load(shapes())
    # What is left of an older one is still checked.
    assert engine(tmp_path, resume_from=2, reset=["optimizer"]).load(shapes()).step == 2


def test_a_reset_is_done_once(tmp_path):
    """A run that is interrupted after a reset does not lose its optimizer again."""
    saved(tmp_path, [1])
    first = engine(tmp_path, auto_resume=True, reset=["optimizer"])
    assert first.load(shapes()).opt_state is None
    first.save(first.run.snapshot(2))
    first.wait()
    second = engine(tmp_path, auto_resume=True, reset=["optimizer"])
    assert_same(second.load(shapes()), 2)
    assert second.resets == () and second.metadata(2)["reset"] == ["optimizer"]


@pytest.mark.covers("checkpoint.*.resume_from")
def test_a_start_that_is_named_is_taken_once_with_auto_resume(tmp_path):
    saved(tmp_path, [1, 2, 3])
    config = {"auto_resume": True, "resume_from": 2}
    first = engine(tmp_path, **config)
    assert_same(first.load(shapes()), 2)
    first.begin(2)
    assert first.steps() == [1, 2] and (tmp_path / "global_step_3.aside").is_dir()
    first.save(first.run.snapshot(4))
    first.wait()
    assert_same(engine(tmp_path, **config).load(shapes()), 4)
    assert_same(engine(tmp_path, resume_from=2).load(shapes()), 2)


def test_a_start_may_lie_in_another_folder(tmp_path):
    saved(tmp_path / "a", [5])
    other = engine(tmp_path / "b", resume_from=str(tmp_path / "a" / "global_step_5"))
    assert_same(other.load(shapes()), 5)
    assert (
        not other.config.is_continued
        and engine(tmp_path / "a", resume_from="5").config.is_continued
    )


def test_what_the_state_does_not_fit_is_refused_unless_allowed_by_name(tmp_path, capsys):
    saved(tmp_path, [1])

    def changed(*allowed, reset=(), **lineage):
        other = engine(tmp_path, auto_resume=True, reset=reset)
        other.run.compatibility = other.run.compatibility | lineage
        other.run.recipe = {"epochs": 2}
        other.run.allowed_changes = allowed
        return other.load(shapes())

    new = {"data.sources": ["b"], "optimizer.type": "lion"}
    with pytest.raises(RecipeError) as found:
        changed(**new)
    assert [fault.key for fault in found.value.faults] == ["data.sources", "optimizer.type"]
    assert "is ['b'], " in str(found.value) and "--allow-change data.sources" in str(found.value)
    with pytest.raises(RecipeError, match=r"^optimizer\.type: is 'lion', .* has 'adamw'"):
        changed("data.sources", **new)
    assert_same(changed("data", "optimizer.type", **new), 1)
    assert changed(reset=["data", "optimizer"], **new).step == 1
    assert "changed since global_step_1: epochs" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="--allow-change: 'data.source' is none of data.sources"):
        changed("data.source")


def test_another_shape_is_named_and_another_dtype_is_not_cast(tmp_path):
    saved(tmp_path, [1])
    with pytest.raises(
        CheckpointError,
        match=r"2 arrays differ, such as \['weights'\].*\['w'\]: saved float32.3, 4",
    ):
        engine(tmp_path).load(shapes(4))
    other = shapes()
    other.params["w"] = jax.ShapeDtypeStruct((3, 4), "bfloat16", sharding=other.step.sharding)
    with pytest.raises(CheckpointError, match=r"1 arrays differ, .*saved float32\[3, 4\], wanted"):
        engine(tmp_path).load(other)


def test_state_of_a_callback_must_be_json(tmp_path):
    saver = engine(tmp_path)
    saver.run.compatibility = {"x": object()}
    with pytest.raises(CheckpointError, match="state must be JSON data"):
        saver.save(saver.run.snapshot(1))


DUE = {
    "every third": ({"save_every_n_steps": 3}, [3, 6, 9]),
    "after": ({"save_every_n_steps": 3, "save_after_step": 6}, [6, 9]),
    "at the end": ({"save_end_of_training": True}, [10]),
    "after, at the end": ({"save_after_step": 99, "save_end_of_training": True}, [10]),
    "every epoch": ({"save_every_n_epochs": 1}, [4, 8]),
    "every second epoch": ({"save_every_n_epochs": 2}, [8]),
    "both on one step": ({"save_every_n_epochs": 2, "save_every_n_steps": 4}, [4, 8]),
    "off": ({"save_every_n_steps": 1, "enabled": False}, []),
}


@pytest.mark.covers("checkpoint.*.save_after_step")
@pytest.mark.parametrize("case", DUE)
def test_saves_are_due_by_the_step_number(tmp_path, case):
    """Traps A7 and G10: epochs of 4 updates, ended ones are counted from 1, a restart moves
    nothing. Trap A28: the same step is never due twice."""
    config, expected = DUE[case]
    found = []
    saver = engine(tmp_path, **config)
    for step in range(1, 11):
        if step == 6:
            saver = engine(tmp_path, **config)
            saver.begin(step - 1)
        moment = SavePoint(
            step, epoch_ended=0 if step % 4 else step // 4, training_ended=step == 10
        )
        for _ in range(2):
            if saver.is_due(moment):
                found.append(step)
                saver.last_saved = step
    assert found == expected


class KeptAsText(CheckpointEngine):
    """Features, row 28: a format of the user's own."""

    name = "kept_as_text"
    config: CheckpointConfig
    is_full_state = True

    def save(self, model):
        self.path(model.step).mkdir(parents=True)
        leaves = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(model.state)]
        (self.path(model.step) / "state.json").write_text(json.dumps(leaves))

    def load(self, model):
        text = (self.path(self.latest()) / "state.json").read_text()
        leaves, tree = jax.tree.flatten(model)
        arrays = [
            jax.device_put(np.asarray(value, leaf.dtype).reshape(leaf.shape), leaf.sharding)
            for value, leaf in zip(json.loads(text), leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, arrays)


def test_an_engine_of_ones_own_needs_save_and_load_alone(tmp_path):
    config = CheckpointConfig(type="kept_as_text", output_dir=str(tmp_path))
    own = KeptAsText(config)
    own.save(engine(tmp_path).run.snapshot(6))
    assert own.steps() == [6] and own.metadata(6) == {} and isinstance(own, CheckpointEngine)
    assert not isinstance(own, OrbaxEngine)
    assert_same(own.load(shapes()), 6)
