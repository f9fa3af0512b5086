"""Which documents share a row. Planned once over the whole set, so that the number of rows, and
with it the length of an epoch, is known before the first step."""

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MOST_CANDIDATES = 256
SHORTEST = 128  # tokens; rows below it leave lanes of the devices' matrix units empty


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
    rows, num_rows = np.zeros(len(lengths), dtype=np.int64), 0
    rooms: list[int] = []  # that some row has, rising
    rows_with: dict[int, list[int]] = {}
    order = np.argsort(-lengths, kind="stable")
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = num_rows, capacity
            num_rows += 1
        else:
            room = rooms[place]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[place], rows_with[room]
        rows[document] = row
        left = room - length
        if left and left not in rows_with:
            insort(rooms, left)
        if left:
            rows_with.setdefault(left, []).append(row)
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


FILL_RULES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "best_fit": best_fit,
    "next_fit": next_fit,
    "none": lambda lengths, _: np.arange(len(lengths)),
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


def fitting_lengths(
    row_lengths: np.ndarray, *, update_rows: int, multiple: int, most: int, count: int
) -> tuple[int, ...]:
    """Rising lengths to pad rows to, at most `count`, the last for the longest row. They are the
    multiples, or `most`, that leave the least padding where an update of `update_rows` random rows
    takes the shortest that holds them all."""
    longest = int(row_lengths.max())
    multiple *= -(-longest // (multiple * MOST_CANDIDATES))
    row_lengths = np.maximum(row_lengths, min(longest, SHORTEST))
    padded = np.minimum(-(-row_lengths // multiple) * multiple, most)
    candidates, counts = np.unique(padded, return_counts=True)
    # Share of the updates that each candidate holds; in whole numbers, the same on every host.
    updates = len(padded) ** update_rows
    held = np.array([(n**update_rows << 30) // updates for n in np.cumsum(counts).tolist()])
    # Least padding of the updates that candidate j holds, with j as the last of n lengths.
    cost, chosen = candidates * held, [(int(length),) for length in candidates]
    is_before = np.tri(len(candidates), k=-1, dtype=bool).T
    for _ in range(count - 1):
        with_one_more = cost[:, None] + candidates * (held - held[:, None])
        with_one_more[~is_before] = np.iinfo(np.int64).max
        best, least = with_one_more.argmin(axis=0), with_one_more.min(axis=0)
        chosen = [
            (*chosen[best[j]], int(candidates[j])) if least[j] < cost[j] else chosen[j]
            for j in range(len(candidates))
        ]
        cost = np.minimum(cost, least)
    return chosen[-1]


def plan_rows(lengths: np.ndarray, capacity: int, rule: str, chosen: np.ndarray) -> RowPlan:
    """Rows of at most `capacity` tokens out of the documents numbered in `chosen`; rows, and the
    documents in each, stand in the documents' order."""
    lengths = lengths[chosen]
    assert len(lengths) == 0 or 0 < lengths.min() <= lengths.max() <= capacity
    rows = FILL_RULES[rule](lengths, capacity)
    _, first, rows = np.unique(rows, return_index=True, return_inverse=True)
    rows = first[rows]  # called by their first document
    order = np.argsort(rows, kind="stable")
    _, offsets = np.unique(rows[order], return_index=True)
    offsets = np.append(offsets, len(order))
    return RowPlan(chosen[order], np.zeros(len(order), np.int64), lengths[order], offsets)
