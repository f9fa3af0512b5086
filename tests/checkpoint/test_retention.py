"""What is on disk after each save."""

import json
import math
import os

import pytest
from engines import engine, listed, saved

from jaxtrain.checkpoint.retention import ranked, retained

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
# The same with every second step kept for ever.
EVERY_SECOND = {
    "rising": [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]],
    "falling": [[1], [1, 2], [2, 3], [2, 3, 4]],
    "tied": [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]],
    "first best": [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 4, 5]],
    "nan": [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]],
    "only nan": [[1], [1, 2], [2, 3]],
    "zero": [[1], [1, 2], [2, 3], [2, 3, 4]],
    "missing": [[1], [1, 2], [1, 2, 3], [2, 3, 4], [2, 4, 5], [2, 4, 5, 6]],
}


def save_scored(saver, step, score):
    saver.note_score(step, {} if score is None else {"eval/loss": score})
    saver.save(saver.run.snapshot(step))
    saver.wait()


@pytest.mark.covers(
    "checkpoint.*.keep_every_n_steps", "checkpoint.*.keep_last_n", "checkpoint.*.keep_best_n"
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("every", [0, 2], ids=["", "every second"])
@pytest.mark.parametrize("restarted", [False, True], ids=["one process", "a process each"])
def test_the_last_the_best_and_every_nth_stay(tmp_path, case, every, restarted):
    """Traps F7, F13, G1, G2, G9."""
    scores, expected = CASES[case]
    expected = EVERY_SECOND[case] if every else expected
    config = {"keep_last_n": 2, "keep_best_n": 1}
    if every:
        config |= {"keep_every_n_steps": every, "save_every_n_steps": 1}
    saver = engine(tmp_path, **config)
    for step, (score, kept) in enumerate(zip(scores, expected, strict=True), start=1):
        if restarted:
            saver = engine(tmp_path, **config)
        save_scored(saver, step, score)
        assert listed(tmp_path) == kept, f"after step {step}"
    assert saver.steps() == expected[-1] and saver.latest() == expected[-1][-1]
    best = [s for s in ranked(range(1, 7), saver.scores(), "min") if s in saver.steps()]
    assert saver.best() == (best[0] if best else None)


def test_the_best_of_a_metric_that_rises_are_its_largest(tmp_path):
    """Trap G1, in the other direction."""
    saver = engine(tmp_path, keep_last_n=1, keep_best_n=2, metric="eval/token_accuracy")
    for step, score in enumerate([0.5, 0.3, 0.4, 0.5, 0.9, 0.1], start=1):
        saver.note_score(step, {"eval/token_accuracy": score, "eval/loss": -step})
        saver.save(saver.run.snapshot(step))
        saver.wait()
    assert listed(tmp_path) == [1, 5, 6]


@pytest.mark.covers("checkpoint.*.mode")
def test_larger_is_better_when_the_metric_says_so():
    scores = {1: 0.1, 2: 0.9, 3: 0.9, 4: 0.2}
    assert ranked([1, 2, 3, 4], scores, "max") == [2, 3, 4, 1]
    kept = retained(
        [1, 2, 3, 4], scores, keep_last_n=1, keep_best_n=1, keep_every_n_steps=0, mode="max"
    )
    assert kept == {2, 4}


def test_everything_stays_when_no_limit_is_written():
    kept = retained([1, 2], {}, keep_last_n=None, keep_best_n=0, keep_every_n_steps=0, mode="min")
    assert kept == {1, 2}


def test_the_number_counts_and_not_the_time_of_a_file(tmp_path):
    """Trap G12: copied folders keep their order."""
    saved(tmp_path, [9, 10, 11])
    for step, time in ((9, 30), (10, 20), (11, 10)):
        os.utime(tmp_path / f"global_step_{step}", (time, time))
    saver = saved(tmp_path, [12], keep_last_n=2)
    assert listed(tmp_path) == [11, 12] and saver.latest() == 12


def test_the_score_of_an_evaluation_without_a_save_is_kept(tmp_path):
    """Trap F10."""
    saver = engine(tmp_path, keep_last_n=1, keep_best_n=1)
    saver.note_score(1, {"eval/loss": 3.0, "eval/other/loss": 9.0})
    save_scored(saver, 2, 4.0)
    assert saver.scores() == {1: 3.0, 2: 4.0} and saver.best() == 2
    assert json.loads((tmp_path / "scores.json").read_text()) == {"1": 3.0, "2": 4.0}
    assert saver.metadata(2)["scores"] == {"1": 3.0, "2": 4.0}


def test_a_run_that_starts_before_a_score_forgets_it(tmp_path):
    saver = engine(tmp_path)
    for step in (1, 2, 3):
        saver.note_score(step, {"eval/loss": 1.0})
    saver.begin(2)
    assert saver.scores() == {1: 1.0, 2: 1.0}
