import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxtrain.data import (
    ArrowSource,
    CsvSource,
    HuggingFaceInstructSource,
    HuggingFaceSource,
    JsonLinesSource,
    JsonSource,
    LocalSource,
    ParquetSource,
    TextSource,
)
from jaxtrain.data.conversation import read_conversation
from jaxtrain.recipe.data import (
    HFDataSourceConfig,
    LocalDataSourceConfig,
    source_from_text,
)
from jaxtrain.recipe.errors import DataError, RecipeError

ROWS = [{"id": n, "messages": [{"role": "user", "content": f"é{n}"}]} for n in range(10)]


def read(cls, path, split="train", **keys):
    path = [str(p) for p in path] if isinstance(path, list) else str(path)
    config = cls.__annotations__.get("config") or LocalDataSourceConfig
    return cls(config(path=path, **keys)).read(split)


def all_rows(rows):
    return [rows[index] for index in range(len(rows))]


def failure(cls, path, **keys):
    with pytest.raises((DataError, RecipeError)) as error:
        all_rows(read(cls, path, **keys))
    return type(error.value), str(error.value)


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def jsonl(tmp_path):
    return write(tmp_path / "rows.jsonl", "\n".join(json.dumps(row) for row in ROWS))


def test_every_format_gives_the_same_rows(tmp_path, jsonl):
    array = write(tmp_path / "rows.json", json.dumps(ROWS, indent=1, ensure_ascii=False))
    lines = write(tmp_path / "lines.json", jsonl.read_bytes())
    packed = write(tmp_path / "rows.jsonl.gz", gzip.compress(jsonl.read_bytes()))
    zipped = tmp_path / "rows.jsonl.zst"
    with pa.CompressedOutputStream(str(zipped), "zstd") as stream:
        stream.write(jsonl.read_bytes())
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "rows.parquet")
    for name, kind in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with kind(tmp_path / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
        assert all_rows(read(ArrowSource, tmp_path / name)) == ROWS
        assert all_rows(read(LocalSource, tmp_path / name)) == ROWS
    assert all_rows(read(JsonLinesSource, jsonl)) == ROWS
    assert all_rows(read(JsonSource, array)) == ROWS
    assert all_rows(read(JsonSource, lines)) == ROWS
    assert all_rows(read(JsonLinesSource, packed)) == ROWS
    assert all_rows(read(JsonLinesSource, zipped)) == ROWS
    assert all_rows(read(ParquetSource, tmp_path / "rows.parquet")) == ROWS


def test_fields_of_one_turn_are_not_given_to_the_others(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "name": "f"}]}, {}]
    path = write(tmp_path / "rows.json", json.dumps(rows))
    assert all_rows(read(JsonSource, path)) == rows


def test_a_typed_table_gives_no_call_the_arguments_of_another(tmp_path):
    """Parquet and `datasets` fill the keys of all maps into each, with null."""
    calls = [{"function": {"name": name, "arguments": {name: 1}}} for name in "fg"]
    rows = [
        {"messages": [{"role": "assistant", "content": "", "tool_calls": calls}], "system": None}
    ]
    saved = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), saved)
    assert all_rows(read(ParquetSource, saved)) == rows
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    config = HFDataSourceConfig(name_or_path=str(tmp_path / "saved"))
    assert all_rows(HuggingFaceSource(config).read("train")) == rows


def test_csv_values_are_text_and_may_hold_line_breaks(tmp_path):
    path = write(tmp_path / "a.csv", '\ufeffprompt,response\r\n1,"x\ny ""z"""\r\n\r\n007,\r\n')
    rows = read(CsvSource, path)
    assert all_rows(rows) == [
        {"prompt": "1", "response": 'x\ny "z"'},
        {"prompt": "007", "response": ""},
    ]
    assert rows.where(1) == f"{path}:5"


@pytest.mark.covers("data.sources.*.per_line")
def test_text_is_a_row_a_file_or_a_line(tmp_path):
    path = write(tmp_path / "a.txt", "one\n\ntwo\n")
    assert all_rows(read(TextSource, path)) == [{"text": "one\n\ntwo\n"}]
    lines = read(TextSource, path, per_line=True, column="t")
    assert all_rows(lines) == [{"t": "one"}, {"t": "two"}]
    assert lines.where(1) == f"{path}:3"


