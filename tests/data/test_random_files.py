"""Damaged data files: batches, a ledger and a page, or a DataError that names the file; never
another exception, never a hang, and nothing that a terminal or a browser would obey."""

import csv
import gzip
import io
import json
import shutil
from contextlib import redirect_stdout, suppress
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.data.command import show_data
from jaxtrain.recipe.errors import CONTROL, DataError, RecipeError, printable
from jaxtrain.recipe.resolve import resolve
from tests.data.test_conversation import FORMS as CONVERSATIONS
from tests.data.test_preference import FORMS as PAIRS
from tests.fuzz import WRONG, bounded, damaged, edited, examples
from tests.tiny import CHATML, GENERATION, HEADERS, INST, THINK, chat, tiny_tokenizer

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}
RECORDS = {
    "sft": [
        *CONVERSATIONS.values(),
        {"messages": [*chat("a", "b", "c"), {"role": "assistant", "content": "d", "weight": 0}]},
        {"prompt": "c", "response": "d", "history": [["a", "b"]], "system": "s"},
        {
            "messages": [*chat("a", "<think>x</think>b", system="s"), {"role": "tool", "content": "c"}],
            "tools": [CALL], "chat_template_kwargs": {"x": 1}, "documents": [{"title": "t"}],
        },
        {"messages": [*chat("a"), {"role": "assistant", "tool_calls": [CALL]}], "functions": "[]"},
    ],
    "causal": [{"text": "a b c"}, {"text": "<|im_end|> d", "title": "t"}],
    "dpo": [*PAIRS.values(), {**PAIRS["texts"], "reference_score_chosen": 0.5, "system": "s"}],
    "kto": [{"prompt": "a", "completion": "b", "label": True},
            {"messages": chat("a", "b"), "label": False}],
    "tokens": [{"input_ids": [5, 6, 7], "labels": [5, -100, 7]},
               {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1], "attention_mask": [1, 1, 0]}],
}  # fmt: skip
"""Type of `data`, or tokens → sound records."""
NAMES = st.sampled_from(
    ["messages", "conversations", "prompt", "response", "completion", "instruction", "input", "output",
     "user", "assistant", "system", "history", "tools", "functions", "documents", "text", "label",
     "chosen", "rejected", "input_ids", "labels", "loss_mask", "role", "content", "from", "value",
     "weight", "tool_calls", "arguments", "reasoning_content", "chat_template_kwargs", "x", "", "\x1b[0m",
     "\u202e", "a\ud800", "<script>"]
)  # fmt: skip
VALUES = st.sampled_from(WRONG)
TEMPLATES = (CHATML, HEADERS, INST, THINK, GENERATION)


def lines_of(records):
    return "\n".join(map(json.dumps, records)).encode()


def csv_of(records):
    columns, file = (
        list(dict.fromkeys(name for record in records for name in record)),
        io.StringIO(),
    )
    writer = csv.writer(file)
    as_text = lambda value: value if isinstance(value, str) else json.dumps(value)
    writer.writerows([columns, *([as_text(r.get(c, "")) for c in columns] for r in records)])
    return file.getvalue().encode("utf-8", "surrogatepass")


def table_of(records):
    """A typed table; values that have no common type are JSON."""
    columns = {}
    for name in dict.fromkeys(name for record in records for name in record):
        values = [record.get(name) for record in records]
        try:
            column = pa.array(values)
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            column = pa.array([json.dumps(value) for value in values])
        columns[printable(name)] = column
    return pa.table(columns)


def arrow_of(records, writer=pa.ipc.new_file):
    table, sink = table_of(records), io.BytesIO()
    with writer(sink, table.schema) as file:
        file.write_table(table)
    return sink.getvalue()


def parquet_of(records):
    sink = io.BytesIO()
    try:
        pq.write_table(table_of(records), sink)
    except pa.ArrowException:  # it has no maps without fields
        pq.write_table(pa.table({"text": [json.dumps(record) for record in records]}), sink)
    return sink.getvalue()


FORMATS = {
    "jsonl": lines_of,
    "json": lambda records: json.dumps(records, indent=1).encode(),
    "csv": csv_of,
    "parquet": parquet_of,
    "arrow": arrow_of,
    "feather": lambda records: arrow_of(records, pa.ipc.new_stream),
    "txt": lambda records: csv_of(records).replace(b",", b"\n"),
}


class Page(HTMLParser):
    """Collects the tags of a page."""

    tags: set[str]

    def __init__(self, text):
        super().__init__()
        self.tags = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]


