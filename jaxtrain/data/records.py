"""Records of raw input, looked up by number, that know where they were read."""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxtrain.recipe.errors import DataError, did_you_mean, show

SPLIT = re.compile(r"(?P<name>[^\[\]]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@runtime_checkable
class Records(Protocol):
    """The records of a source, by random access, so that nothing has to be held in memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...

    def where(self, index: int, /) -> str:
        """The record's place for messages: `file:line`, or a name and the number in it."""
        ...


@runtime_checkable
class Digestible(Protocol):
    """Records whose content can be hashed without reading them one by one."""

    def update_digest(self, digest: Any, /) -> None:
        """Feeds `digest` with everything that decides the records, but no name or place."""
        ...


def hash_records(records: Records) -> str:
    """Returns a digest that is equal for equal records read in the same way."""
    digest = hashlib.sha256()
    update_digest(digest, records)
    return digest.hexdigest()


def update_digest(digest: Any, records: Records) -> None:
    if isinstance(records, Digestible):
        records.update_digest(digest)
        return
    for index in range(len(records)):
        text = json.dumps(records[index], default=repr)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")


class ReadColumns(dict[str, Any]):
    """A record that notes which of its columns are read, so that none is left out in silence."""

    def __init__(self, record: Mapping[str, Any]):
        super().__init__(record)
        self._read: set[str] = set()

    def __getitem__(self, column: str) -> Any:
        self._read.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        self._read.add(column)
        return super().get(column, default)

    def __iter__(self) -> Iterator[str]:  # without it, `{**record}` would not ask for the columns
        return super().__iter__()

    def items(self) -> Any:
        return {**self}.items()

    def values(self) -> Any:
        return {**self}.values()

    def find_unread(self) -> list[str]:
        """Returns the columns that nothing has read and that hold something."""
        columns = dict.items(self)
        return [name for name, value in columns if value is not None and name not in self._read]


class NamedRecords:
    """Records of anything with a length and integer indices: a list, a `datasets.Dataset`."""

    def __init__(self, records: Any, label: str):
        self._records = records
        self._label = label

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        if not isinstance(record, Mapping):
            raise DataError(f"{self.where(index)}: a record must be a map, found {show(record)}")
        return dict(record)

    def where(self, index: int) -> str:
        return f"{self._label}: record {index}"


class SelectedRecords:
    """A selection of other records, in the order of `indices`."""

    def __init__(self, records: Records, indices: Sequence[int] | np.ndarray):
        self._records = records
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._records[int(self._indices[index])]

    def where(self, index: int) -> str:
        return self._records.where(int(self._indices[index]))

    def update_digest(self, digest: Any) -> None:
        update_digest(digest, self._records)
        digest.update(np.asarray(self._indices, dtype=np.int64).tobytes())


class ConcatenatedRecords:
    """The records of several files, one file after the other."""

    def __init__(self, parts: Sequence[Records]):
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _locate(self, index: int) -> tuple[Records, int]:
        part = bisect_right(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        records, index = self._locate(index)
        return records[index]

    def where(self, index: int) -> str:
        records, index = self._locate(index)
        return records.where(index)

    def update_digest(self, digest: Any) -> None:
        for part in self._parts:
            digest.update(len(part).to_bytes(8, "little"))
            update_digest(digest, part)


class MappedRecords:
    """Records that pass through a function when read; its `DataError` gets the record's place."""

    def __init__(self, records: Records, function: Callable[[dict[str, Any]], dict[str, Any]]):
        self._records = records
        self._function = function

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        try:
            return self._function(record)
        except DataError as fault:
            raise DataError(f"{self.where(index)}: {fault}") from None

    def where(self, index: int) -> str:
        return self._records.where(index)

    def update_digest(self, digest: Any) -> None:
        """Hashes the function's input; the source's options and code stand for the function."""
        update_digest(digest, self._records)


def find_source_index(records: Records, index: int) -> int:
    """Returns the number that a record had before a split or a sample was taken."""
    while isinstance(records, SelectedRecords | MappedRecords):
        if isinstance(records, SelectedRecords):
            index = int(records._indices[index])
        records = records._records
    return index


def rename_columns(records: Records, columns: Mapping[str, str]) -> Records:
    """Returns `records` with renamed columns; DataError for a record that lacks one of them."""

    def rename(record: dict[str, Any]) -> dict[str, Any]:
        for column in columns:
            get_column(record, column)
        return {columns.get(name, name): value for name, value in record.items()}

    return MappedRecords(records, rename) if columns else records


def drop_nulls(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record of a typed table without the nulls below its columns.

    A table gives every map the keys of all others, so a call would be trained with the arguments of
    every other function."""
    return {column: _drop_nulls(value) for column, value in record.items()}


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_nulls(kept) for key, kept in value.items() if kept is not None}
    if isinstance(value, list):
        return [_drop_nulls(part) for part in value]
    return value


def load_json(text: str) -> Any:
    """Parses JSON; every fault is a JSONDecodeError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        why = "nested too deeply"
    except ValueError:  # Python reads no integer of so many digits
        why = "a number of too many digits"
    raise json.JSONDecodeError(why, text, 0)


def first_line(fault: BaseException) -> str:
    """Returns the first line of a library's message, whose other lines are its own hints."""
    return next(iter(str(fault).strip().splitlines()), type(fault).__name__)


def get_column(record: Mapping[str, Any], column: str, hint: str = "") -> Any:
    if column not in record:
        near = did_you_mean(column, record)
        raise DataError(
            f"no column {show(column)}, found {', '.join(record) or 'none'}{near}{hint}"
        )
    return record[column]


def get_text(record: Mapping[str, Any], column: str) -> str:
    if not isinstance(value := get_column(record, column), str):
        raise DataError(f"{column}: must be text, found {show(value)}")
    return value


def take_split(splits: Mapping[str, Records], split: str, label: str) -> Records:
    """Selects `train`, `train[10:20]` or `train[:10%]`; DataError lists the known splits."""
    match = SPLIT.fullmatch(split)
    if match is None:
        raise DataError(f"{label}: split {show(split)} must have the form train[10:20]")
    name = match["name"]
    if name not in splits:
        raise DataError(
            f"{label}: no split {show(name)}; known are {', '.join(splits)}"
            f"{did_you_mean(name, splits)}"
        )
    records, count = splits[name], len(splits[name])
    chosen = range(count)[_parse_bound(match["start"], count) : _parse_bound(match["stop"], count)]
    if len(chosen) == count:
        return records
    if not chosen:
        raise DataError(f"{label}: split {show(split)} is empty; {name} has {count} records")
    return SelectedRecords(records, chosen)


def _parse_bound(text: str | None, count: int) -> int | None:
    if not text:
        return None
    return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)
