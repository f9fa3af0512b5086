"""Prepared rows are found again when nothing changed that decides them, and never else."""

import os
import stat
import sys
import time

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxtrain.data import (
    BatchShape,
    CausalDataFactory,
    DataSource,
    HuggingFaceSource,
    JsonLinesSource,
    ParquetSource,
    SFTDataFactory,
    SyntheticSource,
    TextSource,
)
from jaxtrain.data.cache import DataCache
from jaxtrain.recipe.data import (
    CausalDataConfig,
    DataSourceConfig,
    HFDataSourceConfig,
    LocalDataSourceConfig,
    SFTDataConfig,
    SyntheticDataSourceConfig,
    TextDataSourceConfig,
)
from jaxtrain.recipe.errors import DataError, RecipeError
from tests.data.made import are_equal, write
from tests.tiny import PLAIN, chat, tiny_tokenizer


@pytest.fixture(autouse=True)
def entries(cache):
    """The folder of what is prepared."""
    return cache / "data"


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.jsonl", [{"messages": chat(f"a{n}", "yes")} for n in range(6)])


def local(path, **keys):
    return JsonLinesSource(LocalDataSourceConfig(path=str(path), **keys))


def note(sources, *, tokenizer=None, factory=SFTDataFactory, max_length=64, **keys):
    """The line of the ledger that says hit or miss."""
    sources = sources if isinstance(sources, list) else [sources]
    config_class = CausalDataConfig if factory is CausalDataFactory else SFTDataConfig
    config = config_class(sources=("x",), **keys)
    made = factory(config, tokenizer or tiny_tokenizer(), max_length)
    notes = made.prepare(sources, {}, BatchShape(1, 2)).ledger.notes
    (line,) = (text for text in notes if not text.startswith("mixture"))
    return line


def is_hit(line):
    assert line.startswith(("cache: hit, ", "cache: miss, ")), line
    return line.startswith("cache: hit, ")


def test_the_second_start_finds_what_the_first_prepared(rows):
    assert note(local(rows)).startswith("cache: miss, nothing prepared yet; prepared in ")
    assert is_hit(note(local(rows)))


def test_what_is_found_is_what_was_prepared(rows):
    config = SFTDataConfig(sources=("x",))
    made = [
        SFTDataFactory(config, tiny_tokenizer(), 64).prepare([local(rows)], {}, BatchShape(2, 2))
        for _ in range(2)
    ]
    first, second = (data.train.batch(0) for data in made)
    assert are_equal(first, second)
    assert made[0].ledger.sources == made[1].ledger.sources
    assert made[0].ledger.sets == made[1].ledger.sets


CHANGES = {  # what changes the rows → what the miss names
    "mask_inputs": ({"mask_inputs": False}, "data.mask_inputs"),
    "overlong": ({"overlong": "truncate"}, "data.overlong"),
    "filter_samples": ({"filter_samples": False}, "data.filter_samples"),
    "max_length": ({"max_length": 48}, "max_length"),
    "loss_roles": ({"loss_roles": ("user",)}, "data.loss_roles"),
    "completion_only": ({"completion_only": False}, "data.completion_only"),
    "ignore_empty_think": ({"ignore_empty_think": True}, "data.ignore_empty_think"),
    "split_special_tokens": ({"split_special_tokens": True}, "data.split_special_tokens"),
    "max_rows_with_errors": ({"max_rows_with_errors": 1}, "data.max_rows_with_errors"),
    "template": ({"tokenizer": tiny_tokenizer(PLAIN)}, "the chat template"),
}


@pytest.mark.parametrize(("keys", "named"), CHANGES.values(), ids=CHANGES)
def test_a12_a_key_that_changes_rows_misses_and_is_named(rows, keys, named):
    note(local(rows))
    assert note(local(rows), **keys).startswith(
        f"cache: miss, the nearest entry differs in {named}; prepared in "
    )
    assert is_hit(note(local(rows))) and is_hit(note(local(rows), **keys))


