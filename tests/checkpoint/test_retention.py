"""What is on disk after each save."""

import math

import jax.numpy as jnp
import pytest

from jaxtrain.checkpoint import OrbaxEngine
from jaxtrain.checkpoint.retention import ranked, retained
from jaxtrain.recipe.checkpoint import OrbaxConfig
from jaxtrain.trainer.state import TrainState

NAN = math.nan
# Scores of steps 1, 2, … → the steps on disk after each save, with the last 2 and the best 1 kept.
CASES = {
    "rising": ([1, 2, 3, 4], [[1], [1, 2], [1, 2, 3], [1, 3, 4]]),
    "falling": ([4, 3, 2, 1], [[1], [1, 2], [2, 3], [3, 4]]),
    "tied": ([2, 2, 2, 2], [[1], [1, 2], [1, 2, 3], [1, 3, 4]]),
    "first best": ([1, 5, 4, 3, 2], [[1], [1, 2], [1, 2, 3], [1, 3, 4], [1, 4, 5]]),
    "nan": ([3, NAN, NAN, NAN], [[1], [1, 2], [1, 2, 3], [1, 3, 4]]),
    "only nan": ([NAN, NAN, NAN], [[1], [1, 2], [2, 3]]),
    "zero": ([1, 0.0, 2, 3], [[1], [1, 2], [2, 3], [2, 3, 4]]),
    "missing": ([2, None, None, 1, 5, 6], [[1], [1, 2], [1, 2, 3], [3, 4], [4, 5], [4, 5, 6]]),
}


class Run:
    """What an engine asks of a trainer."""

    lineage: dict = {}
    callback_states: dict = {}

    def __init__(self):
        self.global_step = 0
        self.state = TrainState(jnp.int32(0), {"w": jnp.ones(3)}, {}, ())


def engine(folder, **config):
    entry = OrbaxConfig(type="orbax", output_dir=str(folder), **config)
    return OrbaxEngine(entry, Run())


def listed(folder):
    return sorted(int(p.name.removeprefix("global_step_")) for p in folder.glob("global_step_*"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("restarted", [False, True], ids=["one process", "a process each"])
def test_the_last_and_the_best_stay(tmp_path, case, restarted):
    scores, expected = CASES[case]
    saver = engine(tmp_path, keep_last_n=2, keep_best_n=1)
    for step, (score, kept) in enumerate(zip(scores, expected, strict=True), start=1):
        if restarted:
            saver = engine(tmp_path, keep_last_n=2, keep_best_n=1)
        saver.trainer.global_step = step
        saver.note_score(step, {} if score is None else {"eval/loss": score})
        saver.save(None)
        saver.wait()
        assert listed(tmp_path) == kept, f"after step {step}"
    assert saver.steps() == expected[-1]


def test_larger_is_better_when_the_metric_says_so():
    scores = {1: 0.1, 2: 0.9, 3: 0.9, 4: 0.2}
    assert ranked([1, 2, 3, 4], scores, "max") == [2, 3, 4, 1]
    assert retained([1, 2, 3, 4], scores, keep_last_n=1, keep_best_n=1, mode="max") == {2, 4}


def test_everything_stays_when_no_limit_is_written():
    assert retained([1, 2, 3], {}, keep_last_n=None, keep_best_n=0, mode="min") == {1, 2, 3}
