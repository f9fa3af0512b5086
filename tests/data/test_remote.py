"""Files at URLs: copied once, again when they change, and named when they cannot be had."""

import gzip
import http.server
import json
import threading
from functools import partial

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jaxtrain.data import CsvSource, JsonLinesSource, LocalSource, TextSource
from jaxtrain.recipe.data import (
    AnyLocalDataSourceConfig,
    LocalDataSourceConfig,
    TextDataSourceConfig,
    source_from_text,
)
from jaxtrain.recipe.errors import DataError, RecipeError
from jaxtrain.recipe.resolve import resolve
from tests.data.made import sft
from tests.tiny import chat

ROWS = [{"messages": chat(f"é{n}", "yes")} for n in range(4)]
LINES = "\n".join(map(json.dumps, ROWS)).encode()

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


def read(path, cls=JsonLinesSource, section=LocalDataSourceConfig, **keys):
    rows = cls(section(path=path, **keys)).read("train")
    return [rows[index] for index in range(len(rows))]


def test_a_file_at_a_url_is_read_as_a_local_one(memory):
    memory.pipe("/a/rows.jsonl", LINES)
    memory.pipe("/a/rows.jsonl.gz", gzip.compress(LINES))
    memory.pipe("/a/rows.csv", b"prompt,response\na,b\n")
    assert read("memory://a/rows.jsonl") == ROWS
    assert read("memory://a/rows.jsonl", split="train[1:2]") == ROWS[1:2]
    assert read("memory://a/rows.jsonl.gz") == ROWS
    assert read("memory://a/rows.csv", CsvSource) == [{"prompt": "a", "response": "b"}]


def test_patterns_folders_and_lists_are_in_the_order_of_their_names(memory, tmp_path):
    for name in ("c", "a", "b"):
        memory.pipe(f"/d/{name}.jsonl", json.dumps({"id": name}).encode())
    memory.pipe("/d/notes.log", b"no rows")
    anything = partial(read, cls=LocalSource, section=AnyLocalDataSourceConfig)
    assert [row["id"] for row in anything("memory://d/*.jsonl")] == ["a", "b", "c"]
    assert [row["id"] for row in anything("memory://d")] == ["a", "b", "c"]
    (tmp_path / "x.jsonl").write_text('{"id": "x"}')
    both = ("memory://d/c.jsonl", str(tmp_path / "x.jsonl"))
    assert [row["id"] for row in anything(both)] == ["c", "x"]


def test_a_file_is_copied_once_and_again_when_it_changes(memory, cache, capsys):
    memory.pipe("/a.jsonl", LINES)
    read("memory://a.jsonl")
    assert "fetching /a.jsonl, 0.0 MB" in capsys.readouterr().err
    read("memory://a.jsonl")
    assert capsys.readouterr().err == ""
    memory.pipe("/a.jsonl", b'{"id": 1}')
    assert read("memory://a.jsonl") == [{"id": 1}]
    assert "fetching" in capsys.readouterr().err
    assert (cache / "remote").stat().st_mode & 0o077 == 0  # rows may be private


def test_a_copy_that_gives_way_to_the_next_is_read_all_the_same(memory, cache, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_DATA_CACHE_BYTES", "1")
    memory.pipe("/a.jsonl", b'{"id": 1}')
    memory.pipe("/b.jsonl", b'{"id": 2}')
    assert read(("memory://a.jsonl", "memory://b.jsonl")) == [{"id": 1}, {"id": 2}]
    (kept,) = (cache / "remote").iterdir()
    assert (kept / "0-b.jsonl").is_file()


class Stored(MemoryFileSystem):
    """The same memory under another protocol."""

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix(f"{cls.protocol}://"))


class Silent(Stored):
    """Says nothing that tells one content from another."""

    protocol = "silent"

    def info(self, path, **options):
        return {k: v for k, v in super().info(path).items() if k != "created"}


def test_a_file_that_may_have_changed_is_copied_again(memory):
    fsspec.register_implementation("silent", Silent, clobber=True)
    memory.pipe("/a.jsonl", b'{"id": 1}')
    assert read("silent://a.jsonl") == [{"id": 1}]
    memory.pipe("/a.jsonl", b'{"id": 2}')
    assert read("silent://a.jsonl") == [{"id": 2}]


