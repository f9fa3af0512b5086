"""A run on records as they come."""

import numpy as np
import pytest

from jaxtrain import Callback
from tests.runs import host, metrics_of, recipe, trainer

STEPS = 9


def written(folder, **changes):
    data = {"streaming": True, "shuffle_window": 7}
    changes = {"train_iters": STEPS, "rows": 20, "gradient_accumulation_steps": 2} | changes
    checkpoint = {"output_dir": str(folder / "state"), "save_every_n_steps": 1, "auto_resume": True}
    return recipe(folder, data=data, **changes) | {"checkpoint": [checkpoint]}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run = trainer(written(folder))
    run.train()
    counts = run.data.train.counts[0]
    assert counts.rows > 20, "the records must begin again within the run"
    return folder, host(run.state)


@pytest.mark.parametrize("stop", [pytest.param(4, marks=pytest.mark.slow), 8])
def test_a_resumed_run_is_bitwise_the_unbroken_one(tmp_path, unbroken, stop, capsys):
    folder, state = unbroken
    trainer(written(tmp_path, exit_iteration=stop)).train()
    again = trainer(written(tmp_path))
    again.train()
    said = capsys.readouterr().out
    assert "stream: blocks of 7 records are read, packed and shuffled" in said
    assert said.count("rows.jsonl was read 1 time\n") >= 1
    for name, array in host(again.state).items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)
    for one, two in zip(metrics_of(folder), metrics_of(tmp_path), strict=True):
        for key in ("iter", "loss", "grad_norm", "lr", "tokens", "trained_tokens"):
            assert one[key] == two[key], (key, one["iter"])


class Skipping(Callback):
    def on_step_end(self, state, control):
        control.should_epoch_stop = True


def test_a_stream_has_no_epoch_to_leave(tmp_path, unbroken):
    run = trainer(written(tmp_path), callbacks=[Skipping()])
    run.train()
    assert run.global_step == STEPS and 0 < run.epochs_done < 1e-9
    assert [r["loss"] for r in metrics_of(tmp_path)] == [r["loss"] for r in metrics_of(unbroken[0])]
