"""What `docs/data.md` says of records and files is what becomes of them."""

import gzip
import json
import re
from pathlib import Path

import pytest
import yaml

from jaxtrain.data.command import decode_pieces
from jaxtrain.data.factory import build_data_factory, prepare_data
from jaxtrain.data.plan import BatchShape
from jaxtrain.recipe.data import COMPRESSED, FORMATS
from jaxtrain.recipe.errors import UserError
from jaxtrain.recipe.resolve import resolve
from tests.data.made import write
from tests.tiny import chat, tiny_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")}
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools[0].function.name }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments.x }}){% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EXAMPLE = re.compile(
    r"(?:```yaml\n(?P<keys>.*?)```\n)?```json\n(?P<record>.*?)```\n```text\n(?P<shown>.*?)```", re.S
)
TYPES = {"Conversations": "sft", "Tokens": "tokens", "Plain": "causal", "Preferences": "dpo"}
EXAMPLES = [
    pytest.param(TYPES[name.split()[0]], *found.groups(), id=f"{name.split()[0]} {number}")
    for name, text in SECTIONS.items()
    for number, found in enumerate(EXAMPLE.finditer(text))
]

pytestmark = pytest.mark.usefixtures("cache")


def prepare(source, kind="sft"):
    """What a recipe over one source trains on."""
    sources = source if isinstance(source, list) else [source]
    data = {"sources": sources, "max_length": 2 if kind == "causal" else 128, "num_proc": 1}
    written = {"type": kind, "model": {"name_or_path": "m"}, "data": data}
    config = resolve(written, only_data=True).require_config()
    factory = build_data_factory(config, tiny_tokenizer(TEMPLATE), max_positions=128)
    return prepare_data(config, factory, BatchShape(1, 2))


def shown_tokens(tokens, weights):
    """Numbers, with marks around trained ones."""
    text = " ".join(f"⟦{n}⟧" if w else f"{n}" for n, w in zip(tokens, weights, strict=True))
    return text.replace("⟧ ⟦", " ")


def shown_text(tokens, weights):
    """Turns a line each, with marks around trained text."""
    pieces = decode_pieces(tiny_tokenizer(), tokens, weights)
    text = "".join(f"⟦{p.text}⟧" if p.is_trained else p.text for p in pieces).replace("⟧⟦", "")
    text = re.sub(r"<\|im_start\|>(\w+)\n", r"\1: ", text).replace("<|im_end|>⟧\n", "⟧\n")
    return re.sub(r"<\|im_end\|>\n", "\n", text).strip()


@pytest.mark.parametrize(("kind", "keys", "record", "shown"), EXAMPLES)
def test_every_record_of_the_page_is_trained_as_it_says(tmp_path, kind, keys, record, shown):
    record = json.loads(record)
    source = {"path": str(write(tmp_path / "rows.jsonl", [record])), **yaml.safe_load(keys or "{}")}
    if kind == "tokens":
        source["process"] = False
    kind = {"tokens": "sft", "dpo": "kto" if "label" in record else "dpo"}.get(kind, kind)
    data = prepare(source, kind)
    (document,) = data.train.documents.index
    tokens, weights = data.train.documents.tokens, data.train.documents.weights
    middle = int(document["rejected_start"])
    sequences = [slice(0, middle), *([slice(middle, None)] if middle < len(tokens) else [])]
    show = shown_tokens if "process" in source else shown_text
    found = "\n\n".join(show(tokens[part], weights[part]) for part in sequences)
    if kind == "causal":
        found = found.replace("<|im_start|>", "BOS").replace("<|im_end|>", "EOS")
    if kind == "kto":
        found += f"\nlabel {str(bool(document['scores'][0])).lower()}"
    lines = data.ledger.sources[0].lines()
    found += "".join(f"\n{line.strip()}" for line in lines if "not read" in line)
    assert found == shown.strip()


def test_the_page_has_an_example_of_every_form():
    from jaxtrain.data.conversation import FORMS

    records = [json.loads(example.values[2]) for example in EXAMPLES]
    for columns, _ in FORMS:
        assert any(set(columns) <= record.keys() for record in records), columns
    assert {example.values[0] for example in EXAMPLES} == {*TYPES.values()}


def table(section, head):
    rows = section.split(head)[1].split("\n\n")[0].strip().splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.parametrize(
    ("record", "message"), table(SECTIONS["Conversations (`type: sft`)"], "| record | message |")
)
def test_every_refusal_of_the_page_is_one(tmp_path, record, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(record.strip("`"))
    with pytest.raises(UserError) as error:
        prepare({"path": str(file)})
    assert str(error.value) == f"{file}:1: {message}"


def test_the_suffixes_of_the_page_are_those_that_are_read():
    rows = table(SECTIONS["Files"], "| suffix | type of the source | records |")
    told = {suffix: kind.strip("`") for suffixes, kind, _ in rows
            for suffix in re.findall(r"`(\S+)`", suffixes)}  # fmt: skip
    assert told == FORMATS
    assert " or ".join(f"`{suffix}`" for suffix in COMPRESSED) in SECTIONS["Files"]


@pytest.mark.parametrize(
    ("source", "reads"), table(SECTIONS["Files"], "| source | reads |"), ids=lambda cell: cell[:40]
)
def test_every_source_of_the_page_reads_the_files_that_it_says(
    tmp_path, monkeypatch, source, reads
):
    monkeypatch.chdir(tmp_path)
    for name in SECTIONS["Files"].split("```\n")[1].splitlines():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"messages": chat("?", name)})
        file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    written = yaml.safe_load(source.strip("`"))
    if reads.startswith("refused: "):
        with pytest.raises(UserError) as error:
            prepare(written)
        assert str(error.value).removeprefix(f"{tmp_path}/") == reads.removeprefix("refused: ")
        return
    documents = prepare(written).train.documents
    text = tiny_tokenizer().decode(documents.tokens[documents.weights > 0])
    assert text.removesuffix("<|im_end|>").split("<|im_end|>") == reads.split(", ")


