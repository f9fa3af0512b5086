"""Composes a recipe from its base recipes, overrides and variables."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxtrain.recipe.errors import Fault, Place, RecipeError, did_you_mean, show
from jaxtrain.recipe.load import Key, Recipe, Secret, join_key, map_leaves, parse, read
from jaxtrain.recipe.section import path_exists

COMMAND_LINE = Place("command line", 0)
MAX_BITS = 1023
"""Maximum bits of an integer, so that a float can hold it."""
VARIABLE = re.compile(r"\$\{(?P<dir>dir)\}|\$\{env:(?P<name>\w+)(?::(?P<default>[^{}]*))?\}")


def compose(source: Path | str | dict[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Reads a recipe file or dict, merges it into its `base`, applies `a.b=value` and `del:a.b`
    overrides, and fills in `${env:NAME:default}` and `${dir}`. RecipeError lists every fault."""
    if isinstance(source, dict):
        try:
            as_text = lambda value, _: str(value) if isinstance(value, Path) else value
            recipe = Recipe(map_leaves(source, as_text), {}, None)
        except RecursionError:
            raise RecipeError("the recipe is nested too deeply, or contains itself") from None
    else:
        recipe = read(Path(source))
    recipe = _apply_bases(_fill_variables(recipe), ())
    faults: list[Fault] = []
    changed: list[Key] = []
    for text in overrides:
        try:
            changed.append(_override(recipe, text))
        except RecipeError as error:
            faults += error.faults
    recipe = _fill_variables(recipe, under=changed)
    return recipe._replace(faults=(*recipe.faults, *faults))


def _apply_bases(recipe: Recipe, above: tuple[Path, ...]) -> Recipe:
    """`recipe` merged into the recipes that its `base` names, from left to right."""
    if "base" not in recipe.tree:
        return recipe
    place = recipe.places.get(("base",))
    chain = (*above, recipe.file.resolve()) if recipe.file else above
    tree = dict(recipe.tree)
    bases = tree.pop("base")
    result = Recipe({}, {}, recipe.file, {})
    for name in bases if isinstance(bases, list) else [bases]:
        if not isinstance(name, str) or not name or "\0" in name:
            what = f"must be a path or a list of paths, found {show(bases)}"
            raise RecipeError([Fault("base", what, place)])
        folders = (recipe.folder, Path.cwd())
        file = next((f / name for f in folders if path_exists(f"{f}/{name}")), None)
        if file is None:
            raise RecipeError([Fault("base", f"no such file: {name!r}", place)])
        if file.resolve() in chain:
            cycle = " → ".join(f.name for f in (*chain, file))
            what = f"a recipe cannot be based on itself: {cycle}"
            raise RecipeError([Fault("base", what, place)])
        result = _merge(result, _apply_bases(_fill_variables(read(file)), chain))
    return _merge(result, recipe._replace(tree=tree))


def _merge(under: Recipe, top: Recipe) -> Recipe:
    """Merges maps; lists and scalars of `top` replace those below."""
    places, secrets = dict(under.places), dict(under.secrets)

    def merged(a: Any, b: Any, key: Key) -> Any:
        if isinstance(a, dict) and isinstance(b, dict):
            return a | {k: merged(a[k], v, (*key, k)) if k in a else v for k, v in b.items()}
        _forget(key, places, secrets)
        return b

    tree = merged(under.tree, top.tree, ())
    secrets |= top.secrets
    return Recipe(tree, places | top.places, top.file, secrets, (*under.faults, *top.faults))


def _override(recipe: Recipe, text: str) -> Key:
    """Sets or deletes one key and returns it; a list position is a number."""
    removes = text.startswith("del:")
    name, equals, value = text.removeprefix("del:").partition("=")
    if removes == bool(equals) or not name:
        raise _fault("", f"an override must be key=value or del:key, found {text!r}")
    if name.split(".")[0] == "base":
        raise _fault(name, "is read before the command line; write it in the recipe")
    parts = name.split(".")
    here: Any = recipe.tree
    if parts[:2] == ["checkpoint", "0"] and isinstance(here.get("checkpoint"), dict):
        del parts[1]  # one entry, written without its list
    *parents, last = parts
    key: Key = ()
    for part in parents:
        if isinstance(here, dict) and here.get(part) is None and not removes:
            here[part] = {}
            recipe.places[(*key, part)] = COMMAND_LINE
        step = _step(here, part, key, name)
        key, here = (*key, step), here[step]
    step = last if isinstance(here, dict) and not removes else _step(here, last, key, name)
    target = (*key, step)
    _forget(target, recipe.places, recipe.secrets)
    if removes:
        del here[step]
    else:
        here[step] = _value(name, value)
        recipe.places[target] = COMMAND_LINE
    return target


def _value(name: str, text: str) -> Any:
    try:
        return parse(text, "command line")[0]
    except RecipeError as error:
        why = error.faults[0].what
        raise _fault(name, f"the value is not YAML: {text!r} ({why})") from None


def _fault(key: str, what: str) -> RecipeError:
    return RecipeError([Fault(key, what, COMMAND_LINE)])


def _step(here: Any, part: str, key: Key, name: str) -> str | int:
    """`part` as an index into `here`, the value of `key`; RecipeError about the override of `name`
    when there is nothing to index."""
    help = ""
    if isinstance(here, dict):
        if part in here:
            return part
        help = did_you_mean(part, here)
    elif isinstance(here, list):
        if part.isdecimal() and int(part) < len(here):
            return int(part)
        help = f"a list: write a position from 0 to {len(here) - 1}" if here else "[]"
        help = f", it is {help}"
    raise _fault(name, f"{join_key(key) or 'the recipe'} has no {part!r}{help}")


def _forget(key: Key, *notes: Any) -> None:
    for noted in notes:
        for old in [k for k in noted if k[: len(key)] == key]:
            del noted[old]


def _fill_variables(recipe: Recipe, under: Iterable[Key] = ((),)) -> Recipe:
    """`recipe` with the variables below some keys filled in, and a fault for each that is not
    set."""
    secrets, faults, under = dict(recipe.secrets), list[Fault](), tuple(under)

    def fill(value: Any, key: Key) -> Any:
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            what = f"a number of {value.bit_length()} bits is too large"
            faults.append(Fault(join_key(key), what, recipe.place(key)))
        is_under = any(key[: len(root)] == root for root in under)
        if not isinstance(value, str) or "${" not in value or not is_under:
            return value
        values: list[str] = []

        def one(match: re.Match[str]) -> str:
            if match["dir"]:
                return str(recipe.folder)
            found = os.environ.get(match["name"], match["default"])
            if found is None:
                what = f"the environment variable {match['name']} is not set, and has no default"
                faults.append(Fault(join_key(key), what, recipe.place(key)))
                return ""
            if match["name"] in os.environ and found:
                values.append(found)
            return found

        text = VARIABLE.sub(one, value)
        if VARIABLE.search(value) and "env:" in value:
            secrets[key] = Secret(value, tuple(values))
        return _scalar(text) if VARIABLE.fullmatch(value) else text

    tree = map_leaves(recipe.tree, fill)
    return recipe._replace(tree=tree, secrets=secrets, faults=(*recipe.faults, *faults))


def _scalar(text: str) -> Any:
    """A variable that is a whole value, read as YAML: a number or a boolean, else text."""
    try:
        value, _ = parse(text, "")
    except RecipeError:
        return text
    return value if isinstance(value, bool | int | float) else text
