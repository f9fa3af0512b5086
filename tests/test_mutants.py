"""The list of mutations fits the code, and its script tells the killed from the living."""

import ast
from functools import cache
from pathlib import Path

import pytest

from tests import mutants
from tests.mutants import Mutation


@cache
def names_in(file: str) -> set[str]:
    nodes = ast.parse((mutants.ROOT / "tests" / file).read_text()).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_every_mutation_changes_a_line_and_names_a_test():
    found = mutants.read_mutations().values()
    assert len(found) >= 64 and len({str(mutation) for mutation in found}) == len(found)
    for mutation in found:
        ast.parse(mutation.change((mutants.ROOT / "jaxtrain" / mutation.file).read_text()))
        file, _, name = mutation.test.partition("::")
        assert not name or name.partition("[")[0] in names_in(file), mutation.test


@pytest.fixture
def tree(tmp_path) -> Path:
    """A package of one line, and its test."""
    for file, text in {
        "jaxtrain/one.py": "one = 1  # one\n",
        "tests/test_one.py": "def test_one():\n    from jaxtrain import one\n    assert one.one == 1",
    }.items():
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(text)
    return tmp_path


def test_only_failed_tests_kill(tree, capsys, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # none is needed here
    killed, harmless, absent = (
        Mutation("one.py", f"test_one.py{test}", "= 1", new)
        for test, new in (("", "= 2"), ("", "= 2 - 1"), ("::test_two", "= 2"))
    )
    assert mutants.run({1: killed}, tree, 1) == 0
    assert mutants.run({1: killed, 2: harmless}, tree, 1) == 1
    assert "ALIVE" in capsys.readouterr().out
    assert mutants.plant(absent, tree).status not in (0, mutants.FAILED)
    assert (tree / "jaxtrain" / "one.py").read_text() == "one = 1  # one\n"
    (tree / "jaxtrain" / "one.py").write_text("one = 3\n")
    assert mutants.run({1: killed}, tree, 1) == 1
    assert "must pass first" in capsys.readouterr().out


def test_a_mutation_of_what_is_not_there_is_an_error(tree):
    for old in ("= 2", "e"):
        with pytest.raises(ValueError, match=r"must occur once, found [02] times"):
            mutants.plant(Mutation("one.py", "test_one.py", old, "x"), tree)
