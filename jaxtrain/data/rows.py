"""Rows that are looked up by number and know where they were read."""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxtrain.recipe.errors import DataError, did_you_mean, show

SPLIT = re.compile(r"(?P<name>[^\[\]]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@runtime_checkable
class Rows(Protocol):
    """What a source gives: random access, so that nothing has to be held in memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...

    def where(self, index: int, /) -> str:
        """`file:line`, or a name and the row's number in it, for messages."""
        ...


@runtime_checkable
class KnowsContent(Protocol):
    """Rows that tell what they hold without being read one by one."""

    def content(self, digest: Any, /) -> None:
        """Feed `digest` with all that decides the rows, and with no name or place."""
        ...


def rows_digest(rows: Rows) -> str:
    """Equal for equal rows that are read in the same way."""
    digest = hashlib.sha256()
    add_content(digest, rows)
    return digest.hexdigest()


def add_content(digest: Any, rows: Rows) -> None:
    if isinstance(rows, KnowsContent):
        rows.content(digest)
        return
    for index in range(len(rows)):
        text = json.dumps(rows[index], default=repr)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")


class NamedRows:
    """Rows of anything that has a length and numbers: a list, a `datasets.Dataset`."""

    def __init__(self, rows: Sequence[dict[str, Any]] | Any, label: str):
        self._rows = rows
        self._label = label

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        if not isinstance(row, Mapping):
            raise DataError(f"{self.where(index)}: a row must be a map, found {show(row)}")
        return dict(row)

    def where(self, index: int) -> str:
        return f"{self._label}: row {index}"


class SelectedRows:
    """Some rows of others, in the order of `indices`."""

    def __init__(self, rows: Rows, indices: Sequence[int] | np.ndarray):
        self._rows = rows
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[int(self._indices[index])]

    def where(self, index: int) -> str:
        return self._rows.where(int(self._indices[index]))

    def content(self, digest: Any) -> None:
        add_content(digest, self._rows)
        digest.update(np.asarray(self._indices, dtype=np.int64).tobytes())


class ConcatenatedRows:
    """The rows of several files, one after the other."""

    def __init__(self, parts: Sequence[Rows]):
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _place(self, index: int) -> tuple[Rows, int]:
        part = bisect_right(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows, index = self._place(index)
        return rows[index]

    def where(self, index: int) -> str:
        rows, index = self._place(index)
        return rows.where(index)

    def content(self, digest: Any) -> None:
        for part in self._parts:
            digest.update(len(part).to_bytes(8, "little"))
            add_content(digest, part)


class MappedRows:
    """Rows passed through a function when they are read; its `DataError` gets the row's place."""

    def __init__(self, rows: Rows, function: Callable[[dict[str, Any]], dict[str, Any]]):
        self._rows = rows
        self._function = function

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        try:
            return self._function(row)
        except DataError as fault:
            raise DataError(f"{self.where(index)}: {fault}") from None

    def where(self, index: int) -> str:
        return self._rows.where(index)

    def content(self, digest: Any) -> None:
        """Of what goes into the function, which the source's options and code stand for."""
        add_content(digest, self._rows)


def number_in_source(rows: Rows, index: int) -> int:
    """The number that a row had before a split or a sample was taken."""
    while isinstance(rows, SelectedRows | MappedRows):
        if isinstance(rows, SelectedRows):
            index = int(rows._indices[index])
        rows = rows._rows
    return index


def renamed(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """`rows` with columns under other names; DataError for a row that lacks one of them."""

    def rename(row: dict[str, Any]) -> dict[str, Any]:
        for column in columns:
            if column not in row:
                raise missing_column(column, row)
        return {columns.get(name, name): value for name, value in row.items()}

    return MappedRows(rows, rename) if columns else rows


def without_filling(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a typed table without the nulls below its columns: a table gives every map the keys
    of all others, so that a call would be trained with the arguments of every other function."""
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(kept) for key, kept in value.items() if kept is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


def first_line(fault: BaseException) -> str:
    """Of what a library raised, whose other lines are hints of its own."""
    return next(iter(str(fault).strip().splitlines()), type(fault).__name__)


def missing_column(column: str, row: Mapping[str, Any]) -> DataError:
    return DataError(
        f"no column {show(column)}, found {', '.join(row) or 'none'}{did_you_mean(column, row)}"
    )


def take_split(splits: Mapping[str, Rows], split: str, label: str) -> Rows:
    """The rows that `train`, `train[10:20]` or `train[:10%]` names; DataError lists the splits."""
    match = SPLIT.fullmatch(split)
    if match is None:
        raise DataError(f"{label}: split {show(split)} is not of the form train[10:20]")
    name = match["name"]
    if name not in splits:
        raise DataError(
            f"{label}: no split {show(name)}; there are {', '.join(splits)}"
            f"{did_you_mean(name, splits)}"
        )
    rows = splits[name]
    start = _bound(match["start"], len(rows), 0)
    stop = _bound(match["stop"], len(rows), len(rows))
    if (start, stop) == (0, len(rows)):
        return rows
    if start >= stop:
        raise DataError(f"{label}: split {show(split)} is empty; {name} has {len(rows)} rows")
    return SelectedRows(rows, range(start, stop))


def _bound(text: str | None, count: int, default: int) -> int:
    if not text:
        return default
    number = round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)
    return min(max(number + count if number < 0 else number, 0), count)
