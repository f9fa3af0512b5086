"""Sources: records of local files and URLs, of the caller, or made up.

A source takes its split and its sample; files of URLs are copied into the user's cache.
"""

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
from fsspec.callbacks import TqdmCallback

from jaxtrain.assets import cache_folder
from jaxtrain.data.cache import DataCache
from jaxtrain.data.conversation import RoleMapper
from jaxtrain.data.files import open_files
from jaxtrain.data.order import hash_with_keys, sample
from jaxtrain.data.records import (
    MappedRecords,
    NamedRecords,
    Records,
    SelectedRecords,
    first_line,
    rename_columns,
    take_split,
)
from jaxtrain.recipe.data import (
    FORMATS,
    AnyLocalDataSourceConfig,
    DataSourceConfig,
    LocalDataSourceConfig,
    RowsConfig,
    SyntheticDataSourceConfig,
    TextDataSourceConfig,
    file_format,
)
from jaxtrain.recipe.errors import DataError, RecipeError, UserError, did_you_mean, show
from jaxtrain.recipe.section import expand_user
from jaxtrain.registry import Factory

SAMPLE, TOKENS = 1, 6  # keep these draws apart from other orders under the same seed
CONTENT_KEYS = (
    "etag", "md5", "sha", "crc", "digest", "blob_id", "generation", "version", "modified", "mtime",
    "created",
)  # fmt: skip
"""Parts of the names of file properties that show whether the content has changed."""

BAR = {"unit": "B", "unit_scale": True, "disable": None, "leave": False}
"""tqdm arguments; `disable: None` is silent where no terminal is."""


class DataSource(Factory, kind="data_source"):
    """Records from one place. A subclass has a `name`, a `config` annotation and `load`."""

    events = {"load": "load"}
    retired = {
        "load_fn": "define `load(config, split)`, which returns the records of a split",
        "cache_path_args": "the cache is keyed by the records of `load` and by `options()`",
    }
    config: DataSourceConfig
    data_factory: Any = None
    """The factory that makes batches of these records."""

    @property
    def label(self) -> str:
        """What logs and messages call this source."""
        return self.config.name or self.config.type or self.name

    def load(self, config: Any, split: str) -> Records | Sequence[dict[str, Any]]:
        """Returns all records of `split`; a plain list of dicts will do."""
        raise NotImplementedError(f"{type(self).__name__} must define load(config, split)")

    def options(self) -> dict[str, Any]:
        """Returns the recipe's keys that decide what a record becomes once it is read."""
        return self.config.model_dump(mode="json", exclude=set(self.config.selection_keys))

    def only_split(self, records: Records | Sequence[dict[str, Any]], split: str) -> Records:
        """Returns `split` of records that are one split: `train` or `eval`, as the recipe uses
        them, or a slice such as `train[:100]`; DataError for any other name."""
        records = self._name_records(records)
        return take_split({"train": records, "eval": records}, split, self.label)

    def read(self, default_split: str) -> Records:
        """Returns the recipe's split of the records, then its sample; DataError when there are
        none."""
        records = self._name_records(self.load(self.config, self.config.split or default_split))
        if len(records) == 0:
            raise DataError(f"{self.label}: no records")
        count = self.config.sample_count
        if self.config.sample_ratio is not None:
            count = max(1, round(self.config.sample_ratio * len(records)))
        if count is not None and count < len(records):
            chosen = sample(len(records), count, SAMPLE, self.config.sample_seed)
            records = SelectedRecords(records, chosen)
        return self.adapt(records)

    def adapt(self, records: Records) -> Records:
        """Returns records as the recipe maps their columns."""
        return records

    def parts(self, default_split: str, since: Any = None) -> Iterator[tuple[Any, Records]]:
        """Yields the records in parts, each opened when a stream comes to it, with what `since` has
        to be to begin there again (JSON data; None is the first). Here all of them are one part."""
        yield None, self.read(default_split)

    def has_own_load(self, load: Any) -> bool:
        """Whether a class or callback of the user stands in for a `load`."""
        return type(self).load is not load or "load" in vars(self)

    def _name_records(self, records: Records | Sequence[dict[str, Any]]) -> Records:
        return records if isinstance(records, Records) else NamedRecords(records, self.label)