@pytest.mark.covers("data.sources.*.path")
def test_files_globs_lists_and_folders(tmp_path, jsonl):
    (tmp_path / "more").mkdir()
    other = write(tmp_path / "more" / "b.json", '[{"id": 11}]')
    write(tmp_path / "more" / "notes.log", "no data")
    write(tmp_path / "README.md", "about the rows")
    write(tmp_path / "more" / ".b.json.swp.json", "not to be seen")
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "c.jsonl", "not to be seen")
    assert len(read(LocalSource, tmp_path)) == 11
    assert len(read(LocalSource, [jsonl, other])) == 11
    write(tmp_path / ".rows.jsonl", "not to be seen")
    for pattern in ("*.jsonl", "**.jsonl", "**/r*.jsonl", "ro[v-w]s.jsonl"):
        assert len(read(JsonLinesSource, tmp_path / pattern)) == 10
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "README.md", "a text among texts")
    assert len(read(LocalSource, tmp_path / "texts")) == 1
    rows = read(LocalSource, [jsonl, other], columns={"id": "number"})
    assert rows[10] == {"number": 11} and rows.where(10) == f"{other}:1: record 0"


@pytest.mark.covers("data.sources.*.split")
@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train", range(10)),
        ("eval", range(10)),
        ("train[:3]", range(3)),
        ("train[8:]", (8, 9)),
        ("eval[-2:]", (8, 9)),
        ("train[:20%]", (0, 1)),
        ("train[50%:70%]", (5, 6)),
    ],
)
def test_splits_of_a_file_are_slices(jsonl, split, numbers):
    rows = read(JsonLinesSource, jsonl, split)
    assert [row["id"] for row in all_rows(rows)] == list(numbers)


TREES = {
    "shards": (["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"],
               {"train": [0], "test": [1], "eval": [1]}),
    "shards of splits with names of their own": (
        ["data/train_sft-00000-of-00002.jsonl", "data/train_gen-00000-of-00001.jsonl",
         "data/train_sft-00001-of-00002.jsonl"],
        {"train_sft": [0, 2], "train_gen": [1], "train": "known are train_gen, train_sft"}),
    "file names": (["train.jsonl", "dev.jsonl"],
                   {"train": [0], "dev": [1], "validation": [1], "eval": [1],
                    "test": "known are validation, train"}),
    "folder names": (["training/a.jsonl", "x/my-test.v2/a.jsonl", "val/train.jsonl"],
                     {"train": [0], "test": [1], "validation": [2], "eval": [1]}),
    "no split": (["a.jsonl", "trainer.jsonl", "contest/b.jsonl"],
                 {"train": [0, 1, 2], "eval": [0, 1, 2], "test": "known are train, eval"}),
    "one split": (["test-a.jsonl", "test-b.jsonl"],
                  {"train": [0, 1], "eval": [0, 1], "test": [0, 1]}),
    "some without": (["questions.jsonl", "questions-test.jsonl"],
                     {"train": "others that name no split, such as questions.jsonl"}),
}  # fmt: skip


@pytest.mark.parametrize(("names", "expected"), TREES.values(), ids=TREES)
@pytest.mark.parametrize("form", ["local", "jsonl", "glob", "huggingface", "remote"])
def test_splits_that_the_names_of_files_tell_are_kept_apart(tmp_path, form, names, expected):
    root = tmp_path / "set"
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write(root / name, json.dumps({"id": number}))

    def ids(split):
        if form == "huggingface":
            config = HFDataSourceConfig(name_or_path=str(root))
            rows = HuggingFaceSource(config).read(split)
        elif form in ("glob", "remote"):
            path = root / "**" / "*.jsonl" if form == "glob" else f"file://{root}"
            rows = read(LocalSource, path, split=split)
        else:
            rows = read(LocalSource if form == "local" else JsonLinesSource, root, split=split)
        return sorted(row["id"] for row in all_rows(rows))

    for split, numbers in expected.items():
        if isinstance(numbers, str):
            with pytest.raises((DataError, RecipeError), match=numbers):
                ids(split)
        else:
            assert ids(split) == numbers
            assert ids(f"{split}[:1]") == numbers[:1] or form != "local"


