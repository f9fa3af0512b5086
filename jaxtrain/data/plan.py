"""Batches as a pure function of the update's number: nothing is remembered from batch to batch.

M microbatches of an update, B rows of a microbatch over all shards, T tokens of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from jaxtrain.batch import Batch
from jaxtrain.data.documents import Documents
from jaxtrain.data.order import hash_with_keys, permutation
from jaxtrain.data.packing import PackingPlan

EPOCH = 2  # keeps the order of an epoch apart from other orders under the same seed
FUSE = 5


class BatchShape(NamedTuple):
    """What an update works on, over all processes."""

    microbatches: int
    rows: int
    """Rows of one microbatch over all shards."""
    process_rows: np.ndarray | Sequence[int] | None = None
    """Those of them that this process feeds, ascending; None is all."""

    @property
    def update_rows(self) -> int:
        return self.microbatches * self.rows


class Origin(NamedTuple):
    """Where a document of a row was read."""

    source: int
    row: int


@lru_cache(maxsize=4)  # an epoch's border needs two; training and evaluation sets alternate
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(count, EPOCH, seed, epoch)


def choose_fused(count: int, share: float, seed: int) -> np.ndarray:
    """bool [count]: which rows are one sequence, about `share` of them."""
    drawn = hash_with_keys(np.arange(count, dtype=np.uint64), FUSE, seed)
    return drawn / 2.0**64 < share


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The batches of every update. An epoch is complete: its last update is filled up with rows
    that have no token."""

    documents: Documents
    rows: PackingPlan
    shape: BatchShape
    lengths: tuple[int, ...]
    """What T may be, rising: an update takes the shortest that holds its longest row. The step
    compiles at most so often."""
    seed: int | None
    """None takes the rows in their order, in every epoch."""
    fused: np.ndarray | None = None
    """bool [rows]: rows whose documents share positions and attend to one another; None is no
    row."""
    passes: int = 1
    """Times that an epoch takes all rows, in an order of its own each time."""
    first_only: bool = False
    """Every update has the rows of the first."""
    together: int = 1
    """So many neighbouring rows stay side by side in one microbatch, as those of a pair do."""
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Name → [rows, ...]: what `Batch.extras` has of each row."""

    @property
    def row_tokens(self) -> int:
        """T of the longest batches."""
        return self.lengths[-1]

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows.num_sequences * self.passes // self.shape.update_rows)

    def repeated(self, min_updates: int) -> "BatchPlan":
        """With as many passes an epoch as fill so many updates."""
        filled = max(min_updates - 1, 0) * self.shape.update_rows
        return replace(self, passes=filled // self.rows.num_sequences + 1)

    @property
    def trained_tokens(self) -> int:
        """Of all rows; a document's own count holds where it stands whole in a row."""
        documents, starts, lengths, _ = self.rows
        is_whole = lengths == self.documents.lengths[documents]
        total = int(self.documents.index["trained"][documents[is_whole]].sum())
        for piece in np.flatnonzero(~is_whole):
            begin = int(self.documents.offsets[documents[piece]] + starts[piece])
            part = self.documents.weights[begin + 1 : begin + int(lengths[piece])]
            total += int(np.count_nonzero(part))
        return total

    def row_numbers(self, step: int) -> np.ndarray:
        """int64 [M, B]: the rows of update `step`, counted from 0; -1 is a filler row."""
        epoch, place = divmod(0 if self.first_only else step, self.steps_per_epoch)
        size = self.shape.update_rows // self.together
        return self._rows_at(epoch, np.arange(place * size, (place + 1) * size)).reshape(
            self.shape.microbatches, self.shape.rows
        )

    def _rows_at(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """int64 [places, together]: the rows at places of an epoch; -1 behind its end."""
        count = self.rows.num_sequences // self.together
        turns, found = np.divmod(places, count)
        if self.seed is not None:
            for turn in np.unique(turns[turns < self.passes]):
                order = _epoch_order(count, self.seed, epoch * self.passes + int(turn))
                found[turns == turn] = order[found[turns == turn]]
        rows = found[:, None] * self.together + np.arange(self.together)
        return np.where(turns[:, None] < self.passes, rows, -1)

    def tokens_of(self, rows: np.ndarray) -> np.ndarray:
        """int64 [...]: T of updates that take the rows [..., rows of an update]."""
        longest = np.where(rows >= 0, self._row_lengths[rows], 0).max(axis=-1)
        return np.asarray(self.lengths)[np.searchsorted(self.lengths, longest)]

    @cached_property
    def _row_lengths(self) -> np.ndarray:
        return self.rows.sequence_lengths

    @property
    def fill(self) -> float:
        """Of the places of the rows, those that hold a token, in the first pass over all rows."""
        steps, size = -(-self.rows.num_sequences // self.shape.update_rows), self.shape.update_rows
        places = np.arange(steps * size // self.together)
        rows = self._rows_at(0, places).reshape(steps, size)
        is_row = rows >= 0
        tokens = self._row_lengths[rows[is_row]].sum()
        return float(tokens / (self.tokens_of(rows) * is_row.sum(axis=-1)).sum())

    def batch(self, step: int) -> Batch:
        """This process's rows of a step: leaves [M, process rows, T], from number `step` alone."""
        numbers, own = self.row_numbers(step), self.shape.process_rows
        row_tokens = int(self.tokens_of(numbers.ravel()))
        return self.filled(numbers if own is None else numbers[:, own], row_tokens)

    def filled(self, rows: np.ndarray, row_tokens: int) -> Batch:
        """The given rows as a batch of the same leading dimensions, and T of `row_tokens`."""
        shape = (*rows.shape, row_tokens)
        tokens, positions, segments = (np.zeros(shape, dtype=np.int32) for _ in range(3))
        loss_weights = np.zeros(shape, dtype=np.float32)
        for place in np.ndindex(rows.shape):
            if rows[place] >= 0:
                leaves = (tokens, positions, segments, loss_weights)
                self._fill_row(int(rows[place]), *(leaf[place] for leaf in leaves))
        extras = {name: self._of_rows(values, rows) for name, values in self.extras.items()}
        return Batch(tokens, positions, segments, loss_weights, rows.astype(np.int32), extras)

    def _of_rows(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        is_row = (rows >= 0).reshape(*rows.shape, *[1] * (values.ndim - 1))
        return np.where(is_row, values[rows], np.zeros((), values.dtype))

    def _fill_row(self, row: int, *leaves: np.ndarray) -> None:
        tokens, positions, segments, loss_weights = leaves
        end = 0
        for segment, piece in enumerate(self.pieces(row), start=1):
            length = int(self.rows.lengths[piece])
            source = int(self.documents.offsets[self.rows.documents[piece]])
            source += int(self.rows.starts[piece])
            start, end = end, end + length
            tokens[start:end] = self.documents.tokens[source : source + length]
            positions[start:end] = np.arange(length)
            segments[start:end] = segment
            loss_weights[start:end] = self.documents.weights[source : source + length]
            loss_weights[start] = 0  # what stands before it is another document
        if self.fused is not None and self.fused[row]:
            positions[:end] = np.arange(end)
            segments[:end] = 1

    def pieces(self, row: int) -> range:
        """Numbers of the pieces of `rows` that stand in it."""
        return range(int(self.rows.offsets[row]), int(self.rows.offsets[row + 1]))

    def origins(self, row: int) -> list[Origin]:
        """Source and row of every document of a packed row, in their order."""
        entries = self.documents.index[self.rows.documents[self.pieces(row)]]
        return [Origin(int(entry["source"]), int(entry["record"])) for entry in entries]
