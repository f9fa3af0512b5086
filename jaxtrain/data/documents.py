"""Tokenised documents in flat arrays on disk, mapped into memory: a row costs no Python object."""

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

INDEX_DTYPE = np.dtype(
    [
        ("end", np.int64),  # where the document ends in the flat arrays
        ("source", np.int32),
        ("row", np.int64),  # number of the row in its source
        ("trained", np.int32),  # tokens with a weight
        ("digest", np.uint64),  # of the tokens: equal for equal documents
        ("border", np.int64),  # where the rejected reply's sequence begins; the length if none does
        ("scores", np.float32, 2),  # of a preference, as the data set has them; else not a number
    ]
)
FILES = ("tokens.bin", "weights.bin", "index.bin")
NO_SCORES = (float("nan"), float("nan"))


class Documents(NamedTuple):
    """Document d is `tokens[offsets[d]:offsets[d + 1]]`, and its weights likewise. A preference is
    one document: the sequence of the chosen reply, then that of the rejected one."""

    tokens: np.ndarray
    """int32 [sum of lengths]"""
    weights: np.ndarray
    """uint8 [sum of lengths]"""
    offsets: np.ndarray
    """int64 [documents + 1]"""
    index: np.ndarray
    """INDEX_DTYPE [documents]: where each came from, and its counts"""

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def sequence_lengths(self) -> np.ndarray:
        """int64 [documents]: as `lengths`, but of the longer sequence of a preference."""
        return np.maximum(self.index["border"], self.lengths - self.index["border"])

    @classmethod
    def open(cls, folder: Path) -> "Documents":
        """What a `DocumentWriter` has closed; the maps outlive the files' names."""
        tokens, weight, index = (folder / name for name in FILES)
        records = _mapped(index, INDEX_DTYPE)
        offsets = np.zeros(len(records) + 1, dtype=np.int64)
        offsets[1:] = records["end"]
        return cls(_mapped(tokens, np.int32), _mapped(weight, np.uint8), offsets, records)

    def save(self, folder: Path) -> None:
        """Writes what `open` reads."""
        for name, part in zip(FILES, (self.tokens, self.weights, self.index), strict=True):
            part.tofile(folder / name)


class DocumentWriter(ExitStack):
    """Appends documents to the files of a folder, and closes them."""

    def __init__(self, folder: Path):
        super().__init__()
        files = ((folder / name).open("wb", buffering=1 << 20) for name in FILES)
        self._files = [self.enter_context(file) for file in files]
        self._end = 0

    def append(
        self,
        tokens: np.ndarray,
        weights: np.ndarray,
        *,
        source: int,
        row: int,
        border: int | None = None,
        scores: tuple[float, float] = NO_SCORES,
    ) -> None:
        tokens = np.ascontiguousarray(tokens, dtype=np.int32)
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
        self._end += len(tokens)
        trained = int(np.count_nonzero(weights))
        border = len(tokens) if border is None else border
        record = (
            self._end, source, row, trained, int.from_bytes(digest, "little"), border, scores
        )  # fmt: skip
        parts = (tokens, weights.astype(np.uint8), np.array([record], dtype=INDEX_DTYPE))
        for file, part in zip(self._files, parts, strict=True):
            file.write(part.tobytes())


def _mapped(path: Path, dtype: np.dtype | type) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