def test_a_path_belongs_to_the_file_that_has_it(tmp_path, monkeypatch):
    assert "beside the recipe file that it is written in" in PAGE
    for folder in ("base", "run", "current"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "rows.jsonl", [{"messages": chat("?", folder)}])
    monkeypatch.chdir(tmp_path / "current")
    (tmp_path / "base" / "base.yaml").write_text("data: {sources: [rows.jsonl]}")
    recipe = tmp_path / "run" / "recipe.yaml"

    def source(text):
        recipe.write_text(f"{text}\nmodel: {{name_or_path: m}}")
        return resolve(recipe).require_config().data.sources[0].path

    of_base, own = "base: ../base/base.yaml", "data: {sources: [rows.jsonl]}"
    assert source(of_base) == str(tmp_path / "base" / "rows.jsonl")
    assert source(f"{of_base}\n{own}") == str(tmp_path / "run" / "rows.jsonl")
    (tmp_path / "base" / "rows.jsonl").unlink()
    assert source(of_base) == str(tmp_path / "run" / "rows.jsonl")
    (tmp_path / "run" / "rows.jsonl").unlink()
    assert source(own) == source(of_base) == str(tmp_path / "current" / "rows.jsonl")


def test_the_mixture_of_the_page_has_the_counts_that_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    part = SECTIONS["Files"].split("### Mixtures")[1]
    written, shown = re.findall(r"```(?:yaml|text)\n(.*?)```", part, re.S)
    for count, name in zip(
        re.findall(r"\d+", part.split("```")[0]), ("small", "large"), strict=True
    ):
        rows = [{"messages": chat(f"{name} {n}?", "yes")} for n in range(int(count))]
        write(tmp_path / f"{name}.jsonl", rows)
    sources = yaml.safe_load(written)["sources"]
    lines = [line for line in prepare(sources).ledger.lines() if line.startswith("mixture")]
    assert [line.replace(f"{tmp_path}/", "") for line in lines] == shown.splitlines()