class LoadedSource(NamedTuple):
    """A source beside its records."""

    source: DataSource
    records: Records

    def warnings(self) -> Iterator[str]:
        wanted = self.source.config.sample_count
        if wanted is not None and wanted > len(self.records):
            label, count = self.source.label, len(self.records)
            yield f"{label}: sample_count {wanted} takes all {count} records"


class ConversationSource(DataSource, abstract=True):
    """Records whose columns the recipe maps to roles."""

    config: RowsConfig

    def role_mapping(self) -> dict[str, str]:
        """Returns role → column or `array.field.value`; empty leaves records as they are."""
        return self.config.role_mapping

    def adapt(self, records: Records) -> Records:
        if not (mapping := self.role_mapping()):
            return records
        return MappedRecords(records, RoleMapper(mapping, self.config.content_key))


class _LocalSource(ConversationSource, abstract=True):
    """Records of local files of one format, or of any format."""

    config: LocalDataSourceConfig

    @property
    def label(self) -> str:
        return self.config.name or ", ".join(self.config.paths)

    def load(self, config: LocalDataSourceConfig, split: str) -> Records:
        name = split.partition("[")[0]
        records = self._open(config, find_data_files(config.paths, name))
        return take_split({name: records}, split, self.label)

    def _open(self, config: LocalDataSourceConfig, paths: Iterable[Path]) -> Records:
        kind = config.format if isinstance(config, AnyLocalDataSourceConfig) else self.name
        per_line = isinstance(config, TextDataSourceConfig) and config.per_line
        records = open_files(paths, kind, column=config.column, per_line=per_line)
        return rename_columns(records, config.columns)

    def parts(self, default_split: str, since: Any = None) -> Iterator[tuple[Any, Records]]:
        """Each file is a part."""
        if self.has_own_load(_LocalSource.load):
            yield from super().parts(default_split, since)
            return
        files = find_data_files(self.config.paths, self.config.split or default_split)
        for number, path in enumerate(files):
            if number >= (since or 0):
                yield number, self.adapt(self._open(self.config, [path]))


class JsonSource(_LocalSource):
    name = "json"


class JsonLinesSource(_LocalSource):
    name = "jsonl"


class CsvSource(_LocalSource):
    name = "csv"


class ParquetSource(_LocalSource):
    name = "parquet"


class ArrowSource(_LocalSource):
    name = "arrow"


class TextSource(_LocalSource):
    name = "text"
    config: TextDataSourceConfig


class LocalSource(_LocalSource):
    name = "local"
    config: AnyLocalDataSourceConfig


def find_data_files(paths: Sequence[str], split: str) -> Iterator[Path]:
    """Yields the local files of paths, globs, folders and URLs in their order, those of `split`
    where the names of several tell splits apart; RecipeError for a missing one. Open each file
    before taking the next, whose download may evict it from the cache."""
    for written in paths:
        path = expand_user(written)
        if "://" in written:
            yield from fetch_url(written, split)
            continue
        if path.is_file():
            files = {path.name: path}
        elif path.is_dir():
            found = {str(file.relative_to(path)): file for file in _walk(path)}
            files = {name: found[name] for name in select_data_files(found, path)}
        else:
            matches = sorted(f for f in map(Path, glob(str(path), recursive=True)) if f.is_file())
            root = _fixed_folder(str(path))
            files = {str(file).removeprefix(root): file for file in matches}
        if not files:
            is_pattern = set("*?[") & set(written)
            what = f"no file {'matches' if is_pattern else 'or folder'} {written!r}"
            raise RecipeError(what)
        yield from (files[name] for name in select_split(files, split, written))


