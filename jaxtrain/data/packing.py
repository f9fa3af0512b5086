"""Which documents share a row. Planned once over the whole set, so that the number of rows, and
with it the length of an epoch, is known before the first step."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class RowPlan(NamedTuple):
    """Row r holds the pieces `offsets[r]:offsets[r + 1]`, each a run of tokens of one document."""

    documents: np.ndarray
    """int64 [pieces]"""
    starts: np.ndarray
    """int64 [pieces]: first token, counted in its document"""
    lengths: np.ndarray
    """int64 [pieces]"""
    offsets: np.ndarray
    """int64 [rows + 1]"""

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def row_lengths(self) -> np.ndarray:
        """int64 [rows]: tokens without padding."""
        return np.add.reduceat(self.lengths, self.offsets[:-1]) if self.num_rows else self.lengths


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Row of each document, int64 [documents]: longest first, each into the fullest row that has
    room for it."""
    rows = np.zeros(len(lengths), dtype=np.int64)
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit s is set while some row has s tokens of room: the tightest fit is the lowest bit from
    # the document's length on, found in a few machine instructions a word.
    rooms, num_rows = 0, 0
    order = np.argsort(-lengths, kind="stable")
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                rooms &= ~(1 << room)
        else:
            row, room = num_rows, capacity
            num_rows += 1
        rows[document] = row
        if room > length:
            rows_with[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows


def next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Row of each document, int64 [documents]: in order; one that does not fit opens a row."""
    rows = np.zeros(len(lengths), dtype=np.int64)
    row, room = 0, capacity
    for document, length in enumerate(lengths.tolist()):
        if length > room:
            row, room = row + 1, capacity
        rows[document] = row
        room -= length
    return rows


def one_per_row(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Row of each document, int64 [documents]."""
    return np.arange(len(lengths), dtype=np.int64)


FILL_RULES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "best_fit": best_fit,
    "next_fit": next_fit,
    "none": one_per_row,
}


def plan_rows(lengths: np.ndarray, capacity: int, rule: str, chosen: np.ndarray) -> RowPlan:
    """Rows of at most `capacity` tokens out of the documents numbered in `chosen`; rows, and the
    documents in each, stand in the documents' order."""
    lengths = lengths[chosen]
    assert len(lengths) == 0 or 0 < lengths.min() <= lengths.max() <= capacity
    rows = FILL_RULES[rule](lengths, capacity)
    _, first, rows = np.unique(rows, return_index=True, return_inverse=True)
    rows = np.argsort(np.argsort(first))[rows]  # numbered by their first document
    order = np.argsort(rows, kind="stable")
    counts = np.bincount(rows, minlength=0)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return RowPlan(chosen[order], np.zeros(len(order), np.int64), lengths[order], offsets)
