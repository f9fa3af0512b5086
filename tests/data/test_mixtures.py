"""Keys that decide which documents share an epoch and a row."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.data import (
    BatchShape,
    CausalDataFactory,
    JsonLinesSource,
    SFTDataFactory,
    SyntheticSource,
    TextSource,
)
from jaxtrain.data.mixture import mixed_documents
from jaxtrain.data.packing import slices
from jaxtrain.recipe.data import (
    CausalDataConfig,
    LocalDataSourceConfig,
    SFTDataConfig,
    SyntheticDataSourceConfig,
    TextDataSourceConfig,
)
from jaxtrain.recipe.errors import DataError, RecipeError
from jaxtrain.recipe.resolve import get_config
from tests.tiny import TEXTS, chat, tiny_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def chats(folder, name, count, words=3, **keys):
    rows = [
        {"messages": chat(f"{name} {n}", " ".join(["yes"] * (1 + n % words)))} for n in range(count)
    ]
    path = write(folder / f"{name}.jsonl", rows)
    return JsonLinesSource(LocalDataSourceConfig(path=str(path), name=name, **keys))


def sft(sources, *, max_length=64, evals=None, tokenizer=None, **keys):
    config = SFTDataConfig(sources=("x",), **keys)
    factory = SFTDataFactory(config, tokenizer or tiny_tokenizer(), max_length)
    return factory.prepare(sources, evals or {}, BatchShape(1, 2))


def causal(sources, *, max_length=16, evals=None, **keys):
    factory = CausalDataFactory(
        CausalDataConfig(sources=("x",), **keys), tiny_tokenizer(), max_length
    )
    return factory.prepare(sources, evals or {}, BatchShape(1, 2))


def all_rows(plan):
    return plan.fill(np.arange(plan.rows.num_rows))


# Mixtures.


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0.1, 9)), min_size=1, max_size=5))
def test_shares_are_met_and_no_document_is_favoured(parts):
    sources = np.repeat(np.arange(len(parts)), [count for count, _ in parts])
    chosen, weights = np.arange(len(sources)), [weight for _, weight in parts]
    mixed = mixed_documents(chosen, sources, weights, seed=1)
    assert len(mixed) == len(chosen)  # the epoch keeps its length
    for number, weight in enumerate(weights):
        times = np.bincount(mixed, minlength=len(sources))[sources == number]
        assert abs(times.sum() - weight / sum(weights) * len(mixed)) <= 1
        assert times.max() - times.min() <= 1


def test_a_mixture_is_the_same_each_time_and_another_by_seed(tmp_path):
    sources = [chats(tmp_path, "one", 30, weight=1), chats(tmp_path, "two", 30, weight=3)]
    drawn = [sft(sources, seed=seed).train.rows.documents.tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    data = sft(sources, train_eval_split=(0.5, 0.5))
    train = {*data.train.rows.documents.tolist()}
    assert not train & {*data.evals["eval"].rows.documents.tolist()}


def test_the_ledger_counts_what_a_mixture_trains(tmp_path):
    data = sft([chats(tmp_path, "one", 5, weight=9), chats(tmp_path, "two", 45, weight=1)])
    batch = all_rows(data.train)
    assert data.ledger.sets[0].trained_tokens == batch.loss_weights.sum()
    assert data.ledger.sets[0].rows == 50
    assert data.ledger.sets[0].documents == 10  # five of one nine times, five of the other once


def test_weights_stand_for_all_sources_or_none(tmp_path):
    def recipe(*sources, **data):
        return {"model": {"name_or_path": "m"}, "data": {"sources": list(sources), **data}}

    weighed = {"type": "jsonl", "path": "a.jsonl", "weight": 2}
    with pytest.raises(RecipeError, match=r"sources\.1 has no weight and another source has one"):
        get_config(recipe(weighed, "b.jsonl"))
    with pytest.raises(RecipeError, match="weight has no effect in eval_sources"):
        get_config(recipe("b.jsonl", eval_sources=[weighed]) | {"eval_interval": 1})
    with pytest.raises(RecipeError, match=r"sources\.0\.weight: must be > 0\.0, found -1"):
        get_config(recipe({**weighed, "weight": -1}))


def test_named_eval_sets(tmp_path):
    math, talk = chats(tmp_path, "math", 3), chats(tmp_path, "talk", 5)
    data = sft([chats(tmp_path, "one", 4)], evals={"math": [math], "talk": [talk]})
    assert {name: plan.rows.num_rows for name, plan in data.evals.items()} == {"math": 3, "talk": 5}
    named = {"math": ["m.jsonl"], "talk": "t.jsonl:eval[:5]"}
    config = get_config({
        "model": {"name_or_path": "m"}, "eval_interval": 1,
        "data": {"sources": ["a.jsonl"], "eval_sources": named},
    })  # fmt: skip
    ((one,), (other,)) = config.data.eval_sets.values()
    assert (one.split, other.path, other.split) == ("eval", "t.jsonl", "eval[:5]")


# Packing.


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 30))
def test_slices_are_full_and_hold_every_token_once_in_order(lengths, capacity):
    lengths = np.array(lengths)
    chosen = np.arange(len(lengths))[::-1]
    plan = slices(lengths, capacity, chosen)
    assert (plan.row_lengths[:-1] == capacity).all() and 0 < plan.row_lengths[-1] <= capacity
    found = [
        (document, token)
        for document, start, length in zip(*plan[:3], strict=True)
        for token in range(start, start + length)
    ]
    assert found == [(document, t) for document in chosen for t in range(lengths[document])]


def test_a3_always_max_length_fills_each_pack_and_splits_the_row_that_is_over(tmp_path):
    source = chats(tmp_path, "one", 40)
    data = sft([source], pack_samples=True, always_max_length=True, max_length=50)
    rows = data.train.rows
    assert (rows.row_lengths[:-1] == 50).all() and rows.row_lengths[-1] <= 50
    assert rows.row_lengths.sum() == data.train.documents.lengths.sum()
    assert rows.starts.any()  # some are split
    batch = all_rows(data.train)
    assert data.ledger.sets[0].trained_tokens == batch.loss_weights.sum()
    firsts = np.diff(batch.segments, axis=1, prepend=0) > 0
    assert not batch.loss_weights[firsts].any() and not batch.positions[firsts].any()


@pytest.mark.parametrize(
    "keys", [{}, {"packing": "next_fit"}, {"always_max_length": True}], ids=str
)
def test_drop_last_drops_one_short_pack(tmp_path, keys):
    source = chats(tmp_path, "one", 41)
    kept = sft([source], pack_samples=True, max_length=64, **keys).train.rows
    rest = sft([source], pack_samples=True, max_length=64, drop_last=True, **keys).train.rows
    assert rest.num_rows == kept.num_rows - 1 and len(rest.offsets) == rest.num_rows + 1
    last = kept.row_lengths.min() if not keys else kept.row_lengths[-1]
    assert kept.row_lengths.sum() - rest.row_lengths.sum() == last < 64
    with pytest.raises(DataError, match="drop_last would drop the only pack"):
        sft([source], pack_samples=True, max_length=9999, drop_last=True, **keys)


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
    lengths = data.train.rows.row_lengths
    for row in np.flatnonzero(fused):
        assert batch.positions[row, : lengths[row]].tolist() == list(range(lengths[row]))
    assert (batch.tokens == plain.tokens).all() and (batch.loss_weights == plain.loss_weights).all()
    assert (batch.segments[~fused] == plain.segments[~fused]).all()
    in_order = all_rows(data.evals["eval"])  # nothing is fused where losses are compared
    assert (in_order.segments == plain.segments).all()


def test_a_small_set_is_repeated_into_one_pack(tmp_path):
    source = chats(tmp_path, "one", 3)
    alone = sft([source], pack_samples=True, max_length=1000)
    data = sft([source], pack_samples=True, max_length=1000, repeat_to_pack_max_length=True)
    times = 1000 // alone.train.rows.row_lengths.sum()
    assert data.train.rows.num_rows == 1 and times > 1
    assert data.train.rows.row_lengths[0] == times * alone.train.rows.row_lengths[0]
    longer = sft([source], pack_samples=True, max_length=30, repeat_to_pack_max_length=True)
    assert longer.train.rows.row_lengths.sum() == alone.train.rows.row_lengths.sum()


@pytest.mark.parametrize(
    "key", ["always_max_length", "drop_last", "repeat_to_pack_max_length", "fuse_positions_prob"]
)
def test_keys_of_packs_need_packs(key):
    with pytest.raises(ValueError, match=f"{key} needs pack_samples: true"):
        SFTDataConfig(sources=("x",), **{key: True if key != "fuse_positions_prob" else 0.5})


def test_keys_without_effect_are_refused():
    for keys, message in (
        ({"pack_samples": True, "always_max_length": True, "packing": "next_fit"}, "no effect"),
        ({"mask_inputs": False, "loss_roles": ("user",)}, "no effect"),
        ({"loss_roles": ("asistant",)}, "did you mean `assistant`"),
    ):
        with pytest.raises(ValueError, match=message):
            SFTDataConfig(sources=("x",), **keys)


# Rows that are tokens, or made up.


def tokens(folder, rows, **keys):
    path = write(folder / "tokens.jsonl", rows)
    return JsonLinesSource(LocalDataSourceConfig(path=str(path), process=False, **keys))


def test_tokenised_rows_are_taken_as_they_stand(tmp_path):
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, 8]},
        {"input_ids": [9] * 3, "labels": [9] * 3},
    ]
    data = sft([tokens(tmp_path, rows)])
    batch = all_rows(data.train)
    assert batch.tokens[:, :4].tolist() == [[5, 6, 7, 8], [9, 9, 9, 0]]
    assert batch.loss_weights[:, :4].tolist() == [[0, 0, 1, 1], [0, 1, 1, 0]]
    long = [{"input_ids": [4] * 70, "labels": [4] * 70}, *rows]
    assert sft([tokens(tmp_path, long)]).ledger.sources[0].dropped == {"longer than max_length": 1}
    assert sft([tokens(tmp_path, long)], overlong="truncate").ledger.sources[0].truncated == 1


WRONG = {
    "no ids": ({"labels": [1]}, "no column 'input_ids', found labels"),
    "no labels": ({"input_ids": [1]}, "no column 'labels', found input_ids"),
    "text": ({"input_ids": "abc", "labels": [1]}, "input_ids: must be a list of whole numbers"),
    "fractions": ({"input_ids": [1.5], "labels": [1]}, "input_ids: must be a list of whole numb"),
    "uneven": ({"input_ids": [1, 2], "labels": [1]}, "labels: 1 of them beside 2 input_ids"),
    "shifted": ({"input_ids": [1, 2], "labels": [2, 3]}, "labels[0]: must be the token 1 itself"),
    "no token": ({"input_ids": [1, 999], "labels": [1, 999]}, "input_ids: 999 is no token; the"),
}


@pytest.mark.parametrize(("row", "message"), WRONG.values(), ids=WRONG)
def test_tokenised_rows_are_checked(tmp_path, row, message):
    with pytest.raises(DataError) as error:
        sft([tokens(tmp_path, [row])])
    assert str(error.value).startswith(f"{tmp_path}/tokens.jsonl:1: {message}")


def test_made_up_rows_are_full_and_depend_on_the_seed():
    def made(seed, **keys):
        source = SyntheticSource(SyntheticDataSourceConfig(rows=6, **keys))
        return all_rows(sft([source], seed=seed).train).tokens

    assert made(1).shape == (6, 64) and (made(1) == made(1)).all() and (made(1) != made(2)).any()
    assert made(1).max() > 200 and made(1, vocab_size=9).max() == 8
    assert len({tuple(row) for row in made(1)}) == 6


def test_skipped_rows_are_counted_and_one_too_many_stops(tmp_path):
    good = {"messages": chat("a", "yes")}
    path = write(tmp_path / "rows.jsonl", [good, {"messages": []}, {"text": "x"}, good])
    path.write_text(path.read_text() + "{broken\n")
    source = JsonLinesSource(LocalDataSourceConfig(path=str(path), name="rows"))
    counts = sft([source], max_rows_with_errors=3).ledger.sources[0]
    assert (counts.rows, counts.documents, counts.dropped) == (5, 2, {"faulty": 3})
    lines = counts.lines()
    assert "  dropped 3: faulty" in lines and f"    {path}:2: messages: empty conversation" in lines
    assert any(line.startswith(f"    {path}:5: not JSON") for line in lines)
    with pytest.raises(DataError) as error:
        sft([source], max_rows_with_errors=2)
    assert str(error.value).startswith(f"{path}:5: not JSON")
    assert str(error.value).endswith("; data.max_rows_with_errors allows 2")


# Plain text.


def texts(folder, rows, **keys):
    path = write(folder / "texts.jsonl", rows)
    return JsonLinesSource(LocalDataSourceConfig(path=str(path), **keys))


def joined(rows):
    tokenizer, found = tiny_tokenizer(), []
    for text in rows:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return found


def test_a38_causal_rows_are_slices_of_all_texts(tmp_path):
    source = texts(tmp_path, [{"text": text, "id": 1} for text in TEXTS])
    expected = joined(TEXTS)
    data = causal([source])
    batch = all_rows(data.train)
    assert batch.tokens.ravel().tolist() == expected[: len(expected) // 16 * 16]  # the tail, once
    bos = tiny_tokenizer().bos_token_id
    firsts = (batch.tokens == bos) | (np.arange(16) == 0)
    assert (batch.loss_weights == ~firsts).all()  # no target across a border, all else trained
    assert data.row_tokens == 16 and data.ledger.sets[0].trained_tokens == (~firsts).sum()
    starts = np.diff(batch.segments, axis=1, prepend=0) > 0
    assert (starts == firsts).all() and not batch.positions[starts].any()


def test_an_evaluation_on_text_keeps_its_tail(tmp_path):
    source = texts(tmp_path, [{"text": text} for text in TEXTS])
    data = causal([source], evals={"eval": [source]})
    batch = all_rows(data.evals["eval"])
    assert batch.tokens[batch.segments > 0].tolist() == joined(TEXTS)


def test_a38_text_rows_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    from jaxtrain.data import tokenise

    monkeypatch.setattr(tokenise, "POOL_ROWS", 1)
    source = texts(tmp_path, [{"text": f"{text} {n}"} for n in range(100) for text in TEXTS])
    batches = []
    for number, processes in enumerate((1, 8)):
        data = causal([source], num_proc=processes, cache_dir=str(tmp_path / str(number)))
        batches.append(all_rows(data.train))
    assert all((a == b).all() for a, b in zip(*batches, strict=True))


def test_the_column_of_the_text(tmp_path):
    only = texts(tmp_path, [{"body": text} for text in TEXTS])
    assert (
        all_rows(causal([only]).train).tokens.ravel().tolist()
        == joined(TEXTS)[: -(len(joined(TEXTS)) % 16)]
    )
    several = texts(tmp_path, [{"body": text, "id": 1} for text in TEXTS])
    with pytest.raises(DataError, match=r"texts\.jsonl:1: no column 'text', found body, id"):
        causal([several])
    named = texts(tmp_path, [{"body": text, "id": 1} for text in TEXTS], column="body")
    assert causal([named]).train_rows == len(joined(TEXTS)) // 16
    (tmp_path / "a.txt").write_text(TEXTS[0])
    assert causal([TextSource(TextDataSourceConfig(path=str(tmp_path / "a.txt")))]).train_rows >= 1


def test_what_causal_data_refuse(tmp_path):
    with pytest.raises(ValueError, match="causal rows always have `max_length` tokens"):
        CausalDataConfig(sources=("x",), pack_samples=True)
    with pytest.raises(DataError, match="tokens in all, which is less than one row of max_length"):
        causal([texts(tmp_path, [{"text": "yes"}])], max_length=64)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(RecipeError, match="has no EOS token"):
        CausalDataFactory(CausalDataConfig(sources=("x",)), tokenizer, 8).prepare(
            [texts(tmp_path, [{"text": "yes"}])], {}, BatchShape(1, 1)
        )
