"""Batches of as many sequences as fit into a number of tokens."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.data import BatchShape, SFTDataFactory
from jaxtrain.data.documents import INDEX_DTYPE, Documents
from jaxtrain.data.packing import pack
from jaxtrain.data.token_batches import TokenBatchPlan
from jaxtrain.recipe.data import SFTDataConfig
from jaxtrain.recipe.errors import DataError
from jaxtrain.recipe.resolve import resolve
from tests.data.made import are_equal, chats, joined, of_processes
from tests.tiny import tiny_tokenizer


def plan_of(lengths, *, buckets, tokens, shards, together=1, microbatches=1, seed=42, passes=1):
    lengths, chosen = np.array(lengths), np.arange(len(lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    content = np.arange(1, offsets[-1] + 1, dtype=np.int32)  # each says where it belongs
    weights, index = np.ones(len(content), np.uint8), np.zeros(len(lengths), INDEX_DTYPE)
    return TokenBatchPlan(
        Documents(content, weights, offsets, index), pack(lengths, 64, "none", chosen),
        BatchShape(microbatches, shards * together), buckets, seed,
        together=together, passes=passes, batch_tokens=tokens,
    )  # fmt: skip


PLANS = st.builds(
    plan_of,
    st.lists(st.integers(1, 64), min_size=2, max_size=120).map(lambda n: n[: len(n) // 2 * 2]),
    buckets=st.sampled_from([(64,), (16, 64), (8, 24, 48, 64), (60, 61, 64)]),
    tokens=st.integers(128, 700),
    shards=st.sampled_from([1, 2, 4]),
    together=st.sampled_from([1, 2]),
    microbatches=st.integers(1, 3),
    seed=st.sampled_from([None, 0, 7]),
    passes=st.integers(1, 2),
)


@settings(max_examples=40, deadline=None)
@given(PLANS)
def test_an_epoch_has_every_sequence_once_in_full_steps_of_few_shapes(plan):
    batches = list(plan.batches(0, plan.steps_per_epoch, threads=0))
    numbers = [number for batch in batches for number in batch.rows.ravel().tolist() if number >= 0]
    assert sorted(numbers) == sorted([*range(plan.packing.num_sequences)] * plan.passes)
    shapes, short = set(), 0
    for batch in batches:
        pieces, rows, length = batch.tokens.shape
        shapes.add((rows, length))
        tokens_of_shard = rows // (plan.shape.sequences // plan.together) * length
        assert pieces == plan.shape.microbatches and rows % plan.shape.sequences == 0
        assert tokens_of_shard <= plan.batch_tokens < tokens_of_shard + plan.together * length
        held = (batch.segments > 0).sum(axis=-1)
        assert (held[batch.rows >= 0] == plan._sequence_lengths[batch.rows[batch.rows >= 0]]).all()
        short += bool((batch.rows < 0).any())
        pairs = batch.rows.reshape(-1, plan.together)
        assert (np.diff(pairs, axis=1) == np.where(pairs[:, 1:] < 0, 0, 1)).all()
    assert len(shapes) <= len(plan.lengths) and short <= 1
    places = sum(int((batch.rows >= 0).sum()) * batch.tokens.shape[-1] for batch in batches)
    tokens = sum(int((batch.segments > 0).sum()) for batch in batches)
    assert plan.fill == pytest.approx(tokens / places)


@settings(max_examples=40, deadline=None)
@given(PLANS, st.integers(0, 30))
def test_a_position_is_all_that_a_batch_depends_on(plan, steps):
    """Also across the end of an epoch, on another plan of the same, and on several hosts."""
    expected = list(plan.batches(0, steps + 3, threads=0))
    position = 0
    for step in range(steps):
        assert plan.advance(0, step) == position
        left, position = plan.steps_left(position), plan.advance(position)
        assert left == (plan.steps_left(position) + 1 if left > 1 else 1)
    again = replace(plan)
    hosts = of_processes(again, 2) if plan.shape.sequences % 2 == 0 else [again]
    parts = [list(host.batches(position, 3, threads=0)) for host in hosts]
    for expectation, batches in zip(expected[steps:], zip(*parts, strict=True), strict=True):
        assert are_equal(joined(batches), expectation)
    orders = [plan.sequence_numbers(epoch * plan.epoch_sequences).tolist() for epoch in range(2)]
    assert plan.seed is not None or orders[0] == orders[1]


@settings(max_examples=40, deadline=None)
@given(PLANS.map(lambda plan: replace(plan, passes=1)), st.integers(0, 60))
def test_passes_fill_the_steps_that_are_asked_for(plan, steps):
    repeated = plan.repeat(steps)
    assert repeated.steps_per_epoch >= steps
    fewer = repeated.passes - 1
    assert not fewer or replace(plan, passes=fewer).steps_per_epoch < steps


def prepared(sources, **keys):
    config = SFTDataConfig(sources=("x",), **keys)
    return SFTDataFactory(config, tiny_tokenizer(), 512).prepare(sources, {}, BatchShape(1, 2))


def test_sequences_of_one_length_leave_less_padding_than_those_of_a_step(tmp_path, cache):
    sources = lambda: [chats(tmp_path, "one", 120, words=120)]
    keys = {"div_length": 32, "max_length_buckets": 4}
    plain, filled = (
        prepared(sources(), **keys).train,
        prepared(sources(), batch_tokens=1024, **keys),
    )
    assert filled.train.fill > plain.fill and 1 < len(filled.train.lengths) <= 4
    (counts,) = filled.ledger.sets
    assert counts.steps == filled.steps_per_epoch and counts.sequences == plain.epoch_sequences


def test_epochs_that_draw_anew_are_counted_one_by_one(tmp_path, cache):
    sources = [
        chats(tmp_path, "one", 300, words=120, weight=1),
        chats(tmp_path, "two", 20, weight=3),
    ]
    plan = prepared(sources, batch_tokens=256, div_length=16).train
    counts = [plan.steps_left(epoch * plan.epoch_sequences) for epoch in range(6)]
    assert len(set(counts)) > 1
    assert plan.count_uneven_steps(6) == sum(counts) - 6 * plan.steps_per_epoch


def test_a_sequence_that_no_batch_holds_is_named(tmp_path, cache):
    with pytest.raises(
        DataError, match=r"batch_tokens: 32 holds no sequence of \d+ tokens; write at"
    ):
        prepared([chats(tmp_path, "one", 9, words=60)], batch_tokens=32, div_length=32)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"max_length": 8192}, "data.batch_tokens: 4096 may hold no sequence of max_length 8192"),
        ({"pack_samples": True}, "data.batch_tokens: has no effect: all sequences have max_"),
        ({"pad_to": "max_length"}, "data.batch_tokens: has no effect: all sequences have"),
        (
            {"type": "causal"},
            "data.batch_tokens: has no effect: all sequences have max_length",
        ),
        ({"micro_batch_size": 4}, "micro_batch_size: excludes data.batch_tokens, found 4; remove"),
        (
            {"deepspeed": {"train_batch_size": 8}},
            "deepspeed.train_batch_size: excludes data.batch_tokens, whose steps have different",
        ),
    ],
)
def test_what_else_says_how_large_a_batch_is_is_refused(change, fault):
    top = {key: change[key] for key in ("type", "micro_batch_size", "deepspeed") if key in change}
    data = {"sources": ["a/b"], "batch_tokens": 4096} | {k: change[k] for k in change.keys() - top}
    faults = resolve({"model": {"name_or_path": "m"}, "data": data, **top}).faults
    (found,) = (f"{one.key}: {one.what}" for one in faults)
    assert found.startswith(fault)
