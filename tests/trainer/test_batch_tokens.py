"""A run whose batches are filled to a number of tokens."""

import json

import numpy as np
import pytest

from tests.runs import host, losses, metrics_of, recipe, trainer
from tests.tiny import chat

STEPS, TOKENS = 7, 512


def written(folder, **changes):
    data = {"batch_tokens": TOKENS, "pack_samples": False, "max_length": 256}
    data |= {"div_length": 64, "max_length_buckets": 2}
    checkpoint = {"output_dir": str(folder / "state"), "save_every_n_steps": 1, "auto_resume": True}
    whole = recipe(folder, train_iters=STEPS, data=data, **changes) | {"checkpoint": [checkpoint]}
    lines = [
        json.dumps({"messages": chat("How often?", "yes " * (8 * n))}) for n in range(1, 25, 2)
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return whole


@pytest.mark.covers("data.batch_tokens")
def test_a_resumed_run_is_bitwise_the_unbroken_one_and_compiles_a_program_a_shape(tmp_path, capsys):
    unbroken = trainer(written(tmp_path / "one"))
    unbroken.train()
    shapes = {batch.tokens.shape for batch in unbroken.data.train_batches(0, STEPS)}
    assert unbroken.step.num_compilations == len(shapes) == 2
    assert unbroken.data.steps_per_epoch < STEPS, "an epoch must end within the run"
    assert f"at most {TOKENS} padded tokens x 1 per batch shard" in capsys.readouterr().out
    trainer(written(tmp_path / "two", exit_iteration=3)).train()
    again = trainer(written(tmp_path / "two"))
    again.train()
    expected = host(unbroken.state)
    for name, array in host(again.state).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    rows = [metrics_of(tmp_path / name) for name in ("one", "two")]
    for one, two in zip(*rows, strict=True):
        for key in ("loss", "grad_norm", "tokens", "rows", "seqlen"):
            assert one[key] == two[key]
        places = unbroken.layout.step_sequences(one["seqlen"]) * one["seqlen"]
        assert one["padding_ratio"] == pytest.approx(1 - one["tokens"] / places)


def test_devices_and_microbatches_share_the_tokens_of_a_step(tmp_path):
    """Two devices, or two microbatches, have the same sequences: sums, divided once."""
    halves = trainer(written(tmp_path / "one", gradient_accumulation_steps=2))
    devices = trainer(written(tmp_path / "two", mesh={"data": 2}), devices=2)
    assert halves.layout.global_batch == devices.layout.global_batch == 2
    batches = zip(halves.data.train_batches(0, 4), devices.data.train_batches(0, 4), strict=True)
    for one, other in batches:
        assert one.tokens.shape[0] == 2 and one.tokens.shape[1] * 2 == other.tokens.shape[1]
        np.testing.assert_array_equal(one.rows.ravel(), other.rows.ravel())
    np.testing.assert_allclose(losses(devices, 4), losses(halves, 4), rtol=1e-5)
