"""Records as they come: nothing is prepared, little is held, and every position is found again."""

import gc
import json
from itertools import islice

import numpy as np
import pytest

from jaxtrain.data import (
    BatchShape,
    CausalDataFactory,
    DataSource,
    HuggingFaceSource,
    LocalSource,
    SFTDataFactory,
)
from jaxtrain.data import hub as hub_module
from jaxtrain.data.stream import Block
from jaxtrain.recipe.data import (
    AnyLocalDataSourceConfig,
    CausalDataConfig,
    DataSourceConfig,
    HFDataSourceConfig,
    SFTDataConfig,
)
from jaxtrain.recipe.errors import DataError
from jaxtrain.recipe.resolve import resolve
from tests.data.made import are_equal, chats, joined, jsonl, of_processes, write
from tests.data.test_sft import documents_in
from tests.tiny import TEXTS, chat, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("cache")


def factory(kind="sft", *, max_length=96, **keys):
    if kind == "causal":
        config = CausalDataConfig(sources=("x",), **keys)
        return CausalDataFactory(config, tiny_tokenizer(), max_length)
    config = SFTDataConfig(sources=("x",), **keys)
    return SFTDataFactory(config, tiny_tokenizer(), max_length)


def stream(sources, kind="sft", *, shape=None, **keys):
    made = factory(kind, streaming=True, **keys)
    return made.prepare(sources, {}, shape or BatchShape(1, 2))


def in_files(folder, count=40, name="rows", **keys):
    """A source of a JSON Lines file, a compressed one and a JSON list."""
    rows = [
        {"messages": chat(f"{name} {n}", " ".join(["yes"] * (1 + n % 9)))} for n in range(count)
    ]
    place, third = folder / name, count // 3
    place.mkdir(exist_ok=True)
    write(place / "a.jsonl", rows[:third])
    (place / "b.json").write_text(json.dumps(rows[third : 2 * third]))
    write(place / "c.jsonl", rows[2 * third :])
    return LocalSource(AnyLocalDataSourceConfig(path=str(place), name=name, **keys))


def on_the_hub(folder, count=40):
    """A data set that `datasets` streams, from files since tests have no network."""
    rows = [{"messages": chat(f"hub {n}", " ".join(["no"] * (1 + n % 7)))} for n in range(count)]
    files = [str(write(folder / f"hub{n}.jsonl", rows[n::2])) for n in range(2)]
    return HuggingFaceSource(HFDataSourceConfig(name_or_path="json", kwargs={"data_files": files}))