@pytest.mark.parametrize(
    "keys",
    [
        {"num_proc": 1}, {"dl_num_workers": 0}, {"seed": 7}, {"pack_samples": True},
        {"pack_samples": True, "packing": "next_fit"}, {"div_length": 8},
        {"pad_to": "max_length"}, {"train_eval_split": (0.5, 0.5)},
        {"fail_on_missing_cache": True}, {"pack_samples": True, "always_max_length": True},
    ],
    ids=str,
)  # fmt: skip
def test_a12_a_key_that_changes_no_document_hits(rows, keys):
    note(local(rows))
    assert is_hit(note(local(rows), **keys))


def test_every_key_is_known_to_change_documents_or_not():
    tried = {key for keys, _ in CHANGES.values() for key in keys} - {"tokenizer"}
    assert tried | SFTDataConfig.NOT_IN_DOCUMENTS == {*SFTDataConfig.model_fields} - {"type"}


def test_an_edited_file_misses_and_a_moved_one_hits(tmp_path, rows):
    note(local(rows))
    (tmp_path / "elsewhere").mkdir()
    moved = rows.rename(tmp_path / "elsewhere" / "others.jsonl")
    assert is_hit(note(local(moved, name="label")))
    moved.write_text(moved.read_text().replace("a3", "a9"))  # the size stays
    assert "differs in records of source 0;" in note(local(moved))


def test_the_tokenizers_content_counts_and_not_its_object(rows):
    note(local(rows))
    same, other = tiny_tokenizer(), tiny_tokenizer()
    same("a text", truncation=True, max_length=2)  # leaves a state behind that changes nothing
    assert is_hit(note(local(rows), tokenizer=same))
    other.add_tokens(["river"])
    assert "differs in the tokenizer;" in note(local(rows), tokenizer=other)
    named = tiny_tokenizer()
    named.bos_token = "<s>"  # templates write it
    assert "differs in the tokenizer;" in note(local(rows), tokenizer=named)


OPTIONS = {
    "columns": {"columns": {"id": "number"}},
    "role_mapping": {"role_mapping": {"user": "q", "assistant": "r"}},
    "content_key": {"content_key": "text"},
}


@pytest.mark.parametrize("keys", OPTIONS.values(), ids=OPTIONS)
def test_options_of_a_source_count(tmp_path, keys):
    rows = [{"id": 1, "q": "a", "r": f"yes {n}", "messages": chat("a", "b")} for n in range(3)]
    path = write(tmp_path / "rows.jsonl", rows)
    note(local(path))
    (key,) = keys
    assert f"differs in source 0: {key};" in note(local(path, **keys))
    assert is_hit(note(local(path, **keys)))


@pytest.mark.parametrize(
    "keys", [{"sample_count": 3}, {"sample_ratio": 0.5}, {"split": "train[:3]"}], ids=str
)
def test_which_rows_are_taken_counts(rows, keys):
    note(local(rows))
    assert "differs in records of source 0;" in note(local(rows, **keys))
    assert is_hit(note(local(rows, split="train[:6]", sample_count=6)))  # all of them


def test_sources_have_an_order(tmp_path, rows):
    other = write(tmp_path / "other.jsonl", [{"messages": chat("b", "no")}])
    note([local(rows), local(other)])
    assert is_hit(note([local(rows, weight=1.0), local(other, weight=3.0)]))
    assert not is_hit(note([local(other), local(rows)]))


def test_tables_are_known_by_their_rows(tmp_path):
    def saved(name, word):
        rows = [{"messages": chat("a", f"{word} {n}")} for n in range(5)]
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
        return HuggingFaceSource(HFDataSourceConfig(name_or_path=str(tmp_path / name)))

    note(saved("one", "yes"))
    assert is_hit(note(saved("two", "yes")))
    assert "differs in records of source 0;" in note(saved("three", "no"))


