"""Every schedule against its closed form, written down again in plain Python."""

import math

import jax.numpy as jnp
import pytest

from jaxtrain.recipe.scheduler import SHAPES, HFSchedulerConfig, WSDSchedulerConfig
from jaxtrain.scheduler.factory import WSDSchedulerFactory, hf_schedule

HORIZON, WARMUP, PEAK = 20, 4, 1e-2


def ramp(u):
    return u / WARMUP


def progress(u):
    return (u - WARMUP) / (HORIZON - WARMUP)


def half_wave(x):
    return 0.5 * (1 + math.cos(math.pi * x))


CASES = {
    "linear": ({}, lambda u: 1 - progress(u)),
    "constant_with_warmup": ({}, lambda u: 1.0),
    "cosine": ({"num_cycles": 1.5}, lambda u: half_wave(3 * progress(u))),
    "cosine_with_restarts": ({"num_cycles": 3}, lambda u: half_wave((3 * progress(u)) % 1.0)),
    "polynomial": (
        {"lr_end": 1e-3, "power": 2}, lambda u: ((PEAK - 1e-3) * (1 - progress(u)) ** 2 + 1e-3) / PEAK,
    ),
    "inverse_sqrt": ({"timescale": 9}, lambda u: 1 / math.sqrt((u + 9 - WARMUP) / 9)),
    "cosine_with_min_lr": ({"min_lr": 1e-3}, lambda u: 0.1 + 0.9 * half_wave(progress(u))),
    "warmup_stable_decay": (
        {"num_decay_steps": 5, "num_stable_steps": 11, "decay_type": "1-sqrt"},
        lambda u: 1.0 if u < 15 else 1 - math.sqrt((u - 15) / 5),
    ),
}  # fmt: skip


def schedule(name, kwargs, **keys):
    config = HFSchedulerConfig(name=name, scheduler_specific_kwargs=kwargs, **keys)
    warmup = config.warmup_updates(HORIZON)
    rate = hf_schedule(config, horizon=HORIZON, warmup=warmup, peak_lr=PEAK)
    return [float(rate(jnp.int32(u))) for u in range(HORIZON)]


@pytest.mark.covers(
    "scheduler.warmup_steps", "scheduler.name", "scheduler.scheduler_specific_kwargs"
)
@pytest.mark.parametrize("name", CASES)
def test_the_rate_of_every_update(name):
    kwargs, after = CASES[name]
    want = [ramp(u) if u < WARMUP else after(u) for u in range(HORIZON)]
    assert schedule(name, kwargs, warmup_steps=WARMUP) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "warmup_stable_decay"])
def test_without_warmup_the_first_update_has_the_peak_rate(name):
    kwargs = {"min_lr": 0.0} if name.endswith("min_lr") else {}
    # One of them counts updates from 1.
    peak = 1.0 if name != "cosine_warmup_with_min_lr" else half_wave(1 / HORIZON)
    assert schedule(name, kwargs, warmup_steps=0)[0] == pytest.approx(peak, abs=1e-6)


def test_constant_has_no_warmup():
    assert schedule("constant", {}, warmup_steps=WARMUP) == [1.0] * HORIZON


@pytest.mark.parametrize("first", [None, 0.2])
def test_the_warmup_of_cosine_may_have_a_start(first):
    kwargs = {"min_lr_rate": 0.1} | ({} if first is None else {"warmup_lr_rate": first})
    rates = schedule("cosine_warmup_with_min_lr", kwargs, warmup_steps=WARMUP)
    rise = [(u + 1) / 4 if first is None else 0.2 + 0.8 * u / 3 for u in range(WARMUP)]
    fall = [0.1 + 0.9 * half_wave((u - WARMUP + 1) / 16) for u in range(WARMUP, HORIZON)]
    assert rates == pytest.approx(rise + fall, abs=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine", "1-sqrt"])
def test_the_warmup_of_stable_decay_has_a_shape(kind):
    kwargs = {"num_decay_steps": 5, "warmup_type": kind, "min_lr_ratio": 0.1}
    rates = schedule("warmup_stable_decay", kwargs, warmup_steps=WARMUP)
    rise = {"linear": ramp, "cosine": lambda u: 0.5 * (1 - math.cos(math.pi * ramp(u))),
            "1-sqrt": lambda u: 1 - math.sqrt(1 - ramp(u))}[kind]  # fmt: skip
    assert rates[:4] == pytest.approx([0.1 + 0.9 * rise(u) for u in range(4)], abs=1e-6)
    assert rates[WARMUP:15] == [1.0] * 11


@pytest.mark.covers("scheduler.min_lr_ratio")
@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial"])
def test_a_floor_is_where_the_rate_ends(name):
    rates = schedule(name, {}, warmup_steps=0, min_lr_ratio=0.5)
    assert 0.5 < rates[-1] < 0.55 and rates[0] == 1.0


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_wsd_decays_by_a_cosine_as_upstream(floor):
    config = WSDSchedulerConfig(num_warmup_steps=4, num_decay_steps=6, min_lr_ratio=floor)
    factory = WSDSchedulerFactory(config)
    factory.training_horizon = HORIZON
    rate = factory.create_scheduler(None)
    want = [
        ramp(u) if u < 4 else 1.0 if u < 14 else half_wave((u - 14) / 6) for u in range(HORIZON)
    ]
    found = [float(rate(jnp.int32(u))) for u in range(HORIZON)]
    assert found == pytest.approx([floor + (1 - floor) * scale for scale in want], abs=1e-6)


def test_no_name_is_left_out():
    assert set(SHAPES) == {*CASES, "constant", "cosine_warmup_with_min_lr"}


@pytest.mark.covers("scheduler.warmup_ratio")
@pytest.mark.parametrize(("ratio", "want"), [(None, 2), (0.0, 0), (0.55, 11)])
def test_warmup_is_a_share_of_the_horizon(ratio, want):
    assert HFSchedulerConfig(warmup_ratio=ratio).warmup_updates(HORIZON) == want
