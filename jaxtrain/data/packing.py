"""Which documents share a row. Planned once over the whole set, so that the number of rows, and
with it the length of an epoch, is known before the first step."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

BLOCK_BITS = 1024


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

    def without(self, row: int) -> "RowPlan":
        """All rows but one."""
        pieces = np.r_[self.offsets[row] : self.offsets[row + 1]]
        documents, starts, lengths = (np.delete(part, pieces) for part in self[:3])
        offsets = np.delete(self.offsets, row + 1)
        offsets[row + 1 :] -= len(pieces)
        return RowPlan(documents, starts, lengths, offsets)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Row of each document, int64 [documents]: longest first, each into the fullest row that has
    room for it."""
    rows = np.zeros(len(lengths), dtype=np.int64)
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, num_rows = _Rooms(capacity), 0
    order = np.argsort(-lengths, kind="stable")
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        room = rooms.tightest(length)
        if room is None:
            row, room = num_rows, capacity
            num_rows += 1
        else:
            row = rows_with[room].pop()
            if not rows_with[room]:
                rooms.remove(room)
        rows[document] = row
        if room > length:
            rows_with[room - length].append(row)
            rooms.add(room - length)
    return rows


class _Rooms:
    """A set of numbers that finds its least member from some number on in a few instructions: a
    bit a number in blocks, and a bit a block in `_used`."""

    def __init__(self, largest: int):
        self._blocks = [0] * (largest // BLOCK_BITS + 1)
        self._used = 0

    def add(self, room: int) -> None:
        block, bit = divmod(room, BLOCK_BITS)
        self._blocks[block] |= 1 << bit
        self._used |= 1 << block

    def remove(self, room: int) -> None:
        block, bit = divmod(room, BLOCK_BITS)
        self._blocks[block] &= ~(1 << bit)
        if not self._blocks[block]:
            self._used &= ~(1 << block)

    def tightest(self, length: int) -> int | None:
        block, bit = divmod(length, BLOCK_BITS)
        found = self._blocks[block] >> bit << bit
        if not found:
            later = self._used >> (block + 1) << (block + 1)
            if not later:
                return None
            block = _lowest_bit(later)
            found = self._blocks[block]
        return block * BLOCK_BITS + _lowest_bit(found)


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


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


def slices(lengths: np.ndarray, capacity: int, chosen: np.ndarray) -> RowPlan:
    """The documents numbered in `chosen` one behind the other, cut every `capacity` tokens: each
    row but the last is full, and a document may go on in the next row."""
    ends = np.cumsum(lengths[chosen])
    total = int(ends[-1]) if len(ends) else 0
    borders = np.arange(0, total, capacity)
    cuts = np.union1d(borders, ends - lengths[chosen])  # where a piece begins
    owner = np.searchsorted(ends, cuts, side="right")
    starts = cuts - (ends - lengths[chosen])[owner]
    offsets = np.append(np.searchsorted(cuts, borders), len(cuts))
    return RowPlan(chosen[owner], starts, np.diff(cuts, append=total), offsets.astype(np.int64))


def fitting_length(plans: Sequence[RowPlan], multiple: int, most: int) -> int:
    """The smallest multiple that holds the longest row of any plan, or `most`."""
    longest = max(int(rows.row_lengths.max()) for rows in plans)
    return min(-(-longest // multiple) * multiple, most)


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
