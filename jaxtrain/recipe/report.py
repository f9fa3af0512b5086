"""What became of each key of a recipe, as the markers on the fields say it."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from jaxtrain import registry
from jaxtrain.recipe.data import DataSourceConfig
from jaxtrain.recipe.deepspeed import DeepSpeedConfig, OffloadConfig, ZeroConfig
from jaxtrain.recipe.errors import Fault, show
from jaxtrain.recipe.load import Key, Recipe, join_key
from jaxtrain.recipe.messages import find_full_name
from jaxtrain.recipe.secrets import SPELLINGS
from jaxtrain.recipe.section import (
    Marker,
    NotSupported,
    Support,
    find_marker,
    get_value,
    refusal_reason,
    sections_in,
    walk,
)
from jaxtrain.recipe.trainer import TrainerConfig

Word = Literal["same", "mapped", "no effect", "refused", "own"]
Classes = Mapping[Key, type[BaseModel]]
"""Key of a section, as the recipe writes it → the class that its type decides."""
ALIAS_NOTES = {
    "liger": "the same model as `huggingface`; fused kernels are always on",
    "cpu_adam": "`adamw`; deepspeed.zero_optimization.offload_optimizer says where its state is",
    "deepspeed": "`orbax`, our full-state engine",
}


class Line(NamedTuple):
    """What became of one written key."""

    key: str
    word: Word
    reason: str = ""


class Report(NamedTuple):
    """What became of every key of the shared format that a recipe writes."""

    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    def select(self, word: Word) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.word == word)

    def format(self, word: Word) -> list[str]:
        """A line per reason, with the keys that it is the reason of."""
        keys: dict[str, list[str]] = {}
        for line in self.select(word):
            keys.setdefault(line.reason, []).append(line.key)
        return [f"{word:10} {join_keys(k)}{why and ': '}{why}" for why, k in keys.items()]

    def changes(self) -> list[str]:
        """The lines on every key that is not the same as upstream, and the notes."""
        return [*self.format("mapped"), *self.unheeded()]

    def unheeded(self) -> list[str]:
        """The lines on the keys that have no effect, and the notes."""
        return [*self.format("no effect"), *(f"{'note':10} {note}" for note in self.notes)]


def join_keys(keys: Iterable[str]) -> str:
    """`a, b.c, d.{e, f}`: keys of one section together, in the order of their first."""
    sections: dict[str, list[str]] = {}
    for key in keys:
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(name)
    joined = {section: ", ".join(names) for section, names in sections.items()}
    return ", ".join(
        names if not section else f"{section}.{names if ',' not in names else f'{{{names}}}'}"
        for section, names in joined.items()
    )


def build_report(
    recipe: Recipe,
    classes: Classes,
    config: TrainerConfig | None,
    faults: Iterable[Fault],
    notes: Iterable[str] = (),
) -> Report:
    """The report on each written key; `config` is None when the recipe has none."""
    wrong = {fault.key for fault in faults}
    idle = {recipe.key(key): why for key, why in reversed([*find_idle_keys(config)])}
    lines = []
    for path, value, support in iter_written_keys(recipe.tree, classes):
        key, above = join_key(path), join_key(path[:-1])
        if above and path[-1] != "type" and f"{above}.type" in wrong:
            continue  # the type decides which keys there are
        full = join_key((*path[:-1], SPELLINGS.get(path[-1], path[-1])))
        around = (join_key(path[:n]) for n in range(len(path), 0, -1))
        if refused := next((k for k in (*around, full) if k in wrong), None):
            lines.append(Line(key if refused == full else refused, "refused"))
        elif path in idle:
            lines.append(Line(key, "no effect", idle[path]))
        elif support.word != "own":
            how = next((h for v, h in support.by_value.items() if str(v) == str(value)), "")
            lines.append(Line(key, support.word, how or support.how))
    return Report(tuple(dict.fromkeys(lines)), tuple(dict.fromkeys(notes)))


def iter_written_keys(tree: Any, classes: Classes) -> Iterator[tuple[Key, Any, Support]]:
    """(key, value, support) of everything written, down to the maps whose keys are the user's."""

    def inside(value: Any, key: Key, cls: type[BaseModel] | None, support: Support) -> Any:
        cls = classes.get(key, cls)
        has_sections = any(known[: len(key)] == key for known in classes)
        if isinstance(value, dict) and (cls or has_sections):
            for name, inner in value.items():
                yield from inside(inner, (*key, name), *_read_field(cls, name, inner, key, support))
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for i, item in enumerate(value):
                yield from inside(item, (*key, i), cls, support)
        else:
            yield key, value, support

    yield from inside(tree, (), TrainerConfig, Support())


