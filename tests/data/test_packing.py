from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.data.documents import INDEX_DTYPE, Documents
from jaxtrain.data.packing import best_fit, choose_lengths, cut_documents, next_fit, pack
from jaxtrain.data.plan import BatchPlan, BatchShape

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=200)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.sampled_from(["best_fit", "next_fit", "none"]))
def test_no_row_is_too_long_and_every_token_stands_once(lengths, rule):
    lengths = np.array(lengths)
    chosen = np.flatnonzero(np.arange(len(lengths)) % 3 != 1)
    plan = pack(lengths, 64, rule, chosen)
    assert sorted(plan.documents) == chosen.tolist()
    assert (plan.lengths == lengths[plan.documents]).all() and not plan.starts.any()
    found = plan.sequence_lengths
    assert found.max() <= 64 and found.sum() == lengths[chosen].sum()
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
    plan = pack(lengths, 512, "best_fit", np.arange(len(lengths)))
    assert plan.sequence_lengths.sum() / (plan.num_sequences * 512) > 0.999


def test_rows_stand_in_the_order_of_their_documents():
    plan = pack(np.array([6, 3, 8, 2, 5]), 8, "best_fit", np.arange(5))
    firsts = plan.documents[plan.offsets[:-1]]
    assert firsts.tolist() == sorted(firsts.tolist())


def test_a_document_longer_than_a_row_is_our_fault():
    with pytest.raises(AssertionError):
        pack(np.array([9]), 8, "best_fit", np.arange(1))


@settings(max_examples=60, deadline=None)
@given(LENGTHS)
def test_a4_no_two_packs_of_the_whole_set_would_fit_into_one(lengths):
    plan = pack(np.array(lengths), 64, "best_fit", np.arange(len(lengths)))
    assert np.sort(plan.sequence_lengths)[:2].sum() > 64 or plan.num_sequences == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 3))
def test_no_other_lengths_leave_less_padding_to_random_updates(lengths, count, step_sequences):
    found = choose_lengths(
        np.array(lengths), step_sequences=step_sequences, multiple=100, max_length=850, count=count
    )
    updates = [max(rows) for rows in product(np.minimum(lengths, 850), repeat=step_sequences)]

    def places(lengths):
        return sum(min(tokens for tokens in lengths if tokens >= longest) for longest in updates)

    assert len(found) <= count and sorted(set(found)) == list(found)
    last = min(-(-max(lengths) // 100) * 100, 850)
    others = [tokens for tokens in range(100, last, 100) if tokens >= min(128, max(lengths))]
    best = min(
        places((*chosen, last))
        for n in range(count)
        for chosen in combinations(others, min(n, len(others)))
    )
    assert places(found) == best or places(found) < best * (1 + 1e-6)


@settings(max_examples=60, deadline=None)
@given(
    LENGTHS,
    st.sampled_from(["best_fit", "next_fit", "none", "slices"]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 9),
)
def test_a38_an_epoch_of_batches_is_its_documents_once_and_apart(lengths, rule, m, rows, seed):
    """Over random documents, rules, shapes and seeds: every token once, with its weight but for
    the first of each piece, at its place in the document, and in a segment of its own."""
    lengths, total = np.array(lengths), sum(lengths)
    random = np.random.default_rng(seed)
    tokens = np.arange(1, total + 1, dtype=np.int32)  # so that each says where it belongs
    weights = random.integers(0, 2, total).astype(np.uint8)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    documents = Documents(tokens, weights, offsets, np.zeros(len(lengths), INDEX_DTYPE))
    chosen = np.arange(len(lengths))
    planned = (
        cut_documents(lengths, 64, chosen) if rule == "slices" else pack(lengths, 64, rule, chosen)
    )
    plan = BatchPlan(documents, planned, BatchShape(m, rows), (64,), seed)
    batches = list(plan.batches(0, plan.steps_per_epoch, threads=0))
    leaves = [np.concatenate([leaf.reshape(-1, 64) for leaf in part])
              for part in zip(*(batch[:4] for batch in batches), strict=True)]  # fmt: skip
    seen, places, segments, trained = leaves
    filled = segments > 0
    assert sorted(seen[filled]) == tokens.tolist() and not seen[~filled].any()
    firsts = np.diff(segments, prepend=0, axis=1) > 0
    expected = np.where(firsts, 0, weights[seen - 1]) * filled
    assert (trained == expected).all()
    owner = np.searchsorted(offsets, seen - 1, side="right")
    same_segment = (segments[:, 1:] == segments[:, :-1]) & filled[:, 1:]
    assert (same_segment == ((owner[:, 1:] == owner[:, :-1]) & filled[:, 1:])).all()
    assert (np.diff(places, axis=1)[same_segment] == 1).all() and not places[firsts].any()
