"""The floors of the package: a file imports only from lower floors, and some packages only in
their folder."""

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import jaxtrain
from tests.runs import environment, recipe

PACKAGE = Path(jaxtrain.__file__).parent
FLOORS = (
    {
        "recipe",
        "registry",
        "hooks",
        "batch",
        "assets",
        "model_folder",
        "gguf_file",
        "files",
        "signals",
        "environment",
    },
    {"kernels", "parallel"},
    {"tokenizer", "data", "model", "optimizer", "scheduler"},
    {"checkpoint", "metrics"},
    {"trainer", "plan", "export", "preflight", "generate", "evaluate", "harness"},
    {"cli", "explain", "trainers", "__main__", "__init__"},
)
MAY_KNOW_SIBLINGS = {0, 4, 5}
HOMES = {
    "jax": {
        "kernels",
        "parallel",
        "model",
        "optimizer",
        "scheduler",
        "checkpoint",
        "metrics",
        "trainer",
        "plan",
        "preflight",
        "generate",
        "harness",
    },
    "flax": {"model"},
    "orbax": {"checkpoint"},
    "optax": {"optimizer", "trainer"},
    "transformers": {"tokenizer", "data"},
    "torch": set(),
    "tensorboardX": {"metrics"},
    "wandb": {"metrics"},
    "lm_eval": {"harness"},
}
"""Package → the folders that may import it."""


def floor_of(part: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if part in floor)


def violations(package: Path) -> list[str]:
    """`file:line: what` for every import that goes up, sideways, or out of its home."""
    found = []
    for file in sorted(package.rglob("*.py")):
        part = file.relative_to(package).parts[0].removesuffix(".py")
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            for name in imported_names(node):
                where = f"{file.relative_to(package.parent)}:{node.lineno}"
                root, *rest = name.split(".")
                if root in HOMES and part not in HOMES[root]:
                    found.append(f"{where}: {root} belongs in {sorted(HOMES[root])}")
                if root != "jaxtrain" or not rest or rest[0] == part:
                    continue
                own, other = floor_of(part), floor_of(rest[0])
                if other > own or (other == own and own not in MAY_KNOW_SIBLINGS):
                    found.append(f"{where}: {part} may not import {rest[0]}")
    return found


def imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return (
            [f"{node.module}.{alias.name}" for alias in node.names]
            if node.module == "jaxtrain"
            else [node.module]
        )
    return []


def cycles(package: Path) -> list[list[str]]:
    """Every circle of modules that import one another; imports for types and inside functions
    count."""
    files = {
        ".".join(file.relative_to(package.parent).with_suffix("").parts): file
        for file in package.rglob("*.py")
    }
    files = {name.removesuffix(".__init__"): file for name, file in files.items()}
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        found = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)]
        imported = [(str(n.module), f"{n.module}.{alias.name}") for n in found for alias in n.names]
        graph[name] = {inner if inner in files else module for module, inner in imported}
    graph[package.name] = set()  # names are found at first use, by strings
    circles, done = [], set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            circles.append(path[path.index(name) :])
        elif name not in done:
            for target in sorted(graph[name] & graph.keys() - {name}):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return circles


def test_no_modules_import_each_other():
    assert cycles(PACKAGE) == []


@pytest.mark.parametrize("block", ["", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "])
def test_a_planted_cycle_is_found_also_one_for_types(tmp_path, block):
    (package := tmp_path / "jaxtrain").mkdir()
    for name, target in (("one", "two"), ("two", "three"), ("three", "one")):
        line = f"from jaxtrain.{target} import x"
        (package / f"{name}.py").write_text(f"{block if name == 'three' else ''}{line}\n")
    assert cycles(package) == [["jaxtrain.one", "jaxtrain.two", "jaxtrain.three"]]


def test_every_import_goes_down():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("recipe/bad.py", "from jaxtrain.trainer import step", "recipe may not import trainer"),
        ("model/bad.py", "from jaxtrain.data.plan import BatchPlan", "model may not import data"),
        ("data/bad.py", "import jax.numpy as jnp", "jax belongs in"),
        ("trainer/bad.py", "from flax import nnx", "flax belongs in"),
        ("metrics/bad.py", "import torch", "torch belongs in"),
        ("trainer/bad.py", "import wandb", "wandb belongs in"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, line, expected):
    bad = tmp_path / "jaxtrain" / file
    bad.parent.mkdir(parents=True)
    bad.write_text(f"import os\n{line}\n")
    (found,) = violations(tmp_path / "jaxtrain")
    assert found.startswith(f"jaxtrain/{file}:2: ") and expected in found


def test_the_programs_that_compile_ahead_of_time_can_be_imported():
    """They are run by hand and by slow tests alone."""
    for file in Path(__file__).parent.glob("compile_*.py"):
        import_module(f"tests.{file.stem}")


COMMAND = """
import sys
from jaxtrain.cli import main
try:
    main()
finally:
    print(*sys.modules)
"""
SHIPPED = PACKAGE / "recipes"
RUN = {"datasets", "pandas", "lm_eval"}  # grain, which makes the batches, imports orbax
NOT_IMPORTED = {
    "--help": {"jax", "numpy", "pydantic", "transformers", "torch"},
    f"check {SHIPPED / 'qwen2.5-1.5b-sft.yaml'}": {"jax", "numpy", "transformers", "torch"},
    f"check {SHIPPED / 'quickstart.yaml'}": RUN | {"grain", "orbax", "torch"},
    "check recipe.yaml": RUN | {"grain", "orbax"},
    "recipe.yaml train_iters=1": RUN | {"jaxtrain.recipe.objectives"},
}
"""What is typed → packages that it does without, of those that take long."""


@pytest.mark.parametrize("typed", NOT_IMPORTED)
def test_a_command_imports_what_it_uses(tmp_path, typed):
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(tmp_path, rows=8)))
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *typed.split()],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not NOT_IMPORTED[typed] & {*done.stdout.splitlines()[-1].split()}
