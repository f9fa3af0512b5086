"""Training in float16: the scale of the loss moves as written, and what overflows is no step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import SFTTrainer
from jaxtrain.recipe.deepspeed import FP16Config
from jaxtrain.recipe.errors import NonFiniteError
from jaxtrain.trainer.loss_scale import MAX_SCALE, Scaling, lift_factor
from tests.runs import assert_same, host, recipe, trainer
from tests.runs import metrics_of as rows


def expected_scales(config, overflows):
    """(scale of each step, does it ask for less than the floor), by DeepSpeed's account of it."""
    scale, last, left, found = 2.0**config.initial_scale_power, -1, config.hysteresis, []
    for step, overflow in enumerate(overflows):
        found.append((scale, overflow and left == 1 and scale <= config.min_loss_scale))
        if overflow:
            last = step
            if left == 1:
                scale = max(scale / 2, config.min_loss_scale)
            left = max(left - 1, 1)
            continue
        if config.consecutive_hysteresis:
            left = config.hysteresis
        if (step - last) % config.loss_scale_window == 0:
            left = config.hysteresis
            scale = min(scale * 2, MAX_SCALE)
    return found


@pytest.mark.covers("deepspeed.fp16.initial_scale_power", "deepspeed.fp16.loss_scale_window")
@pytest.mark.covers("deepspeed.fp16.hysteresis", "deepspeed.fp16.consecutive_hysteresis")
@pytest.mark.covers("deepspeed.fp16.min_loss_scale")
@pytest.mark.parametrize("is_consecutive", [False, True])
@pytest.mark.parametrize(
    ("power", "window", "hysteresis", "floor", "rate"),
    [(4, 3, 1, 1, 0.3), (4, 3, 2, 2, 0.4), (3, 1, 3, 0.5, 0.6), (62, 2, 2, 1, 0.05)],
)
def test_the_scale_moves_as_written(power, window, hysteresis, floor, rate, is_consecutive):
    config = FP16Config(
        initial_scale_power=power, loss_scale_window=window, hysteresis=hysteresis,
        min_loss_scale=floor, consecutive_hysteresis=is_consecutive,
    )  # fmt: skip
    scaling, overflows = Scaling(config), np.random.default_rng(0).random(120) < rate

    def step(state, finite):
        return scaling.update(state, finite), scaling.metrics(state, finite)

    _, found = jax.lax.scan(step, scaling.start(), ~overflows)
    expected = np.array(expected_scales(config, overflows))
    np.testing.assert_array_equal(found["loss_scale"], expected[:, 0])
    np.testing.assert_array_equal(found["scale_is_exhausted"], expected[:, 1])
    assert len(set(expected[:, 0])) > 2


@pytest.mark.covers("deepspeed.fp16.loss_scale")
def test_a_fixed_scale_stays_and_leaves_an_overflow_to_the_policy():
    scaling = Scaling(FP16Config(loss_scale=128))
    state = scaling.start()
    assert scaling.update(state, jnp.bool_(False)) == state == {}
    assert scaling.metrics(state, jnp.bool_(False)) == {"loss_scale": 128}


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 5.0, 4096.0, 12345.6])
def test_the_factor_is_the_scale_over_the_weight_to_a_power_of_two(weight):
    factor = float(lift_factor(jnp.float32(1024), jnp.float32(weight)))
    assert np.frexp(factor)[0] == 0.5
    assert 1024 / 2 < factor * max(weight, 1) / 2 < 1024 or factor * max(weight, 1) == 1024


class Overflowing(SFTTrainer):
    """The loss of batches with a row among `bad_rows` is finite, its gradients are not."""

    name = "overflowing"
    bad_rows = ()

    def loss_fn(self, model, batch, key):
        loss = super().loss_fn(model, batch, key)
        is_bad = jnp.isin(batch.rows, jnp.array(self.bad_rows or [-2])).any()
        return loss._replace(total=loss.total * jnp.where(is_bad, 1e20, 1.0))


def overflowing(folder, bad, *, devices=1, steps=5, fp16=None, **changes):
    """A run in float16 of which the batches with these numbers overflow."""
    state = {"output_dir": str(folder / "state"), "save_every_n_steps": 1, "auto_resume": True}
    fp16 = {"hysteresis": 9, "initial_scale_power": 10} if fp16 is None else fp16
    changes = {"model": {"dtype": "fp16"}, "deepspeed": {"fp16": fp16}} | changes
    run = trainer(
        recipe(folder, rows=60, train_iters=steps, checkpoint=state, **changes),
        cls=Overflowing, devices=devices,
    )  # fmt: skip
    assert run.data.steps_per_epoch > steps + len(bad)
    plan = run.data.train
    numbers = (plan.sequence_numbers(plan.advance(0, step)).ravel() for step in bad)
    run.bad_rows = [int(number) for one in numbers for number in one]
    return run


