"""Two processes train as one does, also where both hold the same sequences."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import environment, losses, recipe, trainer

STEPS = 3
PROGRAM = """
import json, sys
import jax
address, index, written = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, num_processes=2, process_id=index)
from jaxtrain import SFTTrainer, get_config
from tests.runs import environment, losses
run = SFTTrainer(get_config(written))
print(json.dumps([run.layout.process_rows.tolist(), losses(run, %d)]), flush=True)
"""


def free_address():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{one.getsockname()[1]}"


@pytest.mark.parametrize(
    ("mesh", "devices", "rows"),
    [
        ({"tensor": 2}, 1, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        pytest.param({"data": 2}, 1, [[0, 1], [2, 3]], marks=pytest.mark.slow),
        pytest.param({"data": 2, "tensor": 2}, 2, [[0, 1], [2, 3]], marks=pytest.mark.slow),
    ],
    ids=["one batch shard on both", "a shard each", "a shard of two devices each"],
)
def test_two_processes_train_as_one_does(tmp_path, mesh, devices, rows):
    shards = mesh.get("data", 1)
    cut = {"micro_batch_size": 4 // shards, "gradient_accumulation_steps": 2}
    alone = losses(trainer(recipe(tmp_path / "alone", micro_batch_size=4,
                                  gradient_accumulation_steps=2)), STEPS)  # fmt: skip
    written = json.dumps(recipe(tmp_path, mesh=mesh, **cut))
    own = environment(devices=devices, PYTHONPATH=str(Path(__file__).parents[2]))
    address = free_address()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM % STEPS, address, str(index), written],
            env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    for process, wanted in zip(processes, rows, strict=True):
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        found_rows, found = json.loads(out.splitlines()[-1])
        assert found_rows == wanted
        assert found == pytest.approx(alone, abs=1e-5)