@pytest.mark.covers("data.streaming")
@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("sft", {}),
        ("sft", {"pack_samples": True, "packing": "next_fit"}),
        ("sft", {"pack_samples": True, "always_max_length": True}),
        ("causal", {}),
    ],
    ids=str,
)
def test_a_stream_in_order_has_the_documents_of_the_prepared_set(tmp_path, kind, keys):
    if kind == "causal":
        rows = [{"text": f"{text} {n}"} for n in range(9) for text in TEXTS]
        sources = lambda: [jsonl(tmp_path, rows, "texts")]
    else:
        sources = lambda: [in_files(tmp_path), chats(tmp_path, "more", 11)]
    prepared = factory(kind, **keys).prepare(sources(), {}, BatchShape(1, 2)).train
    streamed = stream(sources(), kind, shuffle_window=1, **keys)
    (block,) = [streamed.train.first_block]
    assert (block.plan.documents.tokens == prepared.documents.tokens).all()
    assert (block.plan.documents.weights == prepared.documents.weights).all()
    steps = -(-len(block.sequences) // 2) - 1  # whole ones
    batches = list(streamed.train_batches(0, steps))
    seen = np.concatenate([b.tokens[b.segments > 0] for b in batches])
    assert len(batches) > 3 and (seen == prepared.documents.tokens[: len(seen)]).all()
    if kind == "sft" and not keys:
        order = np.split(prepared.documents.tokens, prepared.documents.offsets[1:-1])
        assert documents_in(batches) == [tuple(one.tolist()) for one in order[: 2 * steps]]


@pytest.mark.covers("data.shuffle_window")
def test_each_block_has_the_next_records_in_an_order_of_its_own(tmp_path):
    source = in_files(tmp_path, 40)
    order = documents_in(stream([source], shuffle_window=1).train_batches(0, 20))
    shuffled = documents_in(stream([source], shuffle_window=10).train_batches(0, 40))
    for number in range(8):
        block = shuffled[10 * number : 10 * (number + 1)]
        first = 10 * number % 40  # the second pass is shuffled anew
        assert block != order[first : first + 10] and sorted(block) == sorted(
            order[first : first + 10]
        )
    assert shuffled[:10] != shuffled[40:50]
    seeds = [stream([source], shuffle_window=10, seed=seed).train.first_block for seed in (1, 2)]
    assert (seeds[0].sequences != seeds[1].sequences).any()


def kinds(folder):
    return {
        "packed": dict(sources=[in_files(folder)], pack_samples=True),
        "ordered": dict(sources=[in_files(folder), chats(folder, "more", 7)], shuffle_window=1),
        "lengths": dict(
            sources=[jsonl(folder, [{"messages": chat("a", "yes " * 5 * n)} for n in range(1, 90)], "lengths")],
            max_length=1024, div_length=32,
        ),
        "mixture": dict(
            sources=[in_files(folder, weight=3), chats(folder, "more", 7, weight=1)],
            pack_samples=True,
        ),
        "hub": dict(sources=[on_the_hub(folder)]),
        "causal": dict(
            sources=[jsonl(folder, [{"text": f"{text} {n}"} for n in range(9) for text in TEXTS], "texts")],
            kind="causal", max_length=32,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["packed", "ordered", "lengths", "mixture", "hub", "causal"])
def test_a_stream_that_stops_anywhere_goes_on_with_the_very_next_batch(tmp_path, kind, monkeypatch):
    """By what a checkpoint keeps, across blocks, files, passes and hosts."""
    monkeypatch.setattr(hub_module, "PART_RECORDS", 6)
    steps = 14
    keys = {"shuffle_window": 9, "shape": BatchShape(2, 4), "dl_num_workers": 1}
    unbroken = stream(**keys | kinds(tmp_path)[kind])
    expected, saved, position = [], [], 0
    for batch in unbroken.train_batches(0, steps):
        saved.append((position, json.dumps(unbroken.train.state_dict(position))))
        expected.append(batch)
        position = unbroken.train.advance(position)
    assert kind != "mixture" or json.loads(saved[-1][1])["stream"]["places"][1][0] > 1
    assert len({batch.tokens.shape for batch in expected}) == (3 if kind == "lengths" else 1)
    again = stream(**keys | {"dl_num_workers": 0} | kinds(tmp_path)[kind])
    for start, (position, state) in enumerate(saved):
        again.train.load_state_dict(json.loads(state))
        left = min(4, steps - start)
        hosts = [again]
        if start % 5 == 0:
            shapes = [part.shape for part in of_processes(again.train.first_block.plan, 2)]
            hosts = [stream(**keys | kinds(tmp_path)[kind] | {"shape": shape}) for shape in shapes]
            for host in hosts:
                host.train.load_state_dict(json.loads(state))
        parts = [list(host.train_batches(position, left)) for host in hosts]
        for number, batches in enumerate(zip(*parts, strict=True), start):
            assert are_equal(joined(batches), expected[number]), (start, number)


class Endless(DataSource):
    """Counts what is read of more records than anything could hold."""

    name = "endless"
    config: DataSourceConfig

    def load(self, config, split):
        self.read_records = 0
        return self

    def __len__(self):
        return 10**15

    def __getitem__(self, index):
        self.read_records += 1
        return {"messages": chat(f"number {index}", "yes " * (index % 5 + 1))}

    def where(self, index):
        return f"record {index}"


@pytest.mark.parametrize("ahead", [0, 2])
def test_no_more_is_read_and_held_than_the_blocks_of_a_step_and_the_next(ahead):
    source = Endless(DataSourceConfig(type="endless"))
    data = stream([source], shuffle_window=20, dl_num_workers=ahead, shape=BatchShape(1, 8))
    assert source.read_records == 20
    for step, _ in enumerate(islice(data.train_batches(0), 100), start=1):
        blocks = -(-8 * step // 20) + bool(ahead)
        assert source.read_records <= 20 * blocks
        if step % 20 == 0:
            gc.collect()
            held = sum(type(one) is Block for one in gc.get_objects())
            assert held <= 3 + bool(ahead)  # the first, two of a step, and the next
            data.train.state_dict(8 * step)
            assert len(data.train._starts) <= 4


def test_shares_are_met_whatever_is_dropped(tmp_path):
    """A third of one source has nothing to train."""
    rows = [{"messages": chat("a", *(["b"] if n % 3 else []))} for n in range(30)]
    sources = [jsonl(tmp_path, rows, "half", weight=1), chats(tmp_path, "whole", 9, weight=2)]
    data = stream(sources, shuffle_window=30)
    list(data.train_batches(0, 400))
    one, other = data.train.counts
    assert other.documents / one.documents == pytest.approx(2, rel=0.02)
    assert one.dropped.total() == pytest.approx(one.rows / 3, rel=0.05)
    lines = "\n".join(data.train.report())
    assert f"half: {one.rows} records read, {one.documents} documents" in lines
    assert "stream: whole was read" in lines and "no assistant text to train on" in lines


def test_faults_are_counted_over_blocks_and_resumes(tmp_path):
    lines = [json.dumps({"messages": chat(f"a {n}", "yes")}) for n in range(60)]
    lines[25] = lines[43] = '{"messages": [{"role": "user"'
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    source = lambda: LocalSource(AnyLocalDataSourceConfig(path=str(tmp_path / "rows.jsonl")))
    keys = {"shuffle_window": 10, "dl_num_workers": 0}
    data = stream([source()], max_rows_with_errors=1, **keys)
    list(data.train_batches(0, 16))
    assert "  dropped 1: faulty" in data.train.report()
    state = json.loads(json.dumps(data.train.state_dict(32)))
    assert state["stream"]["counts"][0]["dropped"] == {"faulty": 1}
    again = stream([source()], max_rows_with_errors=1, **keys)
    again.train.load_state_dict(state)
    with pytest.raises(
        DataError, match=r"rows.jsonl:44: not JSON: .*max_rows_with_errors allows 1"
    ):
        list(again.train_batches(32, 10))
    assert stream([source()], **keys).ledger.sources[0].rows == 10  # the fault is not there yet


def test_other_records_than_the_checkpoint_has_seen_are_an_error(tmp_path):
    data = stream([in_files(tmp_path)], shuffle_window=10)
    list(data.train_batches(0, 8))
    state = data.train.state_dict(16)
    for sources in (
        [in_files(tmp_path, name="other")],
        [in_files(tmp_path), chats(tmp_path, "more", 3)],
    ):
        other = stream(sources, shuffle_window=10)
        with pytest.raises(
            DataError, match="the stream has other records now where the checkpoint"
        ):
            other.train.load_state_dict(state)
            next(other.train_batches(16))


def test_where_nothing_is_left_a_stream_says_so_instead_of_reading_for_ever(tmp_path):
    rows = [{"messages": chat("a", "b", "c")[:1]} for _ in range(5)]
    with pytest.raises(DataError, match="no record is left: none: 5 records read, 5 dropped as no"):
        stream([jsonl(tmp_path, rows, "none")], shuffle_window=2)
    weighted = [jsonl(tmp_path, rows, "none", weight=1), chats(tmp_path, "some", 9, weight=1)]
    with pytest.raises(DataError, match="no record is left: none: 5 records read"):
        list(stream(weighted, shuffle_window=4).train_batches(0, 9))


def test_evaluation_sets_are_prepared_and_the_ledger_says_what_is_held(tmp_path):
    sources, evals = [in_files(tmp_path)], {"eval": [chats(tmp_path, "evals", 5)]}
    data = factory(streaming=True, shuffle_window=7).prepare(sources, evals, BatchShape(1, 2))
    lines = data.ledger.lines()
    assert (
        "stream: blocks of 7 records are read, packed and shuffled; the counts are those of 1 block"
        in lines
    )
    assert [one.rows for one in data.ledger.sources] == [7, 5]
    assert [one.label for one in data.ledger.sets] == ["eval"]
    assert sum((batch.rows >= 0).sum() for batch in data.eval_batches()) == 5
    assert data.evals["eval"].lengths == data.train.lengths


STREAMED = {"sources": ["a/b"], "streaming": True}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"train_iters": 0}, "train_iters: must be > 0 with data.streaming: true, where nobody"),
        ({"epochs": 2}, "epochs: counts passes over the data, which data.streaming does not know, found"),
        ({"min_iterations": 2}, "min_iterations: counts passes over the data"),
        ({"overfit_first_batch": True}, "overfit_first_batch: counts passes over the data"),
        ({"checkpoint": [{"output_dir": "c", "save_every_n_epochs": 1}]}, "checkpoint.0.save_every_n"),
        ({"train_eval_split": [0.9, 0.1]}, "data.train_eval_split: excludes streaming; name the"),
        ({"batch_tokens": 4096}, "data.batch_tokens: excludes streaming, which knows a block"),
        ({"pack_samples": True, "drop_last": True}, "data.drop_last: excludes streaming"),
        ({"sources": [{"name_or_path": "a/b", "sample_count": 3}]}, "data.sources.0.sample_count: needs"),
        ({"sources": ["a/b:train[:9]"]}, "data.sources.0.split: needs the number of records"),
        ({"streaming": False, "shuffle_window": 9}, "data.shuffle_window: needs streaming: true"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_a_stream_cannot_do_is_refused(change, fault):
    keys = ("train_iters", "epochs", "min_iterations", "overfit_first_batch", "checkpoint")
    top = {"train_iters": 5} | {key: change[key] for key in keys if key in change}
    data = STREAMED | {key: change[key] for key in change.keys() - top}
    faults = resolve({"model": {"name_or_path": "m"}, "data": data, **top}).faults
    (found,) = (f"{one.key}: {one.what}" for one in faults)
    assert found.startswith(fault)
