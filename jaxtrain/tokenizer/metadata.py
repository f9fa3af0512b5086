"""The metadata of a GGUF file, read in a tenth of a second; the `gguf` package, which makes a numpy
array of every token, takes seconds for a vocabulary."""

import mmap
import struct
from pathlib import Path
from typing import Any

from jaxtrain.recipe.errors import RecipeError

NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""Type code of the format → its struct letter."""
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)


def read_metadata(path: Path) -> dict[str, Any]:
    """Key → number, text, or list of them; RecipeError for a file that is no GGUF or cut off."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise RecipeError(f"{path}: not a GGUF file")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = _Reader(data)
    try:
        version = reader.number("I")
        if version not in VERSIONS:
            raise RecipeError(f"{path}: GGUF version {version} cannot be read, only 2 and 3")
        reader.number("Q")  # tensors
        return dict(reader.pair() for _ in range(reader.number("Q")))
    except (struct.error, UnicodeDecodeError, KeyError):
        raise RecipeError(f"{path}: the metadata is damaged; is the file cut off?") from None


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