def test_names_and_dictionaries_of_a_table_count(tmp_path):
    def prepared(name, columns):
        if name == "saved":
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            datasets.Dataset(pa.table(columns)).save_to_disk(folder)
            return note(HuggingFaceSource(HFDataSourceConfig(name_or_path=str(folder))))
        pq.write_table(pa.table(columns), tmp_path / name)
        return note(ParquetSource(LocalDataSourceConfig(path=str(tmp_path / name))))

    for name in ("rows.parquet", "saved"):
        told, asked = pa.array(["yes", "no", "no"]), pa.array(["a", "b", "c"])
        assert not is_hit(prepared(name, {"prompt": asked, "response": told}))
        assert is_hit(prepared(name, {"prompt": asked, "response": told}))
        assert not is_hit(prepared(name, {"response": asked, "prompt": told}))
    other = pa.array(["no", "yes", "yes"])  # the same places in another dictionary
    for replies in (told, other):
        columns = {"prompt": asked, "response": replies.dictionary_encode()}
        assert not is_hit(prepared("rows.parquet", columns))


def test_rows_made_up_are_known_by_their_numbers(tmp_path):
    def made(**keys):
        return SyntheticSource(SyntheticDataSourceConfig(rows=4, **keys))

    note(made())
    assert is_hit(note(made()))
    assert "records of source 0" in note(made(vocab_size=9))
    assert "records of" in note(made(), seed=1)


def test_text_rows_do_not_depend_on_the_length_of_a_row(tmp_path):
    (tmp_path / "a.txt").write_text("The river was low that summer. " * 20)
    source = TextSource(TextDataSourceConfig(path=str(tmp_path / "a.txt")))
    note(source, factory=CausalDataFactory)
    assert is_hit(note(source, factory=CausalDataFactory, max_length=32))


HELPER = "WORD = {word!r}\n"
CODE = """
from jaxtrain.data import DataSource
from jaxtrain.recipe.data import DataSourceConfig
import cache_test_helper

class Config(DataSourceConfig):
    pass

class Told(DataSource):
    name = "told-{stem}"
    config: Config

    def load(self, config, split):
        turns = [{{"role": "user", "content": "a"}}, {{"role": "assistant", "content": "yes"}}]
        return [{{"messages": turns}}]  # {comment}
"""


def test_code_of_the_user_counts_and_what_it_imports_from_beside_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    def told(stem, comment="", word="yes"):
        (tmp_path / "cache_test_helper.py").write_text(HELPER.format(word=word))
        (tmp_path / f"{stem}.py").write_text(CODE.format(stem="x", comment=comment))
        for name in ("cache_test_helper", stem):
            sys.modules.pop(name, None)
        module = __import__(stem)
        return module.Told(module.Config())

    note(told("told_by_user"))
    assert is_hit(note(told("told_by_user")))
    assert "differs in code of source 0;" in note(told("told_by_user", comment="edited"))
    assert "differs in code of source 0;" in note(told("told_by_user", word="no"))


def test_a_source_without_a_file_of_rows_is_read_to_be_known(rows):
    class Listed(DataSource):
        name = "listed-in-a-test"
        config: DataSourceConfig
        word = "yes"

        def load(self, config, split):
            return [{"messages": chat("a", self.word)}]

    source = Listed(DataSourceConfig())
    note(source)
    assert is_hit(note(source))
    Listed.word = "no"  # as a database may change
    assert "differs in records of source 0;" in note(source)


def test_our_own_code_counts(rows, monkeypatch):
    from jaxtrain.data import code_digest
    from jaxtrain.data import factory as factory_module

    note(local(rows))
    before = code_digest.hash_encoding_code()
    monkeypatch.setattr(code_digest, "ENCODING_FILES", code_digest.ENCODING_FILES[:-1])
    assert code_digest.hash_encoding_code() != before
    assert factory_module.hash_encoding_code is code_digest.hash_encoding_code
    assert "differs in jaxtrain's encoding code;" in note(local(rows))


@pytest.mark.covers("data.fail_on_missing_cache")
def test_a_demanded_entry_that_is_missing_is_refused(rows, entries):
    with pytest.raises(DataError) as error:
        note(local(rows), fail_on_missing_cache=True)
    assert str(error.value) == (
        f"data.fail_on_missing_cache: not found in {entries}: nothing prepared yet; "
        f"run `jaxtrain data` with this recipe first"
    )
    assert not entries.exists()


