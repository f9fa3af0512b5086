"""Records of local files: byte offsets into a memory map, parsed when a record is read.

Arrow's own readers would give every record the columns and fields of all others, filled with null,
and would name no line. Memory holds two integers per record.
"""

import csv
import io
import json
import mmap
import re
import shutil
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxtrain.assets import cache_folder
from jaxtrain.data.records import (
    ConcatenatedRecords,
    NamedRecords,
    Records,
    drop_nulls,
    first_line,
    load_json,
)
from jaxtrain.recipe.data import COMPRESSED, FORMATS, file_format
from jaxtrain.recipe.errors import DataError, RecipeError, pluralize, show

BOM = b"\xef\xbb\xbf"
LINE = re.compile(rb"[^\S\n]*(\S[^\n]*)")
# The brackets and commas of JSON; a quote that opens no complete string matches by itself.
STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|"|[{}\[\],]', re.DOTALL)
NOT_BLANK = re.compile(rb"\s*(\S)")
BLOCK_BYTES = 1 << 22
ARROW_BLOCK = 256
HASH_RECORDS = 4096
ARROW_FILE = b"ARROW1"
UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What pyarrow raises for a damaged file."""


def open_temporary_file() -> Any:
    """Opens a nameless file in the user's cache, gone with the process however that ends."""
    folder = cache_folder() / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=folder)


def open_files(
    paths: Iterable[Path], kind: str = "auto", *, column: str = "text", per_line: bool = False
) -> Records:
    """Opens the records of `paths`; `kind` is a source type, or `auto` to go by each suffix."""
    parts: list[Records] = []
    for path in paths:
        form = file_format(path.name) if kind == "auto" else kind
        if form == "text":
            parts.append((TextLines if per_line else TextFile)(path, column))
        elif form in READERS:
            parts.append(READERS[form](path))
        else:
            raise RecipeError(f"{path}: unknown suffix; known are {', '.join(FORMATS)}")
    return parts[0] if len(parts) == 1 else ConcatenatedRecords(parts)


class _FileRecords:
    """Byte ranges of one file, each of which is parsed to a record on access."""

    def __init__(self, path: Path, contents: mmap.mmap | None = None):
        self.path = path
        self._bytes = _map_unpacked(path) if contents is None else contents
        self._data_start = _skip_bom(self._bytes)
        bounds = array("q", (bound for pair in self._find_ranges() for bound in pair))
        self._bounds = np.frombuffer(bounds, dtype=np.int64).reshape(-1, 2)
        if len(self._bounds) == 0:
            raise DataError(f"{path}: no records")

    def _find_ranges(self) -> Iterator[tuple[int, int]]:
        raise NotImplementedError

    def _parse(self, text: str, start: int) -> dict[str, Any]:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = map(int, self._bounds[index])
        return self._parse(self._decode(start, end), start)

    def where(self, index: int) -> str:
        return self._place(int(self._bounds[index][0]))

    def _place(self, start: int, lines: int = 0) -> str:
        """Names the record that starts at a byte, or the line so many `lines` below its first."""
        return f"{self.path}:{self._line(start) + lines}"

    def update_digest(self, digest: Any) -> None:
        digest.update(type(self).__name__.encode())
        digest.update(self._bytes)

    def _decode(self, start: int, end: int) -> str:
        try:
            return self._bytes[start:end].decode("utf-8")
        except UnicodeDecodeError as fault:
            line = self._line(start + fault.start)
            byte = fault.object[fault.start]
            raise DataError(
                f"{self.path}:{line}: not UTF-8, found byte 0x{byte:02x}; save the file as UTF-8"
            ) from None

    def _line(self, offset: int) -> int:
        """Counts the lines up to a byte, which only messages need."""
        blocks = range(0, offset, BLOCK_BYTES)
        return 1 + sum(self._bytes[b : min(b + BLOCK_BYTES, offset)].count(b"\n") for b in blocks)


class JsonLines(_FileRecords):
    """One object per line; blank lines are skipped."""

    def _find_ranges(self) -> Iterator[tuple[int, int]]:
        for match in LINE.finditer(self._bytes, self._data_start):
            yield match.span(1)

    def _parse(self, text: str, start: int) -> dict[str, Any]:
        try:
            record = load_json(text)
        except json.JSONDecodeError as fault:
            raise DataError(
                f"{self._place(start, fault.lineno - 1)}: not JSON: {fault.msg} at column "
                f"{fault.colno}, found {show(text[fault.pos :])}"
            ) from None
        if not isinstance(record, dict):
            raise DataError(f"{self._place(start)}: must be an object, found {show(record)}")
        return record


