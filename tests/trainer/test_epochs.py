"""Whole epochs, whose last update is short: on every cut of the batch and every mesh the same run,
and the same one when it stops and goes on."""

import socket

import numpy as np
import pytest

from tests.runs import assert_same, host, metrics_of, recipe, trainer


def run_of(folder, *, devices=1, **changes):
    """Two epochs of batches of 4 rows, the last of which has fewer."""
    entry = {"output_dir": str(folder / "state"), "save_every_n_steps": 1, "auto_resume": True}
    written = {
        "rows": 42, "epochs": 2, "train_iters": 0, "eval_every_n_epochs": 1,
        "scheduler": {"name": "linear", "warmup_ratio": 0}, "data": {"train_eval_split": [0.8, 0.2]},
    }  # fmt: skip
    run = trainer(recipe(folder, **written | changes, checkpoint=[entry]), devices=devices)
    assert run.layout.global_batch == 4 and run.data.train_rows % 4
    assert run.data.eval_rows % 4
    return run


def told(folder, name):
    rows = metrics_of(folder)
    return [row[name] for row in rows if name in row]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    run = run_of(folder, micro_batch_size=4)
    run.train()
    return folder, run


def assert_same_numbers(folder, expected):
    for name in ("loss", "grad_norm", "eval/loss"):
        np.testing.assert_allclose(told(folder, name), told(expected, name), rtol=2e-4)
    assert told(folder, "trained_tokens") == told(expected, "trained_tokens")
    assert told(folder, "eval/tokens") == told(expected, "eval/tokens")


def test_accumulation_counts_updates_and_weighs_tokens(tmp_path, plain):
    """Traps A9, A11, G3 and G5: the rate at every update, the short last group, evaluations."""
    run = run_of(tmp_path, gradient_accumulation_steps=4)
    run.train()
    updates = 2 * -(-run.data.train_rows // 4)
    assert run.global_step == run.training_horizon == updates
    for folder in (tmp_path, plain[0]):
        rates = [1e-2 * (1 - update / updates) for update in range(updates)]
        np.testing.assert_allclose(told(folder, "lr"), rates, rtol=1e-6)
    assert_same_numbers(tmp_path, plain[0])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"mesh": {"fsdp": 2, "tensor": 2}, "micro_batch_size": 2}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"mesh": {"pipeline": 2, "data": 2}, "micro_batch_size": 2}, marks=pytest.mark.slow
        ),
    ],
    ids=["fsdp and tensor", "pipeline and data"],
)
def test_a_mesh_loses_no_row_and_resumes_bit_for_bit(tmp_path, plain, changes):
    """Traps F8 and G14."""
    whole = run_of(tmp_path / "whole", devices=4, **changes)
    whole.train()
    assert_same_numbers(tmp_path / "whole", plain[0])
    for end in (3, 0):
        run = run_of(tmp_path / "cut", devices=4, exit_iteration=end, **changes)
        run.train()
    assert run.global_step_this_run == whole.global_step - 3
    assert_same(run.state, host(whole.state))
    assert told(tmp_path / "cut", "loss") == told(tmp_path / "whole", "loss")


def test_a_run_listens_to_nobody(tmp_path, monkeypatch):
    """Trap G6: what controls it are files of its folder."""
    opened = []
    monkeypatch.setattr(socket.socket, "bind", lambda *values: opened.append(values))
    trainer(recipe(tmp_path, train_iters=1)).train()
    assert opened == []