def test_linked_folders_are_read_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere" / "a.jsonl", '{"id": 1}')
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "b.jsonl", '{"id": 2}')
    for name, target in {"linked": "../elsewhere", "again": "linked", "self": "."}.items():
        (folder / name).symlink_to(target)
    assert [row["id"] for row in all_rows(read(LocalSource, folder))] in ([1, 2], [2, 1])


@pytest.mark.covers(
    "data.sources.*.sample_ratio data.sources.*.sample_count data.sources.*.sample_seed"
)
def test_samples_are_drawn_once_and_kept_in_order(jsonl):
    drawn = [row["id"] for row in all_rows(read(JsonLinesSource, jsonl, sample_count=4))]
    assert len(drawn) == 4 and drawn == sorted(drawn)
    assert all_rows(read(JsonLinesSource, jsonl, sample_ratio=0.4)) == [ROWS[n] for n in drawn]
    other = read(JsonLinesSource, jsonl, sample_count=4, sample_seed=1)
    assert [row["id"] for row in all_rows(other)] != drawn
    assert len(read(JsonLinesSource, jsonl, sample_count=99)) == 10


EXPECTED = "must be a list of objects, or one object per line"
DEEP, DIGITS = '{"a": ' + "[" * 9000, '{"a": ' + "9" * 9000 + "}"
CASES = {
    "no comma": (
        JsonSource,
        '[{"a":1} {"b":2}]',
        ":1: record 0: not JSON: Extra data at column 9, found '{\"b\":2}'",
    ),
    "a column twice": (CsvSource, "a,b,a\n1,2,3", ":1: the header has column 'a' twice"),
    "comma at the end": (
        JsonSource,
        '[{"a":1},]',
        ":1: record 1: not JSON: Expecting value at column 1, found ''",
    ),
    "cut off": (JsonSource, '[{"a":1}', ": ends before its list does; is the file cut off?"),
    "open text": (JsonSource, '[{"a":\n"x}]', ':2: not JSON: " without its pair'),
    "wrong bracket": (JsonSource, '[{"a":1}}', ":1: not JSON: } without its pair"),
    "one object": (
        JsonSource,
        '{"a":\n1}',
        f":1: {EXPECTED}, found one object over several lines",
    ),
    "empty list": (JsonSource, "[]", ": no records"),
    "empty file": (JsonSource, "", ": the file is empty"),
    "a number": (JsonSource, "5", f":1: {EXPECTED}, found '5'"),
    "list of numbers": (JsonSource, "[\n1]", ":2: record 0: must be an object, found 1"),
    "more text": (JsonSource, '[{"a":1}]\nx', ":2: text after the end of the list"),
    "second object": (
        JsonSource,
        '[{"a":1},\n{"a":\n}]',
        ":3: record 1: not JSON: Expecting value at column 1, found '}'",
    ),
    "line 2": (
        JsonLinesSource,
        '{"a":1}\n{"a":\n',
        ":2: not JSON: Expecting value at column 6, found ''",
    ),
    "line 3": (
        JsonLinesSource,
        '{"a":1}\n\n{a:1}\n',
        ":3: not JSON: Expecting property name enclosed in double quotes at column 2, found 'a:1}'",
    ),
    "deep": (
        JsonLinesSource,
        f'{{"a":1}}\n{DEEP}',
        f":2: not JSON: nested too deeply at column 1, found '{DEEP[:58]}…",
    ),
    "digits": (
        JsonLinesSource,
        DIGITS,
        f":1: not JSON: a number of too many digits at column 1, found '{DIGITS[:58]}…",
    ),
    "blank": (JsonLinesSource, " \n\n", ": no records"),
    "not utf-8": (
        JsonLinesSource,
        b'{"a":"b"}\n{"a":"\xff"}',
        ":2: not UTF-8, found byte 0xff; save the file as UTF-8",
    ),
    "width": (CsvSource, "a,b\n1,2,3\n", ":2: 3 values, but the header has 2 columns: a, b"),
    "open quote": (CsvSource, 'a,b\n1,"2\n', ":2: not CSV: unexpected end of data"),
    "carriage return": (
        CsvSource,
        "a,b\n1,2\r3\n",
        ":2: not CSV: a carriage return outside quotes; end lines with a line feed",
    ),
    "one value": (CsvSource, "a,b\n1\n", ":2: 1 value, but the header has 2 columns: a, b"),
    "header alone": (CsvSource, "a,b\n", ": no records"),
    "nothing behind the mark": (CsvSource, "\ufeff", ": no records"),
}