class JsonArray(JsonLines):
    """The objects of one JSON list."""

    def _find_ranges(self) -> Iterator[tuple[int, int]]:
        opening = NOT_BLANK.match(self._bytes, self._data_start)
        if opening is None or opening[1] != b"[":
            found = self._decode(self._data_start, min(len(self._bytes), 64))
            raise DataError(
                f"{self.path}:1: must be a list of objects, or one object per line, "
                f"found {show(found)}"
            )
        depth, start, is_first = 1, opening.end(), True
        for match in STRUCTURE.finditer(self._bytes, start):
            mark = match[0]
            if mark == b'"' or (mark == b"}" and depth == 1):
                line = self._line(match.start())
                raise DataError(f"{self.path}:{line}: not JSON: {mark.decode()} without its pair")
            if depth == 1 and mark in (b",", b"]"):
                first = NOT_BLANK.match(self._bytes, start)
                start = min(first.start(1), match.start()) if first else match.start()
                if not (is_first and mark == b"]" and start == match.start()):
                    yield start, match.start()
                start, is_first = match.end(), False
            depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(mark, 0)
            if depth == 0:
                if (rest := NOT_BLANK.match(self._bytes, match.end())) is not None:
                    line = self._line(rest.start(1))
                    raise DataError(f"{self.path}:{line}: text after the end of the list")
                return
        raise DataError(f"{self.path}: ends before its list does; is the file cut off?")

    def _place(self, start: int, lines: int = 0) -> str:
        """Adds the number of the record, since many arrays are one line."""
        number = int(np.searchsorted(self._bounds[:, 0], start))
        return f"{super()._place(start, lines)}: record {number}"


class Csv(_FileRecords):
    """A header, and records of text values; quoted values may hold line breaks."""

    def _find_ranges(self) -> Iterator[tuple[int, int]]:
        csv.field_size_limit(sys.maxsize)  # the default refuses texts of 128 KiB
        self._position = self._data_start
        records = csv.reader(self._lines(), strict=True)
        try:
            self._header = next(records, [])  # empty after a byte order mark alone
            if twice := [name for name, count in Counter(self._header).items() if count > 1]:
                raise DataError(f"{self.path}:1: the header has column {show(twice[0])} twice")
            start = self._position
            for record in records:
                if record and len(record) != len(self._header):
                    values, columns = len(record), len(self._header)
                    raise DataError(
                        f"{self.path}:{self._line(start)}: {pluralize(values, 'value')}, but the "
                        f"header has {pluralize(columns, 'column')}: {', '.join(self._header)}"
                    )
                if record:
                    yield start, self._position
                start = self._position
        except csv.Error as fault:
            line, why = self._line(self._position - 1), str(fault)
            if "new-line character" in why:
                why = "a carriage return outside quotes; end lines with a line feed"
            raise DataError(f"{self.path}:{line}: not CSV: {why}") from None

    def _lines(self) -> Iterator[str]:
        """Yields lines; the reader stops at the end of its record, where `_position` then is."""
        while self._position < len(self._bytes):
            end = self._bytes.find(b"\n", self._position) + 1 or len(self._bytes)
            line = self._decode(self._position, end)
            self._position = end
            yield line

    def _parse(self, text: str, start: int) -> dict[str, Any]:
        (record,) = csv.reader(io.StringIO(text, newline=""), strict=True)
        return dict(zip(self._header, record, strict=True))


class TextLines(_FileRecords):
    """One record per line."""

    def __init__(self, path: Path, column: str):
        self._column = column
        super().__init__(path)

    def _find_ranges(self) -> Iterator[tuple[int, int]]:
        for match in LINE.finditer(self._bytes, self._data_start):
            yield match.span()

    def _parse(self, text: str, start: int) -> dict[str, Any]:
        return {self._column: text.removesuffix("\r")}


class TextFile(TextLines):
    """The whole file as one record."""

    def _find_ranges(self) -> Iterator[tuple[int, int]]:
        if LINE.search(self._bytes, self._data_start):
            yield self._data_start, len(self._bytes)

    def _parse(self, text: str, start: int) -> dict[str, Any]:
        return {self._column: text}


