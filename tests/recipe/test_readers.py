"""Every key of a recipe is read by something, or its standing says why not."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import jaxtrain
from jaxtrain import registry
from jaxtrain.recipe.mapping import CARRIED, COMPUTED
from jaxtrain.recipe.not_built import TABLE
from jaxtrain.recipe.schema import _sections
from jaxtrain.recipe.standing import NO_EFFECT

PACKAGE = Path(jaxtrain.__file__).parent


def fields() -> Iterator[tuple[str, type[BaseModel], str]]:
    """(dotted key, class, field) of every section that a recipe may have."""

    def below(key: str, cls: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel], str]]:
        for name, field in cls.model_fields.items():
            dotted = f"{key}.{name}".lstrip(".")
            yield dotted, cls, name
            if name not in registry.SECTIONS:
                for inner in _sections(field.annotation):
                    yield from below(dotted, inner)

    for kind in ("trainer", *registry.SECTIONS, "data_source"):
        level = {"trainer": "", "data_source": "data.sources.*", "checkpoint": "checkpoint.*"}.get(
            kind, kind
        )
        for name in registry.names(kind):
            if not registry.is_planned(kind, name):
                yield from below(level, registry.config_class(kind, name))


class _Reads(ast.NodeVisitor):
    """Names that are read off something: `x.name`, and text in calls of getattr and in tables."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.texts: set[str] = set()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.names.add(node.attr)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and node.value.isidentifier():
            self.texts.add(node.value)


def reads(files) -> _Reads:
    found = _Reads()
    for file in files:
        found.visit(ast.parse(file.read_text()))
    return found


EVERYWHERE = reads(sorted(PACKAGE.rglob("*.py")))
BY_TEXT = ("checks", "compose", "resolve")
"""Files of the recipe that look keys up by name."""
RUN = reads(
    f
    for f in sorted(PACKAGE.rglob("*.py"))
    if f.relative_to(PACKAGE).parts[0] != "recipe" or f.stem in BY_TEXT
)
SAID = {
    *NO_EFFECT,
    *(row.key for row in TABLE),
    *(key for key, _ in (*CARRIED, *COMPUTED)),
}
"""Keys that a table of the recipe answers for."""
ALL = sorted({(key, name) for key, _, name in fields()})
REFUSED = {
    key
    for key, cls, name in fields()
    for validator in cls.model_fields[name].metadata
    if getattr(validator, "func", len).__qualname__.startswith("refused_when_on")
}
"""Keys that may only be off."""


def answered(key: str) -> bool:
    """Is the key, or a section around it, in one of the tables?"""
    parts = key.split(".")
    return any(said.startswith(f"{key}.") for said in SAID) or any(
        ".".join(parts[:n]) in SAID for n in range(1, len(parts) + 1)
    )


@pytest.mark.parametrize(("key", "name"), ALL)
def test_a_key_has_a_reader(key, name):
    if name == "type" or key in REFUSED or answered(key):
        return
    is_read = name in EVERYWHERE.names or name in RUN.texts
    assert is_read, f"{key} is accepted, and nothing reads it"


def test_a_planted_key_has_none():
    assert "a_key_that_nobody_reads" not in EVERYWHERE.names | RUN.texts


def test_every_row_of_the_table_is_a_key():
    keys = {key for key, _ in ALL}
    for row in TABLE:
        plain = row.key.replace("data.eval_sources.*.*.", "data.sources.*.").replace(
            "eval_sources", "sources"
        )
        assert plain in keys, row.key
