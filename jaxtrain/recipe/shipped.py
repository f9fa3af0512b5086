"""The recipes that come with the package."""

import json
import re
import shutil
from pathlib import Path
from textwrap import fill

from jaxtrain.recipe.errors import RecipeError, did_you_mean
from jaxtrain.recipe.schema import HEADER, json_schema

FOLDER = Path(__file__).parent.parent / "recipes"
COLUMNS = 80
SCHEMA = HEADER.rpartition("=")[2]


def list_names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def format_list() -> str:
    """Every recipe with the first clause of its comment."""
    width = max(map(len, list_names()))
    lines = (f"{name:{width}}  {_first_clause(read_recipe(name))}" for name in list_names())
    indent = " " * (width + 2)
    return "\n".join(fill(line, COLUMNS, subsequent_indent=indent) for line in lines)


def read_recipe(name: str) -> str:
    """The text of a shipped recipe; RecipeError lists the known names."""
    if name not in list_names():
        known = f"{did_you_mean(name, list_names())} (known: {', '.join(list_names())})"
        raise RecipeError(f"no recipe called {name!r}{known}")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def copy_recipe(name: str, target: Path) -> list[Path]:
    """Writes a recipe, its code and the schema for editors, and returns the files; RecipeError
    when one exists already or cannot be written."""
    recipe = read_recipe(name)
    file = target / f"{name}.yaml" if target.is_dir() or not target.suffix else target
    code = [f for f in FOLDER.glob("*.py") if f"code: {f.name}" in recipe]
    files = [file, *(file.parent / f.name for f in code), file.parent / SCHEMA]
    there = [f for f in files[:-1] if f.exists()]
    if there:
        raise RecipeError(f"{there[0]} exists already; name another folder")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(recipe, encoding="utf-8")
        for source, copy in zip(code, files[1:], strict=False):
            shutil.copyfile(source, copy)
        files[-1].write_text(json.dumps(json_schema(file), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{target}: {error.strerror}; name another folder") from None
    return files


def _first_clause(recipe: str) -> str:
    lines = (line for line in recipe.splitlines() if line.startswith("#") and line != HEADER)
    return re.split(r"[.:;](?: |$)", " ".join(line.lstrip("# ") for line in lines))[0]