def outcome(folder: Path, kind: str, source: dict, template=CHATML, **keys) -> None:
    """Prepares and shows the data as the command does, and takes a batch."""
    process = kind != "tokens"
    written = {
        "type": kind if process else "sft",
        "model": {"name_or_path": "m"},
        "data": {"sources": [{"process": process, **source}], "num_proc": 1, **keys},
    }
    config = resolve(written, only_data=True).require_config()
    page, printed = folder / "page.html", io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    page.unlink(missing_ok=True)
    with bounded(), redirect_stdout(printed):
        data = show_data(config, tiny_tokenizer(template), max_positions=64, html=page)
        batch = next(iter(data.train_batches(0, 1)))
    assert batch.loss_weights.any() and not batch.loss_weights[batch.segments == 0].any()
    printed.flush()
    assert not CONTROL.search(printed.buffer.getvalue().decode() + page.read_text("utf-8"))
    assert Page(page.read_text("utf-8")).tags <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "table", "thead", "tr",
        "th", "tbody", "td", "svg", "rect", "line", "text", "span", "pre",
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tmp_path_factory.mktemp("rows")


@examples(100, 5000)
@given(st.data())
def test_any_damage_to_a_file(folder, data):
    kind = data.draw(st.sampled_from([*RECORDS]))
    records = data.draw(st.lists(st.sampled_from(RECORDS[kind]), min_size=1, max_size=4))
    if data.draw(st.booleans()):
        records = data.draw(edited(records, NAMES, VALUES))
    form = data.draw(st.sampled_from([*FORMATS]))
    records = [one if isinstance(one, dict) else {"text": one} for one in records] or [{}]
    content = FORMATS[form](records)
    if not data.draw(st.integers(0, 3)):
        content = data.draw(damaged(content))
    packed = data.draw(st.sampled_from(["", "", "", ".gz", ".zst"]))
    if packed:
        content = (
            gzip.compress(content)
            if packed == ".gz"
            else pa.compress(content, "zstd", asbytes=True)
        )
        content = data.draw(st.just(content) | st.just(content) | damaged(content))
    file = folder / f"rows.{form}{packed}"
    file.write_bytes(content)
    keys = {"max_length": 3 if kind == "causal" else 16}
    keys["max_rows_with_errors"] = data.draw(st.sampled_from([0, 2]))
    keys["split_special_tokens"] = data.draw(st.booleans())
    source = {"type": "local", "path": str(file)}
    if kind == "sft" and not data.draw(st.integers(0, 3)):
        source["role_mapping"] = data.draw(
            st.dictionaries(NAMES.filter(bool), NAMES.filter(bool), max_size=2)
            | st.just({r: f"messages.role.{r}" for r in ("user", "assistant")})
        )
    try:
        outcome(folder, kind, source, data.draw(st.sampled_from(TEMPLATES)), **keys)
    except DataError as error:
        assert str(file) in str(error), error


PARTS = st.sampled_from(
    ["train", "test", "validation", "dev", "eval", "data", "a", "é", "\x1b[0m", "-", "_", ".", " ", "[", "*",
     "00000-of-00002", "/", "README", "x" * 200]
)  # fmt: skip
SUFFIXES = st.sampled_from(
    [".jsonl", ".jsonl.gz", ".json", ".csv", ".txt", ".md", ".arrow", ".x", ""]
)
SPLITS = st.sampled_from(
    ["", "train", "test", "eval", "dev", "a", "train[:50%]", "train[9:", "test[1:]", "["]
)


@examples(60, 1000)
@given(st.data())
def test_any_names_in_a_folder(folder, data):
    """Batches, or one message about the names."""
    root = folder / "names"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for _ in range(data.draw(st.integers(0, 4))):
        name = "".join(data.draw(st.lists(PARTS, max_size=4))) + data.draw(SUFFIXES)
        file = root / name.strip("/")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(lines_of(RECORDS["sft"][:2]))
        except OSError:  # it is a folder already, or too long
            continue
    source = {"type": data.draw(st.sampled_from(["local", "jsonl"])), "split": data.draw(SPLITS)}
    source["path"] = str(root) + data.draw(
        st.sampled_from(["", "", "/*", "/**/*.jsonl", "/[", "/train*"])
    )
    if data.draw(st.booleans()):
        source = {"type": "huggingface", "name_or_path": str(root), "split": source["split"]}
    with suppress(DataError, RecipeError):
        outcome(folder, "sft", source)
