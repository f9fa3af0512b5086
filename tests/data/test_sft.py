"""From files to batches through the factory, as a run does it."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from jaxtrain.data import BatchShape, GivenSource, JsonLinesSource, SFTDataFactory
from jaxtrain.data.documents import (
    BATCH_RECORDS,
    MIN_POOL_RECORDS,
    Documents,
    DocumentWriter,
    Tolerance,
    choose_num_workers,
    tokenise,
)
from jaxtrain.data.encode import ConversationEncoder
from jaxtrain.data.ledger import SourceCounts
from jaxtrain.data.order import split_by_content
from jaxtrain.data.records import NamedRecords
from jaxtrain.recipe.data import LocalDataSourceConfig, SFTDataConfig
from jaxtrain.recipe.errors import DataError
from tests.data.made import jsonl, of_processes
from tests.tiny import CHATML, GENERATION, TEXTS, chat, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("cache")


def chats(count, seed=0):
    words = " ".join(TEXTS).split()
    random = np.random.default_rng(seed)

    def text():
        return " ".join(random.choice(words, random.integers(1, 8)))

    return [
        {"messages": chat(*(text() for _ in range(2 * random.integers(1, 4))))}
        for _ in range(count)
    ]


source = partial(jsonl, name="chats")


def prepare(sources, evals=(), *, max_length=128, shape=None, **keys):
    factory = SFTDataFactory(SFTDataConfig(sources=("x",), **keys), tiny_tokenizer(), max_length)
    evals = {"eval": evals} if evals else {}
    return factory.prepare(sources, evals, shape or BatchShape(2, 2))


def documents_in(batches):
    """Token tuples of all documents."""
    found = []
    for batch in batches:
        tokens = batch.tokens.reshape(-1, batch.tokens.shape[-1])
        for row, segments in zip(tokens, batch.segments.reshape(tokens.shape), strict=True):
            found += [tuple(row[segments == s].tolist()) for s in range(1, segments.max() + 1)]
    return found


@pytest.mark.covers("data.pack_samples", "data.packing")
@pytest.mark.parametrize("packing", ["best_fit", "next_fit", None])
def test_an_epoch_trains_every_conversation_once(tmp_path, packing):
    rows = chats(60)
    keys = {"pack_samples": True, "packing": packing} if packing else {}
    data = prepare([source(tmp_path, rows)], **keys)
    tokenizer = tiny_tokenizer()
    expected = [
        tuple(tokenizer.apply_chat_template(row["messages"], return_dict=False)) for row in rows
    ]
    expected = [tokens for tokens in expected if len(tokens) <= 128]
    batches = list(data.train_batches(0, data.steps_per_epoch))
    assert sorted(documents_in(batches)) == sorted(expected)
    counts = data.ledger.sources[0]
    assert counts.documents == len(expected) and counts.rows == 60
    trained = sum(batch.loss_weights.sum() for batch in batches)
    assert counts.trained_tokens == data.ledger.sets[0].trained_tokens == trained
    assert data.train_rows == len({r for batch in batches for r in batch.rows.ravel()} - {-1})


def test_nothing_but_the_entry_is_left_in_the_cache(tmp_path, cache):
    data = prepare([source(tmp_path, chats(9))])
    next(data.train_batches())
    (entry,) = (cache / "data").iterdir()
    assert {path.parent for path in cache.rglob("*") if path.is_file()} == {entry}


@pytest.mark.covers("data.div_length", "data.pad_to")
@pytest.mark.parametrize(
    ("keys", "tokens"),
    [
        ({"div_length": 16}, 64),
        ({"div_length": 100}, 100),
        ({"div_length": 256}, 128),
        ({"pad_to": "max_length"}, 128),
        ({"pack_samples": True, "div_length": 16}, 128),
    ],
)
def test_one_length_for_every_row_of_a_run(tmp_path, keys, tokens):
    rows = [{"messages": chat("a" * 3, "The river was low that summer" * 3)}]
    evals = [{"messages": chat("a", "b")}]
    data = prepare([source(tmp_path, rows)], [source(tmp_path, evals, name="e")], **keys)
    assert 48 < len(documents_in(data.train_batches(0, 1))[0]) <= 64
    assert data.sequence_tokens == tokens
    assert {batch.tokens.shape for batch in data.eval_batches()} == {(2, 2, tokens)}


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_an_update_has_the_shortest_of_few_lengths_that_holds_its_rows(tmp_path, most):
    rows = [{"messages": chat("a", "The river was low. " * (1 + n * n // 200))} for n in range(120)]
    one = prepare([source(tmp_path, rows)], max_length=1024, max_length_buckets=1, div_length=48)
    keys = {"max_length_buckets": most, "div_length": 48}
    data = prepare([source(tmp_path, rows)], max_length=1024, **keys)
    lengths = data.train.lengths
    assert (len(lengths) == most or len(lengths) > 4) and lengths[-1] == one.sequence_tokens
    assert all(length % 48 == 0 for length in lengths[:-1]) and list(lengths) == sorted(lengths)
    assert documents_in(data.train_batches(0, 30)) == documents_in(one.train_batches(0, 30))
    places = tokens = 0
    for step, batch in enumerate(data.train_batches(0, 30)):
        width, segments = batch.tokens.shape[-1], batch.segments
        longest = int((segments > 0).sum(-1).max())
        assert width == min(length for length in lengths if length >= longest)
        halves = [part.batch(part.advance(0, step)).tokens for part in of_processes(data.train, 2)]
        assert (np.concatenate(halves, axis=1) == batch.tokens).all()
        places, tokens = places + segments.size, tokens + int((segments > 0).sum())
    assert data.ledger.sets[0].fill == pytest.approx(tokens / places)
    assert most == 1 or data.ledger.sets[0].fill > one.ledger.sets[0].fill


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_a24_evaluation_sees_every_row_once_in_order(tmp_path, count):
    """Trap G14 too: the last batch is filled up with rows of no weight."""
    evals = [{"messages": chat(f"number {n}", "yes")} for n in range(count)]
    data = prepare([source(tmp_path, chats(3))], [source(tmp_path, evals, name="evals")])
    batches = list(data.eval_batches())
    numbers = np.concatenate([batch.rows.ravel() for batch in batches])
    assert numbers[:count].tolist() == list(range(count)) and (numbers[count:] == -1).all()
    assert len(documents_in(batches)) == data.eval_rows == count


@pytest.mark.covers("data.train_eval_split")
def test_the_split_is_disjoint_by_content_and_by_seed(tmp_path):
    rows = chats(40) + chats(20)  # twenty of them twice
    sources = [source(tmp_path, rows)]

    def sides(seed):
        data = prepare(sources, train_eval_split=(0.8, 0.2), seed=seed, pack_samples=True)
        train = documents_in(data.train_batches(0, data.steps_per_epoch))
        return sorted(train), sorted(documents_in(data.eval_batches()))

    train, held_out = sides(1)
    assert not set(train) & set(held_out)
    whole = prepare(sources)
    assert sorted(train + held_out) == sorted(
        documents_in(whole.train_batches(0, whole.steps_per_epoch))
    )
    assert abs(len(held_out) - 0.2 * len(train + held_out)) <= 2
    assert sides(1) == (train, held_out) and sides(2) != (train, held_out)


def test_a_split_needs_two_different_documents():
    with pytest.raises(DataError, match="needs two different documents, found 1 in 3"):
        split_by_content(np.zeros(3, np.uint64), 0.5, 0)


def test_the_ledger_counts_every_row(tmp_path):
    rows = [
        *chats(8),
        {"messages": chat("no answer")},
        {"messages": chat("a", "The river was low " * 40)},
    ]
    data = prepare([source(tmp_path, rows)], pack_samples=True, max_length=160)
    counts = data.ledger.sources[0]
    assert counts.rows == 10 and counts.documents == 8
    assert counts.dropped == {
        "no assistant text to train on": 1,
        "longer than max_length": 1,
    }
    lines = data.ledger.lines()
    assert lines[0] == "chats: 10 records read, 8 documents"
    assert "  dropped 1: longer than max_length" in lines
    assert lines[5].startswith("  end of turn trained in 100.0% of ")
    packed = f"train: 8 documents in {data.train_rows} sequences of 160 tokens, fill"
    assert lines[-3].startswith(packed)
    assert sum(len(d) for d in documents_in(data.train_batches(0, 9))) >= counts.tokens


@pytest.mark.covers("data.filter_samples")
def test_truncated_rows_are_counted(tmp_path):
    rows = [{"messages": chat("a", "The river was low " * 40)}]
    data = prepare([source(tmp_path, rows)], filter_samples=False)
    assert data.ledger.sources[0].truncated == 1 and data.sequence_tokens == 128
    assert data.ledger.lines()[0] == "chats: 1 record read, 1 document, 1 truncated"


def failure(*args, **keys):
    with pytest.raises(DataError) as error:
        prepare(*args, **keys)
    return str(error.value)


def test_f4_nothing_to_train_on_at_all(tmp_path):
    rows = [{"messages": chat("a")}, {"messages": chat("a", "b " * 200)}]
    assert failure([source(tmp_path, rows)]) == (
        "no record is left: chats: 2 records read, 1 dropped as no assistant text to train on, "
        "1 dropped as longer than max_length"
    )


def test_faults_of_a_row_name_its_place(tmp_path):
    rows = [*chats(2), {"messages": [{"role": "usr", "content": "a"}]}]
    place = f"{tmp_path}/chats.jsonl:3"
    assert failure([source(tmp_path, rows)]).startswith(
        f"{place}: messages[0].role: unknown role 'usr'; known are"
    )
    rows[2] = {"messages": chat("a", "b " * 200)}
    assert failure([source(tmp_path, rows)], overlong="error").startswith(f"{place}: 221 ")
    rows[2] = {"text": "a"}
    assert failure([source(tmp_path, rows)]).startswith(f"{place}: columns text hold no conver")


@pytest.mark.parametrize("row", [None, "text", ["text"], 5], ids=str)
def test_a_row_that_is_no_map_is_named(row):
    with pytest.raises(DataError, match=r"^given: record 1: a record must be a map, found "):
        prepare([GivenSource.from_records([{"messages": chat("a", "b")}, row])])


@pytest.mark.covers("data.sources", "data.sources.*.name")
def test_sources_are_told_apart(tmp_path):
    sources = [
        source(tmp_path, chats(3), name="one"),
        source(tmp_path, chats(2, seed=1), name="two"),
    ]
    data = prepare(sources)
    origins = [data.train.origins(row)[0] for row in range(5)]
    assert origins == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert [counts.label for counts in data.ledger.sources] == ["one", "two"]


def test_a_row_is_known_by_its_number_in_its_source(tmp_path):
    """Before a split and a sample were taken, so that a person finds it."""
    keys = {"split": "train[10:]", "sample_count": 4, "columns": {"id": "id"}}
    rows = [{**row, "id": n} for n, row in enumerate(chats(20))]
    path = source(tmp_path, rows).config.path
    drawn = JsonLinesSource(LocalDataSourceConfig(path=path, **keys))
    expected = [drawn.read("train")[n]["id"] for n in range(4)]
    data = prepare([drawn], max_length=512)
    assert [data.train.origins(row)[0].record for row in range(4)] == expected
    assert min(expected) >= 10


def test_processes_change_no_row(tmp_path):
    rows = NamedRecords(chats(300), "rows")
    encoder = ConversationEncoder(tiny_tokenizer(), max_length=128, overlong="drop")
    results = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        counts = SourceCounts("rows")
        with DocumentWriter(folder) as writer:
            tokenise(
                rows, encoder, writer, counts, source=0, tolerance=Tolerance(), workers=workers
            )
        results.append((Documents.open(folder), counts))
    (alone, alone_counts), (shared, shared_counts) = results
    # As bytes: documents that are no preferences have scores that are not a number.
    assert all(a.tobytes() == b.tobytes() for a, b in zip(alone, shared, strict=True))
    assert alone_counts == shared_counts


def test_processes_start_only_for_many_rows():
    assert choose_num_workers(MIN_POOL_RECORDS - 1, 16) == 0
    assert choose_num_workers(MIN_POOL_RECORDS, 1) == 0


def test_data_and_tokenizers_import_no_jax():
    program = "import sys, jaxtrain.data, jaxtrain.tokenizer; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.fixture
def hasty_threads():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty_threads")
def test_marks_of_a_template_are_not_mixed_up_between_batches(tmp_path):
    rows = [{"messages": chat(f"a{n}", f"yes {n}")} for n in range(5 * BATCH_RECORDS)]
    config = SFTDataConfig(sources=("x",))
    factory = SFTDataFactory(config, tiny_tokenizer(GENERATION), 64)
    data = factory.prepare([source(tmp_path, rows)], {}, BatchShape(1, 1))
    documents, tokenizer = data.train.documents, tiny_tokenizer()
    for number, row in enumerate(rows):
        place = slice(documents.offsets[number], documents.offsets[number + 1])
        kept = documents.tokens[place][documents.weights[place] > 0]
        assert tokenizer.decode(kept) == row["messages"][1]["content"]


LAST_USER = (  # shows the system's text in the last turn, if that is the user's
    "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'user' %}{{ messages[0].content }}\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(("template", "hidden"), [(LAST_USER, [3]), (CHATML, [])])
def test_a_system_text_that_the_template_leaves_out_is_told(tmp_path, template, hidden):
    rows = [{"messages": chat("so", "yes", system="it was the river")} for _ in range(3)]
    rows += [{"messages": chat("so", "no")}]
    factory = SFTDataFactory(SFTDataConfig(sources=("x",)), tiny_tokenizer(template), 128)
    data = factory.prepare([source(tmp_path, rows)], {}, BatchShape(1, 1))
    told = [text for text in data.ledger.warnings if "system text" in text]
    assert told == [
        f"chats: the chat template leaves the system text out of {count} of 4 documents; set "
        f"tokenizer.chat_template to one that shows it"
        for count in hidden
    ]
