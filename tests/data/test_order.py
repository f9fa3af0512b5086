"""Batches are a function of the position: of nothing else, and whoever asks."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.data.order import permutation, sample
from jaxtrain.data.plan import BatchPlan, BatchShape, Origin
from tests.data.made import are_equal, documents_of, joined, of_processes, plan_of

MICROBATCHES, ROWS = 2, 4
GOLDEN_ORDER = [0, 2, 7, 6, 4, 3, 5, 1]
GOLDEN_SAMPLE = [1, 2, 6]


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> BatchPlan:
    """20 rows of one or several documents, 8 rows an update: 3 updates an epoch, the last short."""
    documents = documents_of([5 + n % 7 for n in range(60)], tmp_path_factory.mktemp("documents"))
    plan = plan_of(documents, capacity=24, shape=BatchShape(MICROBATCHES, ROWS))
    assert plan.packing.num_sequences % 8 and plan.steps_per_epoch == -(
        -plan.packing.num_sequences // 8
    )
    return plan


def test_orders_never_change():
    # Written down once: a change here reorders the runs of everyone who resumes.
    assert permutation(8, 2, 42, 0).tolist() == GOLDEN_ORDER
    assert sample(10, 3, 1, 42).tolist() == GOLDEN_SAMPLE


@pytest.mark.parametrize("step", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_have_the_batch_of_one(plan, step, processes):
    parts = [part.batch(part.advance(0, step)) for part in of_processes(plan, processes)]
    assert parts[0].tokens.shape == (MICROBATCHES, ROWS // processes, 24)
    assert are_equal(joined(parts), plan.batch(plan.advance(0, step)))


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("start", [1, 2, 3, 5])
def test_starting_at_an_update_gives_the_rest_of_the_unbroken_run(plan, start, threads):
    """Traps A7 and, without threads, A25."""
    unbroken = [plan.batch(plan.advance(0, step)) for step in range(7)]
    resumed = list(plan.batches(plan.advance(0, start), 7 - start, threads))
    assert len(resumed) == 7 - start
    assert all(are_equal(a, b) for a, b in zip(unbroken[start:], resumed, strict=True))


@pytest.fixture(scope="module")
def long_order(plan) -> np.ndarray:
    """The sequences of 30 epochs."""
    return np.concatenate([epoch_rows(plan, n)[: plan.epoch_sequences] for n in range(30)])


@given(st.integers(0, 70), st.integers(1, 13), st.integers(0, 30))
def test_steps_of_any_size_go_on_with_the_next_sequence_and_end_with_the_epoch(
    plan, long_order, position, size, steps
):
    total = plan.epoch_sequences
    other = replace(plan, shape=BatchShape(1, size))
    walked = [position]
    for _ in range(steps):
        rows = other.sequence_numbers(walked[-1]).ravel()
        walked.append(other.advance(walked[-1]))
        taken = rows[rows >= 0]
        assert taken.tolist() == long_order[walked[-2] : walked[-1]].tolist()
        assert len(taken) == size or walked[-1] % total == 0
    assert other.advance(position, steps) == walked[-1]
    end = other.advance(position, other.steps_left(position))
    assert end == (position // total + 1) * total


def test_without_an_end_the_batches_go_on(plan):
    batches = plan.batches(0, None, threads=2)
    seen = [next(batches) for _ in range(10)]
    assert are_equal(seen[9], plan.batch(plan.advance(0, 9)))


def epoch_rows(plan, epoch):
    batches = plan.batches(epoch * plan.epoch_sequences, plan.steps_per_epoch, threads=0)
    return np.concatenate([batch.rows.ravel() for batch in batches])


def test_a8_every_epoch_is_complete_and_in_another_order(plan):
    orders = [epoch_rows(plan, epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order[order >= 0]) == list(range(plan.packing.num_sequences))
        assert (
            order[plan.packing.num_sequences :] == -1
        ).all()  # filler stands behind the last row
    assert len({tuple(order) for order in orders}) == 3


def test_an_epoch_may_take_all_rows_several_times(plan):
    assert plan.repeat(0).passes == plan.repeat(3).passes == 1
    for wanted in (4, 5, 6, 100):
        repeated = plan.repeat(wanted)
        fewer = (repeated.passes - 1) * plan.packing.num_sequences // 8
        assert repeated.steps_per_epoch >= wanted > fewer
    repeated = plan.repeat(4)
    assert repeated.passes == 2 and repeated.steps_per_epoch == -(
        -2 * plan.packing.num_sequences // 8
    )
    copies = [epoch_rows(repeated, epoch)[: 2 * plan.packing.num_sequences] for epoch in (0, 1)]
    orders = [tuple(order) for copy in copies for order in np.split(copy, 2)]
    assert orders == [tuple(epoch_rows(plan, n)[: plan.packing.num_sequences]) for n in range(4)]


def test_other_seeds_have_other_orders(plan):
    other = BatchPlan(plan.documents, plan.packing, plan.shape, plan.lengths, seed=7)
    assert tuple(epoch_rows(other, 0)) != tuple(epoch_rows(plan, 0))


def test_without_a_seed_rows_keep_their_order(plan):
    evaluation = BatchPlan(plan.documents, plan.packing, plan.shape, plan.lengths, seed=None)
    order = epoch_rows(evaluation, 0)
    assert order[: plan.packing.num_sequences].tolist() == list(range(plan.packing.num_sequences))


def test_an_update_is_cut_into_microbatches_first(plan):
    batch = plan.batch(0)
    assert batch.tokens.shape == (MICROBATCHES, ROWS, 24)
    assert batch.rows.ravel().tolist() == plan.sequence_numbers(0).ravel().tolist()


def test_a38_packed_documents_are_apart(plan):
    batch = plan.batch(0)
    for row, tokens, positions, segments, weights in zip(
        batch.rows.ravel(), *(leaf.reshape(-1, 24) for leaf in batch[:4]), strict=True
    ):
        filled = segments > 0
        starts = np.flatnonzero(np.diff(segments, prepend=0) * filled)
        assert segments[starts].tolist() == list(range(1, len(starts) + 1))
        assert (weights[starts] == 0).all()
        for segment in segments[starts]:
            own = positions[segments == segment]
            assert own.tolist() == list(range(len(own)))
        assert not tokens[~filled].any() and not weights[~filled].any()
        origins = plan.origins(int(row))
        assert [Origin(0, tokens[start] - 100) for start in starts] == origins


@pytest.mark.parametrize("length", range(1, 25))
def test_a_step_has_the_shortest_length_that_holds_its_longest_sequence(tmp_path, length):
    documents = documents_of([length, 1], tmp_path)
    plan = plan_of(documents, capacity=length, shape=BatchShape(1, 2))
    batch = replace(plan, lengths=(8, 16, 24)).batch(0)
    assert batch.tokens.shape[-1] == -(-length // 8) * 8


def test_filler_rows_hold_nothing(plan):
    batch = plan.batch(plan.advance(0, plan.steps_per_epoch - 1))
    filler = batch.rows == -1
    assert filler.any()
    assert not any(leaf[filler].any() for leaf in batch[:4])


def test_leaves_have_the_types_that_the_step_expects(plan):
    kinds = [leaf.dtype.name for leaf in jax.tree.leaves(plan.batch(0))]
    assert kinds == ["int32", "int32", "int32", "float32", "int32"]