def _walk(folder: Path) -> list[Path]:
    """Returns the files of a folder and of those below it, linked ones too, each folder once."""
    found, seen = [], {folder.resolve()}
    for place, folders, files in os.walk(folder, followlinks=True):
        found += [Path(place, name) for name in files]
        below = {Path(place, name).resolve(): name for name in sorted(folders, reverse=True)}
        folders[:] = [name for real, name in below.items() if real not in seen]
        seen.update(below)
    return sorted(file for file in found if file.is_file())


def _fixed_folder(pattern: str) -> str:
    """Returns the folder that a glob names before its first wildcard, with its last slash."""
    return "".join(re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[:2])


def fetch_url(url: str, split: str) -> list[Path]:
    """Copies the files of a URL, a pattern or a remote folder into the cache, ordered by name;
    copies again only when the file system says that one has changed.

    RecipeError for a URL that names nothing, or that cannot be read from here."""
    with _report_errors_of(url):
        files, path = fsspec.core.url_to_fs(url)
        infos = _list_files(files, path, url, split)
        parts = {name: str(sorted(info.items())) for name, info in infos.items()}
        known = [{key.lower() for key, value in info.items() if value} for info in infos.values()]
        if not all(any(part in key for key in keys for part in CONTENT_KEYS) for keys in known):
            parts["time"] = str(time.time_ns())
        bases = (name.partition("?")[0].rstrip("/").rpartition("/")[2] for name in infos)
        copies = [f"{number}-{base}" for number, base in enumerate(bases)]

        def build(folder: Path) -> None:
            for copy, (name, info) in zip(copies, infos.items(), strict=True):
                size = f"{(info.get('size') or 0) / 1e6:.1f} MB"
                print(f"fetching {name}, {size}", file=sys.stderr, flush=True)
                with TqdmCallback(tqdm_kwargs=BAR) as callback:
                    files.get_file(name, str(folder / copy), callback=callback)

        folder = DataCache(cache_folder() / "remote").get(parts, build).folder
    return [folder / copy for copy in copies]


def _list_files(files: Any, path: str, url: str, split: str) -> dict[str, dict[str, Any]]:
    """Returns the files of a remote path: name → the file system's properties of the file."""
    if set("*[") & set(path):
        found, root = files.glob(path, detail=True), _fixed_folder(path)
        if not found:
            raise RecipeError(f"no file matches {url}")
    else:
        info = files.info(path)
        if info["type"] == "file":
            found, root = {path: info}, _fixed_folder(path)
        else:
            found, root = files.find(path, detail=True), path
    kept = {name: info for name, info in sorted(found.items()) if info["type"] == "file"}
    below = {name.partition("?")[0].removeprefix(root).lstrip("/"): name for name in kept}
    names = select_data_files(below, url) if root == path else list(below)
    return {below[name]: kept[below[name]] for name in select_split(names, split, url)}


def select_data_files(names: Iterable[str], folder: object) -> list[str]:
    """Selects the data files of a folder, without hidden ones and without Markdown beside data of
    other formats, which describes them. RecipeError when there are none."""
    kinds = {
        name: kind
        for name in names
        if (kind := file_format(name)) and not any(p.startswith(".") for p in Path(name).parts)
    }
    if not kinds:
        raise RecipeError(f"folder {folder} holds no data file; known are {', '.join(FORMATS)}")
    is_text = set(kinds.values()) == {"text"}
    return [name for name, kind in kinds.items() if is_text or not name.lower().endswith(".md")]


SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "dev": "validation", "val": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""Word in the name of a file or folder → the split that `datasets` reads from it."""
SPLIT_WORD = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(SPLIT_WORDS)})(?=[-._ 0-9]|$)", re.IGNORECASE)
SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*")


def read_split(name: str) -> str | None:
    """Returns the split that a relative path names, as `datasets` reads it: a shard's own in the
    folder `data`, else a word in a folder's or the file's name; None where it names none."""
    if shard := SHARD.fullmatch(name):
        return shard[1]
    found = next(filter(None, map(SPLIT_WORD.search, name.split("/"))), None)
    return SPLIT_WORDS[found[1].lower()] if found else None


def select_split(names: Iterable[str], split: str, place: str) -> list[str]:
    """Selects the files of `split` where their names tell several apart; files that do not are the
    split that is wanted. DataError for a split that none names, RecipeError where only some do."""
    splits = {name: read_split(name) for name in names}
    known = list(dict.fromkeys(found for found in splits.values() if found))
    is_one = len(set(splits.values())) < 2
    if not is_one and None in splits.values():
        plain = next(name for name, found in splits.items() if not found)
        raise RecipeError(
            f"{place}: has files of the split {', '.join(known)} and others that name no split, "
            f"such as {plain}; write the files to read as a list under path"
        )
    if is_one and split in ("train", "eval"):
        return list(splits)
    wanted = [split, SPLIT_WORDS.get(split), *(["validation"] if split == "eval" else [])]
    chosen = next((name for name in wanted if name in known), None)
    if chosen is None:
        known = ["train", "eval", *known] if is_one else known
        raise DataError(
            f"{place}: no split {show(split)}; known are {', '.join(dict.fromkeys(known))}"
            f"{did_you_mean(split, known)}"
        )
    return [name for name, found in splits.items() if found == chosen]


@contextmanager
def _report_errors_of(url: str) -> Iterator[None]:
    """Reports every fault as one of the URL."""
    try:
        yield
    except UserError:
        raise
    except ImportError as fault:
        raise RecipeError(f"{url}: needs a package that is not installed: {fault}") from None
    except FileNotFoundError:
        raise RecipeError(f"{url}: no such file") from None
    except Exception as fault:  # every protocol is a library with exceptions of its own
        kind, first = type(fault).__name__, first_line(fault)
        reason = kind if first == kind else f"{kind}: {first}"
        raise RecipeError(f"{url}: cannot be read: {reason}") from fault


class GivenSource(ConversationSource):
    """The source that a recipe names where a program passes the records in memory."""

    name = "given"
    config: RowsConfig

    def __init__(
        self, config: RowsConfig, trainer: Any = None, *, records: Sequence[dict[str, Any]] = ()
    ):
        super().__init__(config, trainer)
        self.records = records

    @classmethod
    def from_records(cls, records: Iterable[dict[str, Any]], config: Any = None) -> "GivenSource":
        """Makes a source of `records`; `config` is the recipe's `given` source, if it has one, else
        records with `input_ids` are read as tokens and all others as raw data."""
        records = records if isinstance(records, Sequence) else list(records)
        if not isinstance(config, RowsConfig) or config.type != cls.name:
            is_tokens = any(isinstance(one, Mapping) and "input_ids" in one for one in records[:1])
            config = RowsConfig(type=cls.name, process=not is_tokens)
        return cls(config, records=records)

    def load(self, config: RowsConfig, split: str) -> Records:
        if not self.records:
            raise DataError(
                f"{self.label}: no records; pass them as `train_data` or `eval_data` of the trainer"
            )
        return self.only_split(self.records, split)


class SyntheticSource(DataSource):
    """Random tokens, for plans and benchmarks."""

    name = "synthetic"
    config: SyntheticDataSourceConfig

    def load(self, config: SyntheticDataSourceConfig, split: str) -> Records:
        factory = self.data_factory
        records = SyntheticRecords(
            config.rows,
            factory.max_length,
            config.vocab_size or len(factory.tokenizer),
            factory.config.seed,
        )
        return self.only_split(records, split)


@dataclass(frozen=True)
class SyntheticRecords:
    """Records of `length` trained tokens, a function of the seed and the record's number."""

    count: int
    length: int
    vocab_size: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        places = np.arange(index * self.length, (index + 1) * self.length, dtype=np.uint64)
        drawn = hash_with_keys(places, TOKENS, self.seed) % np.uint64(self.vocab_size)
        tokens = drawn.astype(np.int64)
        return {"input_ids": tokens, "labels": tokens}

    def where(self, index: int) -> str:
        return f"synthetic record {index}"

    def update_digest(self, digest: Any) -> None:
        digest.update(repr((self.count, self.length, self.vocab_size, self.seed)).encode())