@pytest.mark.parametrize(
    ("devices", "changes"),
    [
        (1, {"gradient_accumulation_steps": 2}),
        pytest.param(2, {"mesh": {"pipeline": 2}, "micro_batch_size": 2}, marks=pytest.mark.slow),
    ],
    ids=["accumulation", "pipeline"],
)
def test_a_run_with_overflows_is_the_one_without_these_steps(tmp_path, devices, changes):
    run = overflowing(tmp_path, [0, 3], devices=devices, **changes)
    run.train()
    assert (run.global_step, int(run.state.step)) == (5, 5)
    assert run.progress.position == 7 * run.layout.global_batch
    found = rows(tmp_path)
    assert [row["skipped_updates"] for row in found] == [1, 1, 2, 2, 2]
    assert {row["loss_scale"] for row in found} == {1024}
    for number in (1, 2, 4, 5, 6):
        if number == 1:
            other = overflowing(tmp_path / "other", [], devices=devices, **changes)
        (batch,) = other.data.train_batches(other.data.train.advance(0, number), 1)
        other.state, _ = other.step(other.state, other.layout.on_devices(batch))
    expected = host(other.state._replace(loss_scale={}))
    assert_same(run.state._replace(loss_scale={}), expected)
    assert found[-1]["loss"] < found[0]["loss"]


def test_a_resumed_run_has_its_scale(tmp_path):
    """Bit for bit that of the run that was not interrupted, with one overflow before and one after
    the cut, where the scale is not the first one, and growth that counts steps of both sides."""
    fp16 = {"hysteresis": 1, "loss_scale_window": 2, "initial_scale_power": 6}
    whole = overflowing(tmp_path / "whole", [1, 5], fp16=fp16, steps=6)
    whole.train()
    overflowing(tmp_path, [1, 5], fp16=fp16, steps=6, exit_iteration=2).train()
    again = overflowing(tmp_path, [1, 5], fp16=fp16, steps=6)
    again.train()
    assert_same(again.state, host(whole.state))
    scales = [row["loss_scale"] for row in rows(tmp_path)]
    assert scales == [row["loss_scale"] for row in rows(tmp_path / "whole")]
    assert scales == [64, 32, 32, 64, 32, 32]


def test_an_overflow_at_the_floor_ends_the_run(tmp_path):
    fp16 = {"hysteresis": 1, "initial_scale_power": 1}
    run = overflowing(tmp_path, [1, 2], fp16=fp16)
    with pytest.raises(NonFiniteError, match=r"at a loss scale of 1, the least that .*bf16") as e:
        run.train()
    assert e.value.exit_code == 5 and "\n" not in str(e.value)
    assert (run.global_step, run.train_batch_idx) == (1, 3)
    assert run.checkpoint_engines[0].steps() == [1]


@pytest.mark.covers("deepspeed.torch_autocast.dtype", "deepspeed.torch_autocast.enabled")
def test_float16_trains_as_float32_does(tmp_path):
    autocast = {"torch_autocast": {"enabled": True, "dtype": "fp16"}}
    autocast["fp16"] = {"initial_scale_power": 10}
    half = trainer(recipe(tmp_path, model={"dtype": "fp32"}, deepspeed=autocast))
    full = trainer(recipe(tmp_path))
    assert half.run.model.compute.compute_dtype == "float16"
    found = []
    for run in (half, full):
        for batch in run.data.train_batches(0, 3):
            run.state, metrics = run.step(run.state, run.layout.on_devices(batch))
            found.append((metrics["loss"], metrics["grad_norm"]))
    assert float(half.state.loss_scale.scale) == 2**10
    np.testing.assert_allclose(found[:3], found[3:], rtol=5e-3)


def test_a_checkpoint_without_a_scale_begins_one_and_one_with_it_may_drop_it(tmp_path):
    half = {"model": {"dtype": "fp16"}}
    overflowing(tmp_path, [], steps=1, model={"dtype": "fp32"}).train()
    run = overflowing(tmp_path, [], steps=2, **half)
    run.train()
    assert (run.global_step, run.global_step_this_run) == (2, 1)
    assert float(run.state.loss_scale.scale) == 1024
    last = overflowing(tmp_path, [], steps=3, model={"dtype": "fp32"})
    last.train()
    assert (last.global_step_this_run, last.state.loss_scale) == (1, {})
