"""Keys that decide which documents share an epoch and a row."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.data import (
    BatchShape,
    CausalDataFactory,
    SFTDataFactory,
)
from jaxtrain.data.order import mix_sources
from jaxtrain.data.packing import cut_documents
from jaxtrain.recipe.data import (
    CausalDataConfig,
    SFTDataConfig,
)
from jaxtrain.recipe.errors import DataError
from jaxtrain.recipe.resolve import get_config
from tests.data.made import all_rows, are_equal, chats, joined, of_processes, sft, texts
from tests.tiny import TEXTS, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("cache")


# Mixtures.


@pytest.mark.covers("data.sources.*.weight")
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0.1, 9)), min_size=1, max_size=5))
def test_shares_are_met_and_no_document_is_favoured(parts):
    sources = np.repeat(np.arange(len(parts)), [count for count, _ in parts])
    chosen, weights = np.arange(len(sources)), [weight for _, weight in parts]
    whole, drawn = mix_sources(chosen, sources, weights)
    assert len(whole) + sum(count for _, count in drawn) == len(chosen)  # an epoch keeps its length
    rest = {int(sources[own[0]]): (own, count) for own, count in drawn}
    for number, weight in enumerate(weights):
        times = np.bincount(whole, minlength=len(sources))[sources == number]
        own, count = rest.get(number, ((), 0))
        assert abs(times.sum() + count - weight / sum(weights) * len(chosen)) <= 1
        assert times.max() == times.min()
        assert not count or own.tolist() == np.flatnonzero(sources == number).tolist()


def epochs_of(plan, count):
    """The documents of each of so many epochs, rising."""
    epochs = []
    for epoch in range(count):
        batches = plan.batches(epoch * plan.epoch_sequences, plan.steps_per_epoch, threads=0)
        numbers = np.concatenate([batch.rows.ravel() for batch in batches])
        pieces = [piece for n in numbers[numbers >= 0].tolist() for piece in plan.pieces(n)]
        epochs.append(sorted(plan.packing.documents[pieces].tolist()))
    return epochs


@pytest.mark.parametrize("keys", [{}, {"pack_samples": True, "max_length": 96}], ids=str)
def test_every_epoch_draws_anew(tmp_path, keys):
    sources = [chats(tmp_path, "few", 10, weight=1), chats(tmp_path, "many", 90, weight=1)]
    data = sft(sources, **keys)
    epochs = epochs_of(data.train, 12)
    large = [[document for document in epoch if document >= 10] for epoch in epochs]
    for epoch, drawn in zip(epochs, large, strict=True):
        assert [epoch.count(document) for document in range(10)] == [5] * 10
        assert len({*drawn}) == len(drawn) and abs(len(drawn) - 50) <= (8 if keys else 0)
    assert len({tuple(drawn) for drawn in large}) == 12
    assert {*range(10, 100)} == {document for drawn in large for document in drawn}
    told = [line.split(", from")[0] for line in data.ledger.notes if line.startswith("mixture")]
    assert told == [
        f"mixture: an epoch has 50 documents of {name} (50.0%)" for name in ("few", "many")
    ]
    repeated = data.train.repeat(12 * data.steps_per_epoch)  # its passes draw anew too
    assert {*epochs_of(repeated, 1)[0]} == {*range(100)}


@pytest.mark.covers("data.seed")
def test_a_mixture_is_the_same_each_time_and_another_by_seed(tmp_path):
    sources = [chats(tmp_path, "one", 30, weight=1), chats(tmp_path, "two", 30, weight=3)]
    drawn = [epochs_of(sft(sources, seed=seed).train, 3) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    data = sft(sources, train_eval_split=(0.5, 0.5))
    train = {*data.train.packing.documents.tolist()}
    assert not train & {*data.evals["eval"].packing.documents.tolist()}


def test_the_ledger_counts_what_a_mixture_trains(tmp_path):
    data = sft([chats(tmp_path, "one", 5, weight=9), chats(tmp_path, "two", 45, weight=1)])
    batches = list(data.train_batches(0, data.steps_per_epoch))
    assert data.ledger.sets[0].trained_tokens == sum(b.loss_weights.sum() for b in batches)
    assert data.ledger.sets[0].sequences == 50
    assert data.ledger.sets[0].documents == 10  # five of one nine times, five of the other once


@pytest.mark.covers("data.eval_sources")
def test_named_eval_sets(tmp_path):
    math, talk = chats(tmp_path, "math", 3), chats(tmp_path, "talk", 5)
    data = sft([chats(tmp_path, "one", 4)], evals={"math": [math], "talk": [talk]})
    counts = {name: plan.packing.num_sequences for name, plan in data.evals.items()}
    assert counts == {"math": 3, "talk": 5}
    named = {"math": ["m.jsonl"], "talk": "t.jsonl:eval[:5]"}
    config = get_config({
        "model": {"name_or_path": "m"}, "eval_interval": 1,
        "data": {"sources": ["a.jsonl"], "eval_sources": named},
    })  # fmt: skip
    ((one,), (other,)) = config.data.eval_sets.values()
    assert (one.split, other.path, other.split) == ("eval", "t.jsonl", "eval[:5]")


def test_an_eval_set_named_train_is_not_trained(tmp_path):
    data = sft([chats(tmp_path, "one", 4)], evals={"train": [chats(tmp_path, "two", 7)]})
    assert data.train.packing.num_sequences == 4 and data.evals["train"].packing.num_sequences == 7
    assert [(counts.label, counts.sequences) for counts in data.ledger.sets] == [
        ("train", 4),
        ("train", 7),
    ]


# Packing.


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 30))
def test_slices_are_full_and_hold_every_token_once_in_order(lengths, capacity):
    lengths = np.array(lengths)
    chosen = np.arange(len(lengths))[::-1]
    plan = cut_documents(lengths, capacity, chosen)
    *full, last = plan.sequence_lengths
    assert set(full) <= {capacity} and 0 < last <= capacity
    found = [
        (document, token)
        for document, start, length in zip(*plan[:3], strict=True)
        for token in range(start, start + length)
    ]
    assert found == [(document, t) for document in chosen for t in range(lengths[document])]


@pytest.mark.covers("data.always_max_length")
def test_a3_always_max_length_fills_each_pack_and_splits_the_row_that_is_over(tmp_path):
    source = chats(tmp_path, "one", 40)
    data = sft([source], pack_samples=True, always_max_length=True, max_length=50)
    rows = data.train.packing
    assert (rows.sequence_lengths[:-1] == 50).all() and rows.sequence_lengths[-1] <= 50
    assert rows.sequence_lengths.sum() == data.train.documents.lengths.sum()
    assert rows.starts.any()  # some are split
    batch = all_rows(data.train)
    assert data.ledger.sets[0].trained_tokens == batch.loss_weights.sum()
    firsts = np.diff(batch.segments, axis=1, prepend=0) > 0
    assert not batch.loss_weights[firsts].any() and not batch.positions[firsts].any()


@pytest.mark.covers("data.drop_last")
@pytest.mark.parametrize(
    "keys", [{}, {"packing": "next_fit"}, {"always_max_length": True}], ids=str
)
def test_drop_last_drops_one_short_pack(tmp_path, keys):
    source = chats(tmp_path, "one", 41)
    kept = sft([source], pack_samples=True, max_length=64, **keys).train.packing
    rest = sft([source], pack_samples=True, max_length=64, drop_last=True, **keys).train.packing
    assert len(rest.offsets) == rest.num_sequences + 1 == kept.num_sequences
    last = kept.sequence_lengths.min() if not keys else kept.sequence_lengths[-1]
    assert kept.sequence_lengths.sum() - rest.sequence_lengths.sum() == last < 64
    with pytest.raises(DataError, match="drop_last would drop the only pack"):
        sft([source], pack_samples=True, max_length=9999, drop_last=True, **keys)


@pytest.mark.covers("data.fuse_positions_prob")
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_fused_packs_are_one_sequence(tmp_path, share):
    keys = {"pack_samples": True, "max_length": 96, "fuse_positions_prob": share}
    source = chats(tmp_path, "one", 400)
    data = sft([source], evals={"eval": [source]}, **keys)
    batch, plain = (
        all_rows(data.train),
        all_rows(sft([source], pack_samples=True, max_length=96).train),
    )
    fused = (batch.segments.max(axis=1) == 1) & (plain.segments.max(axis=1) > 1)
    assert abs(fused.mean() - share) < 0.15
    lengths = data.train.packing.sequence_lengths
    for row in np.flatnonzero(fused):
        assert batch.positions[row, : lengths[row]].tolist() == list(range(lengths[row]))
    assert (batch.tokens == plain.tokens).all() and (batch.loss_weights == plain.loss_weights).all()
    assert (batch.segments[~fused] == plain.segments[~fused]).all()
    in_order = all_rows(data.evals["eval"])  # nothing is fused where losses are compared
    assert (in_order.segments == plain.segments).all()


@pytest.mark.covers("data.repeat_to_pack_max_length")
def test_a_small_set_is_repeated_into_one_pack(tmp_path):
    source = chats(tmp_path, "one", 3)
    alone = sft([source], pack_samples=True, max_length=1000)
    data = sft([source], pack_samples=True, max_length=1000, repeat_to_pack_max_length=True)
    times = 1000 // alone.train.packing.sequence_lengths.sum()
    assert data.train.packing.num_sequences == 1 and times > 1
    assert data.train.packing.sequence_lengths[0] == times * alone.train.packing.sequence_lengths[0]
    longer = sft([source], pack_samples=True, max_length=30, repeat_to_pack_max_length=True)
    assert longer.train.packing.sequence_lengths.sum() == alone.train.packing.sequence_lengths.sum()


@pytest.mark.parametrize(
    "key", ["always_max_length", "drop_last", "repeat_to_pack_max_length", "fuse_positions_prob"]
)
def test_keys_of_packs_need_packs(key):
    with pytest.raises(ValueError, match=f"{key}: needs pack_samples: true"):
        SFTDataConfig(sources=("x",), **{key: True if key != "fuse_positions_prob" else 0.5})


def test_keys_without_effect_are_refused():
    for keys, message in (
        ({"pack_samples": True, "always_max_length": True, "packing": "next_fit"}, "no effect"),
        ({"mask_inputs": False, "loss_roles": ("user",)}, "no effect"),
        ({"loss_roles": ("asistant",)}, "did you mean `assistant`"),
    ):
        with pytest.raises(ValueError, match=message):
            SFTDataConfig(sources=("x",), **keys)


# Traps of the recipe format, and resuming.


@pytest.mark.parametrize("split", [(1.5, -0.5), (0.5, 0.4), (-0.1, 1.1), (0.9, 0.2)])
def test_a35_a_split_has_two_shares_that_add_up_to_one(split):
    with pytest.raises(ValueError, match="two numbers from 0 to 1 that add up to 1"):
        SFTDataConfig(sources=("x",), train_eval_split=split)


def test_a35_shares_add_up_within_rounding():
    assert SFTDataConfig(sources=("x",), train_eval_split=(0.7, 0.3000000001)).has_eval


def test_a36_a_sample_larger_than_its_source_takes_all_and_says_so(tmp_path):
    data = sft([chats(tmp_path, "one", 5, sample_count=9)])
    told = "one: sample_count 9 takes all 5 records"
    assert data.train_rows == 5 and told in data.ledger.warnings
    exact = sft([chats(tmp_path, "one", 5, sample_count=5)]).ledger.warnings
    assert exact == tuple(text for text in data.ledger.warnings if text != told)


def resumable(tmp_path, kind):
    if kind == "causal":
        source = texts(tmp_path, [{"text": f"{text} {n}"} for n in range(5) for text in TEXTS])
        factory = CausalDataFactory(CausalDataConfig(sources=("x",)), tiny_tokenizer(), 32)
        return factory.prepare([source], {}, BatchShape(2, 4))
    weights = {"weight": 2} if kind == "mixture" else {}
    sources = [chats(tmp_path, name, 90, **weights) for name in ("one", "two")]
    keys = {"always_max_length": True, "fuse_positions_prob": 0.5} if kind == "split" else {}
    config = SFTDataConfig(sources=("x",), pack_samples=True, **keys)
    factory = SFTDataFactory(config, tiny_tokenizer(), 96)
    return factory.prepare(sources, {}, BatchShape(2, 4))


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("kind", ["mixture", "split", "causal"])
def test_a7_a_run_that_stops_anywhere_goes_on_with_the_very_next_batch(tmp_path, kind, hosts):
    unbroken = resumable(tmp_path, kind)
    steps = unbroken.steps_per_epoch
    assert steps > 2
    expected = list(unbroken.train_batches(0, 2 * steps + 1))
    again = resumable(tmp_path, kind)
    of_hosts = [replace(again, train=plan) for plan in of_processes(again.train, hosts)]
    for start in range(2 * steps + 1):
        left = again.train.advance(0, start), 2 * steps + 1 - start
        parts = [list(host.train_batches(*left)) for host in of_hosts]
        for number, batches in enumerate(zip(*parts, strict=True), start):
            assert are_equal(joined(batches), expected[number])