def _read_field(
    cls: type[BaseModel] | None, name: str, value: Any, above: Key, support: Support
) -> tuple[type[BaseModel] | None, Support]:
    """The section that a written key holds, if any, and what becomes of it."""
    full = cls and (find_full_name(cls, name) or name)
    if cls is None or full not in cls.model_fields:
        return None, support
    field = cls.model_fields[full]
    inner = next(iter(sections_in(field.annotation)), None)
    if name == "type" and above:
        kind = "data_source" if issubclass(cls, DataSourceConfig) else str(above[0])
        if target := registry.ALIASES.get((kind, str(value))):
            note = ALIAS_NOTES.get(str(value).removesuffix("_moe"), f"`{target}`")
            return None, Support("mapped", note)
    if above[:1] == ("deepspeed",) and value == "auto":
        return None, Support("no effect", "`auto` counts as not written")
    if refusal_reason(field):
        return None, Support("no effect", "it is off, as without it")
    return inner, find_marker(cls, full, Support) or support


def find_idle_keys(config: TrainerConfig | None) -> Iterator[tuple[str, str]]:
    """(dotted key, why) of each key that has no effect beside the others."""
    for key, section in walk(config):
        for name, why in section.collect("idle"):
            yield f"{key}.{name}".lstrip("."), why


def find_marked(config: Any, kind: type[Marker]) -> Iterator[tuple[str, Any, Marker]]:
    """(dotted key, value, marker) of each key whose field has a marker of that kind."""
    for key, section in walk(config):
        for name in type(section).model_fields:
            if marker := find_marker(type(section), name, kind):
                yield f"{key}.{name}".lstrip("."), getattr(section, name, None), marker


# What is not supported.


def find_unsupported(config: TrainerConfig, origins: Mapping[str, str]) -> Iterator[Fault]:
    """A fault for each value that this version does not support, under the key that was written."""
    for key, value, marker in find_marked(config, NotSupported):
        if marker.refuses(value):
            found = value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
            what = f"not supported yet, found {show(found)}; {marker.instead}"
            yield Fault(origins.get(key, key), what)


# Keys that are honoured under another key.


class Carried(NamedTuple):
    """A config whose shared keys have been carried over."""

    config: TrainerConfig
    origins: dict[str, str]
    """key → the key that was written for it"""
    faults: tuple[Fault, ...]


def carry_over(config: TrainerConfig, faulty: Collection[str] = ()) -> Carried:
    """Sets each key that another key of the recipe sets. A Fault where both are written and differ,
    unless one of them is faulty in itself."""
    origins: dict[str, str] = {}
    faults: list[Fault] = []
    original, shared = config, [*find_marked(config, Support)]
    for source, value, support in shared:
        target = support.sets
        # A gradient clip of zero turns clipping off; any other zero asks for nothing.
        is_on = value or (value == 0 and target == "max_grad_norm")
        if not target or not is_on or target in faulty:
            continue
        current = get_value(original, target)
        if is_written(original, target) and current != value:
            what = f"{show(value)} contradicts {target} {show(current)}; remove one"
            faults.append(Fault(source, what))
        else:
            origins[target] = source
            config = replace_value(config, target, value)
    for source, value, support in shared:
        target = support.equals
        if target and value is not None and target not in faulty:
            if value != (other := get_value(config, target)):
                what = f"must equal {target} {show(other)}, found {show(value)}; remove it"
                faults.append(Fault(source, what))
    return Carried(config, origins, tuple(faults))


def drop_carried(config: TrainerConfig) -> TrainerConfig:
    """`config` with each setting in one place, so that its dump can be changed and run again."""
    on_host = lambda is_moved: OffloadConfig(device="cpu") if is_moved else None
    block = DeepSpeedConfig(
        train_batch_size=config.deepspeed.train_batch_size,
        zero_optimization=ZeroConfig(
            stage=config.deepspeed.zero_stage,
            offload_optimizer=on_host(config.deepspeed.offloads_optimizer),
            offload_param=on_host(config.deepspeed.offloads_params),
        ),
        fp16=config.loss_scaling,
        torch_autocast=config.deepspeed.torch_autocast if config.deepspeed.autocast_dtype else None,
    )
    # `base` has been applied, and `name` is the type.
    consumed = ("sequence_parallel_size", "expert_parallel_size", "name", "base")
    return config.model_copy(update=dict.fromkeys(consumed) | {"deepspeed": block})


def is_written(config: Any, key: str) -> bool:
    name, _, rest = key.partition(".")
    is_here = name in config.model_fields_set
    return is_here and (not rest or is_written(getattr(config, name), rest))


def replace_value(config: Any, key: str, value: Any) -> Any:
    """A copy of `config` with one dotted key set."""
    name, _, rest = key.partition(".")
    return config.model_copy(
        update={name: replace_value(getattr(config, name), rest, value) if rest else value}
    )
