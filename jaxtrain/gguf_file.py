"""Reads the header of a GGUF file in a tenth of a second; the `gguf` package, which makes a numpy
array of every token, takes seconds for a vocabulary."""

import mmap
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from jaxtrain.recipe.errors import WeightError

NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""Type code of the format → its struct letter."""
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)


class Tensor(NamedTuple):
    shape: tuple[int, ...]
    kind: int
    """Type code of the format."""
    start: int
    """First byte in the file."""


class Header(NamedTuple):
    metadata: dict[str, Any]
    """Key → number, text, or list of them."""
    tensors: dict[str, Tensor]


def read_header(path: Path) -> Header:
    """Reads a header; WeightError for a file that is not GGUF, or is cut off."""
    facts = path.stat()
    return _read_header(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=1)  # the model, its weights and its tokenizer are read one after the other
def _read_header(path: Path, size: int, changed_ns: int) -> Header:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise WeightError(f"{path}: not a GGUF file")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # four bytes at least
    reader = _Reader(data)
    try:
        version = reader.read_number("I")
        if version not in VERSIONS:
            raise WeightError(f"{path}: must be GGUF version 2 or 3, found {version}")
        num_tensors, num_pairs = reader.read_number("Q"), reader.read_number("Q")
        metadata = dict(reader.read_pair() for _ in range(num_pairs))
        tensors = dict(reader.read_tensor() for _ in range(num_tensors))
        alignment = metadata.get("general.alignment", 32)
        start = -(-reader.at // alignment) * alignment
    except (struct.error, ValueError, LookupError, TypeError, ArithmeticError, RecursionError,
            MemoryError):  # fmt: skip
        raise WeightError(f"{path}: the metadata is damaged; is the file cut off?") from None
    return Header(metadata, {n: t._replace(start=start + t.start) for n, t in tensors.items()})


class _Reader:
    def __init__(self, data: mmap.mmap):
        self._data = data
        self.at = 4  # after the magic word

    def read_number(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self._data, self.at)
        self.at += struct.calcsize(f"<{letter}")
        return value

    def read_text(self) -> str:
        return self.read_texts(1)[0]

    def read_texts(self, count: int) -> list[str]:
        """In one loop, since a vocabulary has a hundred thousand."""
        data, at, unpack, texts = self._data, self.at, struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            end = at + 8 + unpack(data, at)[0]
            if end > len(data):
                raise struct.error
            texts.append(data[at + 8 : end].decode("utf-8"))
            at = end
        self.at = at
        return texts

    def read_pair(self) -> tuple[str, Any]:
        return self.read_text(), self.read_value(self.read_number("I"))

    def read_tensor(self) -> tuple[str, Tensor]:
        name = self.read_text()
        shape = [self.read_number("Q") for _ in range(self.read_number("I"))]
        return name, Tensor(tuple(reversed(shape)), self.read_number("I"), self.read_number("Q"))

    def read_value(self, kind: int) -> Any:
        if kind == STRING:
            return self.read_text()
        if kind != ARRAY:
            return self.read_number(NUMBERS[kind])
        kind, count = self.read_number("I"), self.read_number("Q")
        if kind in NUMBERS:
            if count > len(self._data):  # a damaged count, for which struct would allocate
                raise struct.error
            layout = struct.Struct(f"<{count}{NUMBERS[kind]}")
            self.at += layout.size
            return list(layout.unpack_from(self._data, self.at - layout.size))
        if kind == STRING:
            return self.read_texts(count)
        return [self.read_value(kind) for _ in range(count)]
