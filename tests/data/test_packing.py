import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.data.packing import best_fit, next_fit, plan_rows

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=200)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.sampled_from(["best_fit", "next_fit", "none"]))
def test_no_row_is_too_long_and_every_token_stands_once(lengths, rule):
    lengths = np.array(lengths)
    chosen = np.flatnonzero(np.arange(len(lengths)) % 3 != 1)
    plan = plan_rows(lengths, 64, rule, chosen)
    assert sorted(plan.documents) == chosen.tolist()
    assert (plan.lengths == lengths[plan.documents]).all() and not plan.starts.any()
    assert plan.row_lengths.max() <= 64 and plan.row_lengths.sum() == lengths[chosen].sum()
    assert (np.diff(plan.offsets) > 0).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=80), st.sampled_from([3000, 4096]))
def test_best_fit_takes_the_tightest_row_as_the_plain_rule_does(lengths, capacity):
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    rows = best_fit(np.array(lengths), capacity)
    fills = np.bincount(rows, weights=lengths)
    assert sorted(capacity - fills) == sorted(rooms)


@settings(max_examples=50, deadline=None)
@given(LENGTHS)
def test_next_fit_keeps_the_order_and_opens_a_row_only_when_it_must(lengths):
    rows = next_fit(np.array(lengths), 64).tolist()
    assert rows == sorted(rows)
    for row in range(1, rows[-1] + 1):
        before = sum(n for n, r in zip(lengths, rows, strict=True) if r == row - 1)
        assert before + lengths[rows.index(row)] > 64


def test_a4_best_fit_fills_rows_of_short_documents():
    lengths = np.random.default_rng(0).integers(5, 200, 20_000)
    plan = plan_rows(lengths, 512, "best_fit", np.arange(len(lengths)))
    assert plan.row_lengths.sum() / (plan.num_rows * 512) > 0.999


def test_rows_stand_in_the_order_of_their_documents():
    plan = plan_rows(np.array([6, 3, 8, 2, 5]), 8, "best_fit", np.arange(5))
    firsts = plan.documents[plan.offsets[:-1]]
    assert firsts.tolist() == sorted(firsts.tolist())


def test_a_document_longer_than_a_row_is_our_fault():
    with pytest.raises(AssertionError):
        plan_rows(np.array([9]), 8, "best_fit", np.arange(1))


@settings(max_examples=60, deadline=None)
@given(LENGTHS)
def test_a4_no_two_packs_of_the_whole_set_would_fit_into_one(lengths):
    plan = plan_rows(np.array(lengths), 64, "best_fit", np.arange(len(lengths)))
    assert np.sort(plan.row_lengths)[:2].sum() > 64 or plan.num_rows == 1