class ArrowRecords(NamedRecords):
    """Records of a memory-mapped table; one block at a time becomes Python objects."""

    def __init__(self, table: Any, label: str):
        super().__init__(table, label)
        self._block: tuple[int, list[dict[str, Any]]] = (-1, [])

    def __getitem__(self, index: int) -> dict[str, Any]:
        block, place = divmod(index, ARROW_BLOCK)
        if self._block[0] != block:
            records = self._read_block(block * ARROW_BLOCK, (block + 1) * ARROW_BLOCK)
            self._block = (block, [drop_nulls(record) for record in records])
        return self._block[1][place]

    def _read_block(self, start: int, stop: int) -> list[dict[str, Any]]:
        return self._records[start:stop].to_pylist()

    def update_digest(self, digest: Any) -> None:
        hash_table(digest, self._records)


def hash_table(digest: Any, table: Any) -> None:
    """Hashes a table with its schema and dictionaries, which hold the names and values of columns
    and are no part of its batches, but without metadata, which may name places."""
    for batch in table.replace_schema_metadata(None).to_batches(max_chunksize=HASH_RECORDS):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        digest.update(sink.getvalue())


def read_json(path: Path) -> Records:
    """Reads a list of objects, or one object per line, which files often have under this suffix."""
    whole = _map_unpacked(path)
    start = NOT_BLANK.match(whole, _skip_bom(whole))
    if start is None or start[1] != b"{":
        return JsonArray(path, whole)
    lines = JsonLines(path, whole)
    try:
        lines[0]
    except DataError:
        raise DataError(
            f"{path}:1: must be a list of objects, or one object per line, found one object over "
            f"several lines"
        ) from None
    return lines


def read_parquet(path: Path) -> Records:
    """Copies blocks into an uncompressed file that can be mapped and read at any record."""
    sink = open_temporary_file()
    try:
        with (
            pq.ParquetFile(path, memory_map=True) as file,
            pa.ipc.new_file(sink, file.schema_arrow) as writer,
        ):
            for batch in file.iter_batches(batch_size=4 * ARROW_BLOCK):
                writer.write_batch(batch)
    except UNREADABLE as fault:
        raise DataError(f"{path}: not a readable Parquet file: {first_line(fault)}") from None
    sink.flush()
    return _open_table(map_file(sink, path), path)


def read_arrow(path: Path) -> Records:
    """Maps a table in Arrow's file format (Feather too) or its stream format."""
    return _open_table(_map_unpacked(path), path)


def _open_table(whole: mmap.mmap, path: Path) -> Records:
    is_file = whole[: len(ARROW_FILE)] == ARROW_FILE
    try:
        reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(pa.py_buffer(whole))
        table = reader.read_all()
        _check_names(table.schema)
        table.validate(full=True)  # offsets of a damaged file would be followed out of its memory
    except UNREADABLE as fault:
        raise DataError(f"{path}: not a readable Arrow file: {first_line(fault)}") from None
    if len(table) == 0:
        raise DataError(f"{path}: no records")
    return ArrowRecords(table, str(path))


def _check_names(fields: Iterable[Any]) -> None:
    """Decodes the name of every field, which may fail in a damaged file."""
    for field in fields:
        assert isinstance(field.name, str)
        _check_names(field.type.field(n) for n in range(field.type.num_fields))


def _map_unpacked(path: Path) -> Any:
    """Maps the bytes of a file read-only, unpacked first if its suffix says so."""
    if path.suffix.lower() not in COMPRESSED:
        with path.open("rb") as file:
            return map_file(file, path)
    codec = {".gz": "gzip", ".zst": "zstd"}[path.suffix.lower()]
    with open_temporary_file() as unpacked:
        try:
            with pa.input_stream(str(path), compression=codec) as packed:
                shutil.copyfileobj(packed, unpacked, BLOCK_BYTES)
        except OSError as fault:
            raise DataError(f"{path}: cannot be unpacked: {first_line(fault)}") from None
        unpacked.flush()
        return map_file(unpacked, path)


def _skip_bom(whole: Any) -> int:
    return len(BOM) if whole[: len(BOM)] == BOM else 0


def map_file(file: Any, path: Path) -> Any:
    """Maps an open file read-only; messages call it `path`."""
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:  # an empty file cannot be mapped
        raise DataError(f"{path}: the file is empty") from None


READERS: dict[str, Callable[[Path], Records]] = {
    "json": read_json,
    "jsonl": JsonLines,
    "csv": Csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
