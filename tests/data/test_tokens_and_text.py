"""Rows that are tokens already, rows made up, and plain text."""

from functools import partial

import numpy as np
import pytest

from jaxtrain.data import (
    BatchShape,
    CausalDataFactory,
    JsonLinesSource,
    SyntheticSource,
    TextSource,
)
from jaxtrain.recipe.data import (
    CausalDataConfig,
    LocalDataSourceConfig,
    SyntheticDataSourceConfig,
    TextDataSourceConfig,
)
from jaxtrain.recipe.errors import DataError, RecipeError
from tests.data.made import all_rows, are_equal, causal, jsonl, sft, texts, write
from tests.tiny import TEXTS, chat, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("cache")


tokens = partial(jsonl, name="tokens", process=False)


@pytest.mark.covers("data.sources.*.process")
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


@pytest.mark.parametrize("make", [sft, causal])
@pytest.mark.parametrize(
    "mask", [{"labels": [-100, -100, 7, 8, -100]}, {"loss_mask": [0, 0, 1, 1, 0]},
             {"completion_mask": [False, False, True, True, False]},
             {"loss_mask": [1, 0, 1, 1, 1], "labels": [5, 6, 7, 8, -100]},
             {"loss_mask": [1, 0, 1, 1, 1], "completion_mask": [1, 1, 1, 1, 0]}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("attention", [[1, 1, 1, 1, 0], None])
def test_masks_of_tokenised_rows_are_read(tmp_path, make, mask, attention):
    row = {"input_ids": [5, 6, 7, 8, 9], "attention_mask": attention, **mask}
    keys = {"max_length": 4} if make is causal else {}
    batch = all_rows(make([tokens(tmp_path, [row] * 8)], **keys).train)
    assert (
        batch.loss_weights[batch.tokens == 7].sum()
        == np.sum(batch.tokens == 7)
        - ((batch.tokens == 7) & (np.diff(batch.segments, axis=1, prepend=0) > 0)).sum()
    )
    assert not batch.loss_weights[(batch.tokens == 6) | (batch.tokens == 9)].any()
    assert (batch.tokens == 9).any() == (attention is None)


def test_what_nothing_reads_is_named_once(tmp_path):
    rows = [
        {"input_ids": [5, 6], "labels": [5, 6], "position_ids": [0, 1], "id": n} for n in (1, 2)
    ]
    (counts,) = sft([tokens(tmp_path, rows)]).ledger.sources
    assert "  not read: position_ids (2), id (2)" in counts.lines()


WRONG = {
    "mask": ({"input_ids": [1, 2], "loss_mask": [1, 2]}, "loss_mask: must be 0 and 1, found 2"),
    "gap": (
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 0, 1]},
        "attention_mask: may hide padding at the ends only, found a gap",
    ),
    "no ids": ({"labels": [1]}, "no column 'input_ids', found labels"),
    "no labels": ({"input_ids": [1]}, "no column 'labels', found input_ids"),
    "text": ({"input_ids": "abc", "labels": [1]}, "input_ids: must be a list of whole numbers"),
    "lists": ({"input_ids": [[1], [2, 3]], "labels": [1]}, "input_ids: must be a list of whole"),
    "fractions": ({"input_ids": [1.5], "labels": [1]}, "input_ids: must be a list of whole numb"),
    "uneven": ({"input_ids": [1, 2], "labels": [1]}, "labels: must be 2, as input_ids, found 1"),
    "shifted": ({"input_ids": [1, 2], "labels": [2, 3]}, "labels[0]: must be the token 1 itself"),
    "no token": ({"input_ids": [1, 999], "labels": [1, 999]}, "input_ids: 999 is no token; must"),
}


@pytest.mark.parametrize(("row", "message"), WRONG.values(), ids=WRONG)
def test_tokenised_rows_are_checked(tmp_path, row, message):
    with pytest.raises(DataError) as error:
        sft([tokens(tmp_path, [row])])
    assert str(error.value).startswith(f"{tmp_path}/tokens.jsonl:1: {message}")


@pytest.mark.covers("data.sources.*.rows", "data.sources.*.vocab_size")
def test_made_up_rows_are_full_and_depend_on_the_seed():
    def made(seed, **keys):
        source = SyntheticSource(SyntheticDataSourceConfig(rows=6, **keys))
        return all_rows(sft([source], seed=seed).train).tokens

    assert made(1).shape == (6, 64) and (made(1) == made(1)).all() and (made(1) != made(2)).any()
    assert made(1).max() > 200 and made(1, vocab_size=9).max() == 8
    assert len({tuple(row) for row in made(1)}) == 6


@pytest.mark.covers("data.max_rows_with_errors")
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
    assert data.sequence_tokens == 16 and data.ledger.sets[0].trained_tokens == (~firsts).sum()
    starts = np.diff(batch.segments, axis=1, prepend=0) > 0
    assert (starts == firsts).all() and not batch.positions[starts].any()


def test_a_text_has_one_bos_and_one_eos(tmp_path):
    tokenizer = tiny_tokenizer()
    row = {"text": f"{tokenizer.bos_token}{TEXTS[0]}{tokenizer.eos_token}"}
    data = causal([texts(tmp_path, [row, {"text": TEXTS[1]}])])
    assert data.train.documents.tokens.tolist() == joined(TEXTS[:2])
    assert any(
        "special tokens are written in the text of 1 of 2" in t for t in data.ledger.warnings
    )
    kept = causal([texts(tmp_path, [row])], split_special_tokens=True)
    assert kept.train.documents.tokens.tolist().count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(kept.train.documents.tokens[1:-1]) == row["text"]
    assert not kept.ledger.warnings


def test_an_evaluation_on_text_keeps_its_tail(tmp_path):
    source = texts(tmp_path, [{"text": text} for text in TEXTS])
    data = causal([source], evals={"eval": [source]})
    batch = all_rows(data.evals["eval"])
    assert batch.tokens[batch.segments > 0].tolist() == joined(TEXTS)


@pytest.mark.covers("data.num_proc")
def test_a38_text_rows_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    from jaxtrain.data import documents

    monkeypatch.setattr(documents, "MIN_POOL_RECORDS", 1)
    source = texts(tmp_path, [{"text": f"{text} {n}"} for n in range(100) for text in TEXTS])
    batches = []
    for number, processes in enumerate((1, 8)):
        data = causal([source], num_proc=processes, cache_dir=str(tmp_path / str(number)))
        batches.append(all_rows(data.train))
    assert are_equal(*batches)


@pytest.mark.covers("data.sources.*.column")
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
    with pytest.raises(ValueError, match="causal sequences all have `max_length` tokens"):
        CausalDataConfig(sources=("x",), pack_samples=True)
    with pytest.raises(DataError, match=r"data.max_length: \d+ is more than all \d+ tokens"):
        causal([texts(tmp_path, [{"text": "yes"}])], max_length=64)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(RecipeError, match="has no EOS token"):
        CausalDataFactory(CausalDataConfig(sources=("x",)), tokenizer, 8).prepare(
            [texts(tmp_path, [{"text": "yes"}])], {}, BatchShape(1, 1)
        )