@pytest.mark.parametrize(("cls", "content", "message"), CASES.values(), ids=CASES)
def test_a_broken_file_is_named_with_its_line(tmp_path, cls, content, message):
    path = write(tmp_path / "bad", content)
    assert failure(cls, path) == (DataError, f"{path}{message}")


DAMAGE = {
    lambda file: file.replace(b"\3\0\0\0\6\0\0\0", b"\3\0\0\0\0\0\0\x70"): "offset",
    lambda file: file.replace(b"\3\0\0\0\6\0\0\0", b"\xff\xff\xff\xff\6\0\0\0"): "offset",
    lambda file: file.replace(b"abcdef", b"ab\xffdef"): "UTF8",
    lambda file: file.replace(b"texts", b"\xffexts"): "'utf-8' codec can't decode",
    lambda file: file.replace(b"item", b"\xfftem"): "'utf-8' codec can't decode",
}
"""Damage of a table of lists → what is wrong; pyarrow itself would follow it out of its memory."""


def test_broken_binary_files(tmp_path):
    path = write(tmp_path / "a.parquet", "PAR1 and nothing else")
    kind, message = failure(ParquetSource, path)
    assert kind is DataError and message.startswith(f"{path}: not a readable Parquet file")
    for content in ("ARROW1 and nothing else", "nothing"):
        path = write(tmp_path / "a.arrow", content)
        kind, message = failure(ArrowSource, path)
        assert kind is DataError
        assert message.startswith(f"{path}: not a readable Arrow file")
    numbers = pa.table({"a": list(range(20_000))})
    pq.write_table(numbers, tmp_path / "a.parquet", use_dictionary=False)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[1000:9000] = b"\xff" * 8000  # of a page, so that the file opens
    path = write(tmp_path / "a.parquet", content)
    kind, message = failure(ParquetSource, path)
    assert kind is DataError and message.startswith(f"{path}: not a readable Parquet file")
    for damage, why in DAMAGE.items():
        sink = io.BytesIO()
        table = pa.table({"texts": [["abc", "def"]]})
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        path = write(tmp_path / "a.arrow", damage(sink.getvalue()))
        kind, message = failure(ArrowSource, path)
        assert kind is DataError and message.startswith(f"{path}: not a readable Arrow file: ")
        assert why in message
    path = write(tmp_path / "a.jsonl.gz", "not packed")
    kind, message = failure(JsonLinesSource, path)
    assert kind is DataError and message.startswith(f"{path}: cannot be unpacked")


def test_what_the_recipe_names_and_is_not_there(tmp_path):
    assert failure(JsonSource, tmp_path / "a.json") == (
        RecipeError,
        f"no file or folder '{tmp_path}/a.json'",
    )
    pattern = f"{tmp_path}/*.jsonl"
    assert failure(JsonLinesSource, pattern) == (RecipeError, f"no file matches {pattern!r}")
    message = failure(LocalSource, tmp_path)[1]
    assert message.startswith(f"folder {tmp_path} holds no data file; known are .json")
    path = write(tmp_path / "a.dat", "x")
    assert failure(LocalSource, path)[1].startswith(f"{path}: unknown suffix")


def test_a33_a_split_that_is_not_there_lists_those_that_are(jsonl):
    assert failure(JsonLinesSource, jsonl, split="traim") == (
        DataError,
        f"{jsonl}: no split 'traim'; known are train, eval; did you mean `train`?",
    )
    assert failure(JsonLinesSource, jsonl, split="train[4:4]")[1].endswith(
        "split 'train[4:4]' is empty; train has 10 records"
    )


def test_columns_that_are_not_there(jsonl):
    assert failure(JsonLinesSource, jsonl, columns={"massages": "messages"}) == (
        DataError,
        f"{jsonl}:1: no column 'massages', found id, messages; did you mean `messages`?",
    )
    assert failure(JsonLinesSource, jsonl, role_mapping={"user": "ids"}) == (
        DataError,
        f"{jsonl}:1: no column 'ids', found id, messages; did you mean `id`?",
    )


