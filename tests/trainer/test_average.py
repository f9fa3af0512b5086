"""Averaged weights: what they are, where they are used, that they are kept."""

import jax
import numpy as np
import pytest

from jaxtrain.model.tensor_file import read_folder
from tests.runs import assert_same, first_batch, host, recipe, trainer

DECAY, START, STEPS = 0.7, 2, 5


def run_of(folder, *, devices=1, **changes):
    ema = {"decay": DECAY, "start_step": START} | changes.pop("ema", {})
    return trainer(recipe(folder, train_iters=STEPS, ema=ema, **changes), devices=devices)


@pytest.mark.covers("ema.decay", "ema.start_step")
def test_it_is_the_exponential_average_from_its_start_on(tmp_path):
    run = run_of(
        tmp_path, mesh={"data": 2}, devices=2, deepspeed={"zero_optimization": {"stage": 1}}
    )
    expected = host(run.state.params)
    for step, batch in enumerate(run.data.train_batches(0, STEPS)):
        run.state, _ = run.step(run.state, run.layout.on_devices(batch))
        decay = DECAY if step >= START else 0.0
        for name, array in host(run.state.params).items():
            expected[name] = decay * expected[name] + (1 - decay) * array
    for name, array in host(run.state.average).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-6, err_msg=name)
    matrices = [leaf for leaf in jax.tree.leaves(run.state.average) if leaf.ndim > 2]
    assert all(2 * a.addressable_shards[0].data.size == a.size for a in matrices)


@pytest.mark.covers("ema.eval")
@pytest.mark.parametrize("is_told", [True, False])
def test_it_is_evaluated_and_exported(tmp_path, is_told):
    run = run_of(tmp_path, ema={"eval": is_told, "start_step": 0})
    batch = first_batch(run)
    for _ in range(2):
        run.state, _ = run.step(run.state, batch)
    key, state = jax.random.key(0), run.state
    told = state.average if is_told else state.params
    same = state._replace(params=told, average=told)
    other = state._replace(params=state.average, average=state.params)
    loss = float(run.loss(state, batch, key).total)
    assert loss == float(run.loss(same, batch, key).total)
    assert loss != float(run.loss(other, batch, key).total)
    run.save_model(tmp_path / "out")
    np.testing.assert_array_equal(
        read_folder(tmp_path / "out")["model.norm.weight"].read(), told["norm"]
    )


def test_the_average_of_what_is_frozen_is_what_is_frozen(tmp_path):
    groups = [{"match": "embed|norm", "freeze": True}]
    run = run_of(tmp_path, optimizer={"groups": groups}, ema={"start_step": 0})
    before = host(run.state.params)
    for batch in run.data.train_batches(0, STEPS):
        run.state, _ = run.step(run.state, run.layout.on_devices(batch))
    for name, array in host(run.state.average).items():
        assert (array.tobytes() == before[name].tobytes()) == ("embed" in name or "norm" in name)


def test_a_resumed_run_has_the_same_average(tmp_path):
    def written(folder, **changes):
        entry = {"output_dir": str(folder / "s"), "save_every_n_steps": 1, "auto_resume": True}
        return run_of(folder, checkpoint=[entry], **changes)

    whole = written(tmp_path / "whole")
    whole.train()
    written(tmp_path / "cut", exit_iteration=3).train()
    again = written(tmp_path / "cut")
    again.train()
    assert_same(again.state.average, host(whole.state.average))
