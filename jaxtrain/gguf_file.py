"""The header of a GGUF file, read in a tenth of a second; the `gguf` package, which makes a numpy
array of every token, takes seconds for a vocabulary."""

import mmap
import struct
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
    """WeightError for a file that is no GGUF or cut off."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise WeightError(f"{path}: not a GGUF file")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = _Reader(data)
    try:
        version = reader.number("I")
        if version not in VERSIONS:
            raise WeightError(f"{path}: GGUF version {version} cannot be read, only 2 and 3")
        num_tensors, num_pairs = reader.number("Q"), reader.number("Q")
        metadata = dict(reader.pair() for _ in range(num_pairs))
        tensors = dict(reader.tensor() for _ in range(num_tensors))
    except (struct.error, UnicodeDecodeError, KeyError):
        raise WeightError(f"{path}: the metadata is damaged; is the file cut off?") from None
    start = reader.after(metadata.get("general.alignment", 32))
    return Header(metadata, {n: t._replace(start=start + t.start) for n, t in tensors.items()})


class _Reader:
    def __init__(self, data: mmap.mmap):
        self._data = data
        self._at = 4  # behind the magic word

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self._data, self._at)
        self._at += struct.calcsize(f"<{letter}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        if self._at + length > len(self._data):
            raise struct.error
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8")

    def pair(self) -> tuple[str, Any]:
        return self.text(), self.value(self.number("I"))

    def tensor(self) -> tuple[str, Tensor]:
        name = self.text()
        shape = [self.number("Q") for _ in range(self.number("I"))]
        return name, Tensor(tuple(reversed(shape)), self.number("I"), self.number("Q"))

    def after(self, alignment: int) -> int:
        """The first place from here on that is a multiple."""
        return -(-self._at // alignment) * alignment

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(NUMBERS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind in NUMBERS:
            if count > len(self._data):  # a damaged count, which struct would try to honour
                raise struct.error
            layout = struct.Struct(f"<{count}{NUMBERS[kind]}")
            self._at += layout.size
            return list(layout.unpack_from(self._data, self._at - layout.size))
        return [self.value(kind) for _ in range(count)]
