"""Two processes train as one does, also where both hold the same sequences."""

import json

import pytest

from tests.runs import in_two_processes, losses, recipe, trainer

STEPS = 3
PROGRAM = (
    f"print(json.dumps([run.layout.process_sequences.tolist(), losses(run, {STEPS})]), flush=True)"
)


@pytest.mark.parametrize(
    ("mesh", "devices", "rows"),
    [
        ({"tensor": 2}, 1, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        pytest.param({"context": 2}, 1, [[0, 1, 2, 3]] * 2, marks=pytest.mark.slow),
        pytest.param({"data": 2}, 1, [[0, 1], [2, 3]], marks=pytest.mark.slow),
        pytest.param({"data": 2, "tensor": 2}, 2, [[0, 1], [2, 3]], marks=pytest.mark.slow),
    ],
    ids=[
        "one batch shard on both",
        "half of each sequence",
        "a shard each",
        "a shard of two devices each",
    ],
)
def test_two_processes_train_as_one_does(tmp_path, mesh, devices, rows):
    shards = mesh.get("data", 1)
    cut = {"micro_batch_size": 4 // shards, "gradient_accumulation_steps": 2}
    alone = losses(trainer(recipe(tmp_path / "alone", micro_batch_size=4,
                                  gradient_accumulation_steps=2)), STEPS)  # fmt: skip
    outputs = in_two_processes(PROGRAM, recipe(tmp_path, mesh=mesh, **cut), devices=devices)
    for out, own in zip(outputs, rows, strict=True):
        found_rows, found = json.loads(out.splitlines()[-1])
        assert found_rows == own
        assert found == pytest.approx(alone, abs=1e-5)