def test_where_a_file_lies_changes_no_prepared_row(memory, tmp_path):
    memory.pipe("/a.jsonl", LINES)
    (tmp_path / "local.jsonl").write_bytes(LINES)
    notes = [
        sft([JsonLinesSource(LocalDataSourceConfig(path=path))]).ledger.notes[0].split(",")[0]
        for path in (str(tmp_path / "local.jsonl"), "memory://a.jsonl")
    ]
    assert notes == ["cache: miss", "cache: hit"]


def test_a_bad_record_names_file_and_line(memory):
    memory.pipe("/a/rows.jsonl", b'{"id": 1}\n{"id": \n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not JSON"):
        read("memory://a/rows.jsonl")


class Locked(Stored):
    protocol = "locked"

    def info(self, path, **options):
        raise type("NoCredentialsError", (Exception,), {})("unable to locate credentials\nat all")


class Broken(Stored):
    protocol = "broken"

    def get_file(self, rpath, lpath, **options):
        with open(lpath, "wb") as file:
            file.write(b"{")
        raise ConnectionError("reset by peer")


FAULTS = {
    "memory://no/such.jsonl": "memory://no/such.jsonl: no such file",
    "memory://no/*.jsonl": "no file matches memory://no/*.jsonl",
    "memory://logs": "folder memory://logs holds no data file; known are .json, .jsonl, .ndjson, .parquet, "
    ".arrow, .feather, .csv, .txt, .text, .md",
    "nope://a.jsonl": "nope://a.jsonl: cannot be read: ValueError: Protocol not known: nope",
    "absent://a.jsonl": "absent://a.jsonl: needs a package that is not installed: install absentfs",
    "locked://a.jsonl": "locked://a.jsonl: cannot be read: NoCredentialsError: unable to locate "
    "credentials",
    "broken://a.jsonl": "broken://a.jsonl: cannot be read: ConnectionError: reset by peer",
}


@pytest.mark.parametrize(("url", "message"), FAULTS.items(), ids=FAULTS)
def test_what_cannot_be_read_is_named(memory, cache, url, message):
    fsspec.register_implementation("absent", "absentfs.FS", errtxt="install absentfs", clobber=True)
    fsspec.register_implementation("locked", Locked, clobber=True)
    fsspec.register_implementation("broken", Broken, clobber=True)
    memory.pipe("/logs/a.log", b"x")
    memory.pipe("/a.jsonl", LINES)
    with pytest.raises(RecipeError) as error:
        read(url, LocalSource, AnyLocalDataSourceConfig)
    assert str(error.value) == message
    left = [path for path in cache.rglob("*") if path.is_file()]
    assert left == []  # nothing half copied


class Untouchable(Stored):
    protocol = "untouchable"

    def __init__(self, *args, **options):
        raise AssertionError("a check opened a file system")


def test_a_check_fetches_nothing():
    fsspec.register_implementation("untouchable", Untouchable, clobber=True)
    url = "untouchable://bucket/rows-*.jsonl.gz"
    sources = [url, {"type": "local", "path": [url]}]
    recipe = {"model": {"name_or_path": "m"}, "data": {"sources": sources}}
    resolved = resolve(recipe)
    assert resolved.faults == () and resolved.config is not None
    assert resolved.config.data.sources[0].path == url


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://b/x.jsonl", {"type": "jsonl", "path": "s3://b/x.jsonl"}),
        ("s3://b/x.csv:train[:9]", {"type": "csv", "path": "s3://b/x.csv", "split": "train[:9]"}),
        ("https://h/x.parquet?a=1", {"type": "parquet", "path": "https://h/x.parquet?a=1"}),
        ("s3://b/rows", {"type": "default", "name_or_path": "s3://b/rows"}),
    ],
)
def test_a_url_as_a_string(text, expected):
    assert source_from_text(text, registered=[], default="default") == expected


def test_over_http(tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec reads http with it")
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "rows.txt").write_bytes(b"one\ntwo\n")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/rows.txt?key=1"
        assert read(url, TextSource, TextDataSourceConfig, per_line=True)[1] == {"text": "two"}
        with pytest.raises(RecipeError, match="missing.txt.*: no such file"):
            read(url.replace("rows", "missing"), TextSource, TextDataSourceConfig)
    finally:
        server.shutdown()
