"""Event files as TensorBoard reads them: one value a step, also after a restart that went back."""

import struct

import pytest

from jaxtrain.recipe.errors import RecipeError
from tests.runs import metrics_of, recipe, trainer

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")


def events(folder):
    """The records of every file, in the order of the files' names."""
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            yield event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def curves(folder):
    """Tag → [(step, value)]; the start of a session forgets what lies at its step or behind, which
    is how TensorBoard reads it."""
    found = {}
    for event in events(folder):
        if event.HasField("session_log"):
            for tag in found:
                found[tag] = [point for point in found[tag] if point[0] < event.step]
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def written(folder, **changes):
    state = {"output_dir": str(folder / "state"), "save_every_n_steps": 2, "auto_resume": True}
    return recipe(
        folder, tensorboard=True, train_iters=4, eval_interval=2,
        data={"train_eval_split": [0.9, 0.1]}, **changes,
    ) | {"checkpoint": state}  # fmt: skip


@pytest.mark.covers("tensorboard.enable")
def test_a_restart_that_goes_back_leaves_one_value_a_step(tmp_path):
    """Trap A40."""
    trainer(written(tmp_path, exit_iteration=3)).train()  # its newest checkpoint is of step 2
    trainer(written(tmp_path)).train()
    found = curves(tmp_path / "run" / "tensorboard")
    steps = [event.step for event in events(tmp_path / "run" / "tensorboard")]
    assert steps.count(3) > steps.count(4)  # said twice, and read once
    rows = metrics_of(tmp_path)
    for tag, steps in (
        ("loss", [1, 2, 3, 4]),
        ("eval/loss", [2, 4]),
        ("tokens_seen", [1, 2, 3, 4]),
    ):
        expected = [(row["iter"], row[tag]) for row in rows if tag in row]
        assert [step for step, _ in found[tag]] == steps
        assert found[tag] == [(step, pytest.approx(value)) for step, value in expected]
    assert "iter" not in found and "mfu" not in found


@pytest.mark.covers("tensorboard.dir")
def test_another_folder_is_taken_and_never_shared(tmp_path):
    there = {"enable": True, "dir": str(tmp_path / "events")}
    first = recipe(tmp_path, train_iters=1, tensorboard=there)
    trainer(first).train()
    assert "loss" in curves(tmp_path / "events") and not (tmp_path / "run" / "tensorboard").exists()
    with pytest.raises(RecipeError, match=r"tensorboard\.dir: .*events holds rows of another run"):
        trainer(first | {"run_dir": str(tmp_path / "second")}).train()