@pytest.mark.covers("data.cache_dir")
def test_the_folder_is_private_or_the_persons_own(tmp_path, rows, entries):
    note(local(rows))
    assert stat.S_IMODE(entries.stat().st_mode) == 0o700
    note(local(rows), cache_dir=str(tmp_path / "shared"))
    (entry,) = (tmp_path / "shared").iterdir()
    os.umask(mask := os.umask(0))
    assert stat.S_IMODE(entry.stat().st_mode) == 0o777 & ~mask


@pytest.mark.parametrize("spoil", ["cut", "remove", "key"])
def test_a_damaged_entry_is_made_again(rows, entries, spoil):
    note(local(rows))
    (entry,) = entries.iterdir()
    if spoil == "cut":
        (entry / "tokens.bin").write_bytes(b"")
    elif spoil == "remove":
        (entry / "index.bin").unlink()
    else:
        (entry / "key.json").write_text("{")
    assert not is_hit(note(local(rows)))
    assert is_hit(note(local(rows)))


def test_a_failed_preparation_leaves_nothing(tmp_path, entries):
    path = write(tmp_path / "bad.jsonl", [{"messages": chat("a", "b")}, {"messages": []}])
    with pytest.raises(DataError, match="empty conversation"):
        note(local(path))
    assert list(entries.iterdir()) == []


def entry_of(cache, name, size):
    return cache.get({"name": name}, lambda folder: (folder / "x").write_bytes(b"0" * size)).folder


def test_the_least_recently_used_entries_go_first(tmp_path):
    cache = DataCache(tmp_path / "c", limit_bytes=3500)
    folders = {}
    for name in ("a", "b", "c"):
        folders[name] = entry_of(cache, name, 1000)
        os.utime(folders[name] / "key.json", (len(folders), len(folders)))
    entry_of(cache, "a", 1000)  # used again
    entry_of(cache, "d", 1000)
    assert [name for name, folder in folders.items() if folder.exists()] == ["a", "c"]
    huge = entry_of(cache, "e", 9000)
    assert [folder.name for folder in (tmp_path / "c").iterdir()] == [huge.name]


def test_what_a_killed_preparation_left_goes_after_a_week(tmp_path):
    cache = DataCache(tmp_path / "c")
    entry_of(cache, "a", 10)
    for name, days in (("old", 8), ("under-way", 6)):
        (tmp_path / "c" / f".new-{name}").mkdir()
        then = time.time() - days * 24 * 3600
        os.utime(tmp_path / "c" / f".new-{name}", (then, then))
    entry_of(cache, "b", 10)
    assert [path.name for path in (tmp_path / "c").glob(".new-*")] == [".new-under-way"]


def test_the_limit_is_the_persons_to_set(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_DATA_CACHE_BYTES", "1500")
    cache = DataCache(tmp_path / "c")
    first, second = entry_of(cache, "a", 1000), entry_of(cache, "b", 1000)
    assert not first.exists() and second.exists()
    monkeypatch.setenv("JAXTRAIN_DATA_CACHE_BYTES", "20G")
    with pytest.raises(RecipeError) as error:
        DataCache(tmp_path / "c")
    assert str(error.value) == ("JAXTRAIN_DATA_CACHE_BYTES: must be a number of bytes, found '20G'")


def test_a_folder_that_cannot_be_is_refused(tmp_path, rows):
    for below, fault in (("rows.jsonl", "File exists"), ("rows.jsonl/c", "Not a directory")):
        with pytest.raises(RecipeError) as error:
            note(local(rows), cache_dir=str(tmp_path / below))
        assert str(error.value) == (
            f"cannot create the cache folder {tmp_path / below}: {fault}; name another one in "
            "data.cache_dir or JAXTRAIN_CACHE"
        )


def test_rows_in_use_outlive_their_entry(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"messages": chat(f"a{n}", "yes")} for n in range(9)])
    factory = SFTDataFactory(SFTDataConfig(sources=("x",)), tiny_tokenizer(), 64)
    data = factory.prepare([local(path)], {}, BatchShape(1, 3))
    before = data.train.batch(data.train.advance(0, 1))
    DataCache(limit_bytes=1).get({"name": "other"}, lambda folder: (folder / "x").write_text("x"))
    assert not is_hit(note(local(path)))  # it was deleted
    assert are_equal(before, data.train.batch(data.train.advance(0, 1)))
