"""Reads a recipe file as plain data, with the file and line of every value."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jaxtrain.recipe.errors import Fault, Place, RecipeError, show

MAX_BYTES = 1_000_000
MAX_NODES = 100_000  # an alias counts again each time it is used, so that a YAML bomb ends early
Key = tuple[str | int, ...]


class Secret(NamedTuple):
    """Text with environment variables, and their values, which are never shown or saved."""

    written: str
    values: tuple[str, ...]


Secrets = Mapping[Key, Secret]


class Recipe(NamedTuple):
    """Plain data and the place of each value; `file` is None for a recipe given as a dict."""

    tree: dict[str, Any]
    places: dict[Key, Place]
    file: Path | None
    secrets: "Secrets" = {}
    faults: tuple[Fault, ...] = ()
    """faults of values, which are left out of the tree, and of overrides"""

    def place(self, key: Key) -> Place | None:
        """The place of a key, or of the nearest section around it."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key)

    def key(self, dotted: str) -> Key:
        """A dotted key as the recipe writes it: a single checkpoint entry need not be a list."""
        parts = dotted.split(".")
        if parts[0] == "checkpoint" and isinstance(self.tree.get("checkpoint"), dict):
            parts = [part for part in parts if not part.isdigit()]
        return tuple(int(part) if part.isdigit() else part for part in parts)

    def locate(self, fault: Fault) -> Fault:
        return fault._replace(place=self.place(self.key(fault.key)))

    @property
    def folder(self) -> Path:
        return self.file.resolve().parent if self.file else Path.cwd()

    def folders_of(self, key: Key) -> list[Path]:
        """Where a path that is the value of `key` is looked up: beside the file that it is written
        in, which may be a base, then beside the recipe, then in the current directory."""
        *section, field = key
        inner = [
            k for k in self.places if k[:-1][: len(section)] == (*section,) and k[-1:] == (field,)
        ]
        place = self.place(inner[0] if len(inner) == 1 else key)
        written = [Path(place.file).resolve().parent] if place and place.line else []
        return list(dict.fromkeys((*written, self.folder, Path.cwd())))


FAULTY = object()
"""Stands for a value that is no plain data, until the key that has it is left out."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-5 is a number, and 12:30 and 2026-01-01 are text. Collects the faults of
    single values."""

    def __init__(self, text: str, name: str):
        super().__init__(text)
        self.file = name
        self.places: dict[Key, Place] = {}
        self.num_nodes = 0
        self.open: set[int] = set()
        self.faults: list[Fault] = []

    def build(self, node: yaml.Node, key: Key) -> Any:
        """Plain data of a node; notes every place. RecipeError for endless aliases."""
        self.num_nodes += 1
        if id(node) in self.open:
            raise RecipeError([self.fault(key, node, "an alias that contains itself")])
        if self.num_nodes > MAX_NODES:
            raise RecipeError([self.fault(key, node, "aliases that grow too far")])
        if not node.tag.startswith("tag:yaml.org,2002:") or "python/" in node.tag:
            return self.note(key, node, f"not plain YAML: tag {node.tag}")
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.ScalarNode):
                value = self.scalar(node, key)
            elif isinstance(node, yaml.SequenceNode):
                value = [self.build(item, (*key, i)) for i, item in enumerate(node.value)]
                value = FAULTY if FAULTY in value else value
            else:
                value = self.mapping(node, key)
        finally:
            self.open.discard(id(node))
        self.places[key] = self.at(node)  # last: a merged map is built under the same key
        return value

    def scalar(self, node: yaml.ScalarNode, key: Key) -> Any:
        if node.tag.endswith((":int", ":float")) and ":" in node.value:  # base 60, in square time
            return self.note(key, node, f"not plain YAML: {show(node.value)} is no number")
        try:
            return self.construct_object(node)
        except Exception as error:  # the constructors of PyYAML raise whatever a text makes them
            problem = getattr(error, "problem", None)
            problem = problem or f"{show(node.value)} is no {node.tag.rpartition(':')[2]}"
            return self.note(key, node, f"not plain YAML: {problem}")

    def mapping(self, node: yaml.Node, key: Key) -> dict[str, Any]:
        """Own keys over merged ones. PyYAML's merging differs between versions and has no bound."""
        merged: dict[str, Any] = {}
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for name_node, value in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                self.note(key, name_node, "a key must be text")
                continue
            name = str(name_node.value)
            if name_node.tag == "tag:yaml.org,2002:merge":
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for source in reversed(sources):  # the first of several wins
                    if isinstance(source, yaml.MappingNode):
                        merged |= self.build(source, key)
                    else:
                        self.note((*key, name), source, "must be a map or a list of maps")
            elif name in own:
                what = f"duplicate key, first on line {self.at(own[name][0]).line}"
                self.note((*key, name), name_node, what)
            else:
                own[name] = name_node, value
        built = {name: self.build(value, (*key, name)) for name, (_, value) in own.items()}
        return merged | {name: value for name, value in built.items() if value is not FAULTY}

    def at(self, node: yaml.Node) -> Place:
        return Place(self.file, node.start_mark.line + 1)

    def fault(self, key: Key, node: yaml.Node, what: str) -> Fault:
        return Fault(join_key(key), what, self.at(node))

    def note(self, key: Key, node: yaml.Node, what: str) -> Any:
        self.faults.append(self.fault(key, node, what))
        return FAULTY


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


