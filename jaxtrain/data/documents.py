"""Tokenised documents in flat arrays on disk, mapped into memory, without a Python object each."""

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

INDEX_DTYPE = np.dtype(
    [
        ("end", np.int64),  # where the document ends in the flat arrays
        ("source", np.int32),
        ("record", np.int64),  # number of the record in its source
        ("trained", np.int32),  # tokens with a weight
        ("digest", np.uint64),  # of the tokens: equal for equal documents
        ("rejected_start", np.int64),  # first token of the rejected sequence; else the length
        ("scores", np.float32, 2),  # of a preference, as in the data set; else not a number
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
    """INDEX_DTYPE [documents]: the origin of each document, and its counts"""

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def sequence_lengths(self) -> np.ndarray:
        """int64 [documents]: `lengths`, or the longer of the two sequences of a preference."""
        return np.maximum(self.index["rejected_start"], self.lengths - self.index["rejected_start"])

    @classmethod
    def open(cls, folder: Path) -> "Documents":
        """Maps what a `DocumentWriter` wrote; the maps stay readable when the files are deleted."""
        dtypes = (np.int32, np.uint8, INDEX_DTYPE)
        tokens, weights, index = map(_map_array, (folder / name for name in FILES), dtypes)
        offsets = np.concatenate([np.zeros(1, np.int64), index["end"]])
        return cls(tokens, weights, offsets, index)

    def save(self, folder: Path) -> None:
        """Writes the files that `open` maps."""
        for name, part in zip(FILES, (self.tokens, self.weights, self.index), strict=True):
            part.tofile(folder / name)


class DocumentWriter(ExitStack):
    """Appends documents to the files of a folder, and closes the files on exit."""

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
        record: int,
        rejected_start: int | None = None,
        scores: tuple[float, float] = NO_SCORES,
    ) -> None:
        tokens = np.ascontiguousarray(tokens, dtype=np.int32)
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
        self._end += len(tokens)
        trained = int(np.count_nonzero(weights))
        rejected_start = len(tokens) if rejected_start is None else rejected_start
        digest = int.from_bytes(digest, "little")
        entry = (self._end, source, record, trained, digest, rejected_start, scores)
        parts = (tokens, weights.astype(np.uint8), np.array([entry], dtype=INDEX_DTYPE))
        for file, part in zip(self._files, parts, strict=True):
            file.write(part.tobytes())


def _map_array(path: Path, dtype: np.dtype | type) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