def test_memory_does_not_grow_with_the_rows(tmp_path):
    import tracemalloc

    path = tmp_path / "many.jsonl"
    with path.open("w") as file:
        for n in range(50_000):
            file.write(f'{{"n": {n}, "text": "{"x" * 100}"}}\n')
    tracemalloc.start()
    rows = read(JsonLinesSource, path)
    total = sum(rows[index]["n"] for index in range(0, len(rows), 10))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == sum(range(0, 50_000, 10))
    assert peak < 50_000 * 16 * 2  # two integers a row, and room for growing


def saved_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"query": f"q{n}", "response": f"r{n}"} for n in range(4)])
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "saved")
    rows.save_to_disk(tmp_path / "one:split")
    return tmp_path


def instruct(name, **keys):
    return HuggingFaceInstructSource(HFDataSourceConfig(name_or_path=str(name), **keys))


@pytest.mark.covers("data.sources.*.role_mapping", "data.sources.*.split_mapping")
def test_folders_that_datasets_saved(tmp_path):
    folder = saved_folder(tmp_path)
    mapping = {"assistant": "response", "user": "query"}
    rows = instruct(f"{folder}/saved:train[1:3]", role_mapping=mapping).read("train")
    assert [turn["content"] for turn in rows[0]["messages"]] == ["q1", "r1"] and len(rows) == 2
    assert rows.where(0) == f"{folder}/saved:train: record 1"
    assert len(instruct(f"{folder}/one:split").read("eval")) == 4
    mapped = instruct(f"{folder}/saved", split_mapping={"eval": "test"})
    assert len(mapped.read("eval")) == 1
    with pytest.raises(DataError, match="no split 'eval'; known are train, test"):
        instruct(f"{folder}/saved").read("eval")


@pytest.mark.covers("data.sources.*.name_or_path", "data.sources.*.kwargs")
def test_a34_local_files_by_the_hubs_source(tmp_path, jsonl):
    assert len(instruct(f"{jsonl}:train[:2]").read("train")) == 2
    config = HFDataSourceConfig(
        name_or_path="json", kwargs={"data_files": str(jsonl), "cache_dir": str(tmp_path / "c")}
    )
    assert len(HuggingFaceSource(config).read("train")) == 10


def test_a_data_set_that_is_nowhere(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError) as error:
        instruct("nobody/nothing-of-this-name").read("train")
    assert str(error.value).startswith(
        f"data set 'nobody/nothing-of-this-name' is not a local file, and cannot be read from "
        f"{datasets.config.HF_DATASETS_CACHE} or the hub: "
    )


def test_known_data_sets_need_no_mapping(monkeypatch):
    source = instruct("Open-Orca/OpenOrca")
    monkeypatch.setattr(
        source,
        "load",
        lambda config, split: [{"system_prompt": "", "question": "q", "response": "r"}],
    )
    row = source.read("train")[0]
    assert [turn["role"] for turn in read_conversation(row).messages] == ["user", "assistant"]
    source = instruct("nvidia/AceMath-Instruct-Training-Data")
    turns = [{"role": "user", "content": "1+1"}]
    monkeypatch.setattr(source, "load", lambda *_: [{"messages": turns, "answer": "2"}])
    assert [turn["content"] for turn in source.read("train")[0]["messages"]] == ["1+1", "2"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("chitchat:eval[:5]", {"type": "chitchat", "split": "eval[:5]"}),
        ("chats.jsonl", {"type": "jsonl", "path": "chats.jsonl"}),
        (
            "chats.json.gz:train[:9]",
            {"type": "json", "path": "chats.json.gz", "split": "train[:9]"},
        ),
        ("org/name:train[:9]", {"type": "default", "name_or_path": "org/name:train[:9]"}),
        ("org/name", {"type": "default", "name_or_path": "org/name"}),
    ],
)
def test_sources_written_as_a_string(text, expected):
    assert source_from_text(text, registered=["chitchat"], default="default") == expected


def test_a34_a_colon_in_a_path_is_no_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a:b.jsonl", "{}")
    found = source_from_text("a:b.jsonl", registered=[], default="default")
    assert found == {"type": "jsonl", "path": "a:b.jsonl"}