def read(file: Path) -> Recipe:
    """A recipe file as it is written, with the faults of its values; RecipeError names a line that
    is no YAML."""
    text = why = ""
    try:
        if not file.is_file():
            why = "is a folder, not a recipe file" if file.is_dir() else "recipe not found"
            if (file / "recipe.yaml").is_file():
                why += f"; did you mean `{file / 'recipe.yaml'}`?"
        elif (size := file.stat().st_size) > MAX_BYTES:
            why = f"{size} bytes; a recipe has at most {MAX_BYTES}"
        else:
            text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        why = f"not UTF-8 text ({error.reason} at byte {error.start})"
    except (OSError, ValueError) as error:
        raise RecipeError(f"{show(str(file))}: {error}") from None
    if why:
        raise RecipeError(f"{file}: {why}")
    loader, tree = _load(text, str(file))
    if loader.faults and tree is FAULTY:
        raise RecipeError(loader.faults)
    if not isinstance(tree, dict | None):
        raise RecipeError(f"{file}: a recipe is a map of keys, found {show(tree)}")
    return Recipe(tree or {}, loader.places, file, faults=tuple(loader.faults))


def parse(text: str, name: str) -> tuple[Any, dict[Key, Place]]:
    """Plain data of a YAML text and the places of its values; RecipeError names faulty lines."""
    loader, tree = _load(text, name)
    if loader.faults:
        raise RecipeError(loader.faults)
    return tree, loader.places


INDENTATION = {
    "character '\\t'": "YAML is indented with spaces; replace the tab",
    "mapping values are not allowed": "indent the keys of a section alike, and put quotes around "
    "text with `: ` in it",
    "expected <block end>": "indent the keys of a section alike, deeper than its name",
}
"""Part of a message of the parser → what to do about it."""


def _load(text: str, name: str) -> tuple[_Loader, Any]:
    try:
        loader = _Loader(text, name)
        node = loader.get_single_node()
        return loader, loader.build(node, ()) if node else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 0
        problem = error.problem or error.context or ""
        if problem.startswith("but "):  # the other half says what was expected
            problem = f"{error.context}, {problem}"
        what_to_do = (advice for part, advice in INDENTATION.items() if part in problem)
        problem = "; ".join([problem, *what_to_do])
        raise RecipeError([Fault("", f"not YAML: {problem}", Place(name, line))]) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{name}: nested too deeply") from None


def join_key(key: Key) -> str:
    """`a.0.b` for ("a", 0, "b")."""
    return ".".join(map(str, key))


def map_leaves(tree: Any, change: Callable[[Any, Key], Any], key: Key = ()) -> Any:
    """Plain data with every value that is no map or list replaced by `change(value, key)`."""
    if isinstance(tree, dict):
        return {str(k): map_leaves(v, change, (*key, str(k))) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [map_leaves(v, change, (*key, i)) for i, v in enumerate(tree)]
    return change(tree, key)
