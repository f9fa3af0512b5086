"""A recipe file as plain data, with the file and line of every value."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jaxtrain.recipe.errors import Fault, Place, RecipeError, shown

MAX_BYTES = 1_000_000
MAX_NODES = 100_000  # an alias counts again each time it is used, so that a YAML bomb ends early
COMMAND_LINE = Place("command line", 0)

Key = tuple[str | int, ...]


class Recipe(NamedTuple):
    """Plain data, and where each value was written; `file` is None for a recipe given as a dict."""

    tree: dict[str, Any]
    places: dict[Key, Place]
    file: Path | None

    @property
    def folder(self) -> Path:
        return self.file.resolve().parent if self.file else Path.cwd()


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-5 is a number, and 12:30 and 2026-01-01 are text."""


_Loader.yaml_implicit_resolvers = {
    first: [
        pair for pair in pairs if pair[0].rsplit(":", 1)[-1] not in ("float", "int", "timestamp")
    ]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(?:0|[1-9][\d_]*|0x[\da-fA-F_]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))(?:[eE][-+]?\d+)?$"
        r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def load(source: Path | str | dict[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, or take a dict, and apply `a.b=value` overrides; RecipeError names
    every fault."""
    is_dict = isinstance(source, dict)
    recipe = Recipe(_copied(source), {}, None) if is_dict else _read(Path(source))
    faults = [fault for text in overrides if (fault := _override(recipe, text))]
    if faults:
        raise RecipeError(faults)
    return recipe


def _read(file: Path) -> Recipe:
    if not file.is_file():
        what = "is a folder, not a recipe file" if file.is_dir() else "recipe not found"
        raise RecipeError(f"{file}: {what}")
    if file.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{file}: {file.stat().st_size} bytes; a recipe has at most {MAX_BYTES}")
    places: dict[Key, Place] = {}
    try:
        loader = _Loader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        tree = _Builder(loader, file, places).build(node, ()) if node else {}
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{file}: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 0
        raise RecipeError(
            [Fault("", f"not YAML: {error.problem}", Place(str(file), line))]
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{file}: a recipe is a map of keys, found {shown(tree)}")
    return Recipe(tree, places, file)


class _Builder:
    """Plain data from YAML nodes; notes every place, refuses duplicate keys and endless aliases."""

    def __init__(self, loader: _Loader, file: Path, places: dict[Key, Place]):
        self.loader, self.file, self.places = loader, file, places
        self.nodes = 0
        self.open: set[int] = set()

    def build(self, node: yaml.Node, key: Key) -> Any:
        place = self.places[key] = self.at(node)
        self.nodes += 1
        if self.nodes > MAX_NODES or id(node) in self.open:
            why = (
                "an alias that contains itself"
                if id(node) in self.open
                else "aliases that grow too far"
            )
            raise RecipeError([Fault(_dotted(key), why, place)])
        if not node.tag.startswith("tag:yaml.org,2002:") or "python/" in node.tag:
            raise RecipeError([Fault(_dotted(key), f"not plain YAML: tag {node.tag}", place)])
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, key)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item, (*key, i)) for i, item in enumerate(node.value)]
            return self.mapping(node, key)
        finally:
            self.open.discard(id(node))

    def scalar(self, node: yaml.ScalarNode, key: Key) -> Any:
        try:
            return self.loader.construct_object(node)
        except (ValueError, yaml.constructor.ConstructorError) as error:
            problem = getattr(error, "problem", None) or str(error)
            raise RecipeError(
                [Fault(_dotted(key), f"not plain YAML: {problem}", self.at(node))]
            ) from None

    def mapping(self, node: yaml.Node, key: Key) -> dict[str, Any]:
        seen: dict[str, int] = {}
        for name_node, _ in node.value:
            name = str(name_node.value) if isinstance(name_node, yaml.ScalarNode) else ""
            if not isinstance(name_node, yaml.ScalarNode):
                raise RecipeError([Fault(_dotted(key), "a key must be text", self.at(name_node))])
            if name in seen and name != "<<":
                what = f"duplicate key, first on line {seen[name]}"
                raise RecipeError([Fault(_dotted((*key, name)), what, self.at(name_node))])
            seen[name] = self.at(name_node).line
        if "<<" in seen:
            self.loader.flatten_mapping(node)  # type: ignore[arg-type]
        return {str(k.value): self.build(v, (*key, str(k.value))) for k, v in node.value}

    def at(self, node: yaml.Node) -> Place:
        return Place(str(self.file), node.start_mark.line + 1)


def _override(recipe: Recipe, text: str) -> Fault | None:
    """Set one `a.b=value`, its value read as YAML; a list position is a number."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        return Fault("", f"an override is key=value, found {text!r}", COMMAND_LINE)
    try:
        parsed = yaml.load(value, _Loader)
    except yaml.YAMLError:
        return Fault(name, f"the value is not YAML: {value!r}", COMMAND_LINE)
    key: Key = ()
    here: Any = recipe.tree
    *parents, last = name.split(".")
    for part in parents:
        step = _step(here, part)
        if isinstance(here, dict) and here.get(part) is None:
            here[part] = {}
        if step is None:
            return Fault(name, f"{_dotted(key) or 'the recipe'} has no {part!r}", COMMAND_LINE)
        key, here = (*key, step), here[step]
    step = _step(here, last)
    if step is None:
        return Fault(name, f"{_dotted(key) or 'the recipe'} has no {last!r}", COMMAND_LINE)
    here[step] = parsed
    for old in [place for place in recipe.places if place[: len(key) + 1] == (*key, step)]:
        del recipe.places[old]
    recipe.places[(*key, step)] = COMMAND_LINE
    return None


def _step(here: Any, part: str) -> str | int | None:
    """`part` as an index into `here`; None when there is nothing to index."""
    if isinstance(here, dict):
        return part
    if isinstance(here, list) and part.isdigit() and int(part) < len(here):
        return int(part)
    return None


def _dotted(key: Key) -> str:
    return ".".join(map(str, key))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _copied(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item) for item in value]
    return str(value) if isinstance(value, Path) else value
