"""Batches as a pure function of a position: nothing is remembered from batch to batch.

A position counts the sequences that were taken, over all epochs, so that it means the same whatever
a step works on.

M microbatches of a step, B sequences of a microbatch over all shards, T tokens of a sequence.
"""

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxtrain.batch import Batch
from jaxtrain.data.documents import Documents
from jaxtrain.data.ledger import Ledger, SetCounts
from jaxtrain.data.order import MIXTURE, hash_with_keys, permutation
from jaxtrain.data.packing import PackingPlan

EPOCH, FUSE = 2, 5  # keep these draws apart from other orders under the same seed
ENDLESS = sys.maxsize
"""Sequences of the one epoch of a stream."""


class BatchShape(NamedTuple):
    """What a step works on, over all processes."""

    microbatches: int
    sequences: int
    """Sequences of one microbatch over all shards."""
    process_sequences: np.ndarray | Sequence[int] | slice = slice(None)
    """Those of them that this process feeds, ascending; by default all."""
    length_multiple: int = 1
    """What the lengths of sequences must be multiples of, so that devices can share them."""

    @property
    def step_sequences(self) -> int:
        return self.microbatches * self.sequences

    def of_process(self, sequences: np.ndarray) -> np.ndarray:
        """Returns this process's part of the sequences of a step [M, B], where B is `sequences` or
        a multiple of it."""
        parts = sequences.reshape(self.microbatches, self.sequences, -1)
        return parts[:, self.process_sequences].reshape(self.microbatches, -1)


class Origin(NamedTuple):
    """Where a document of a sequence was read."""

    source: int
    record: int


class Draw(NamedTuple):
    """Samples [first, first + count) of a plan, of which each pass draws `taken`. A sample is a
    sequence, or the sequences of it that stay together."""

    first: int
    count: int
    taken: int


class TrainingBatches(Protocol):
    """What training asks of its data: of a `BatchPlan` or a stream."""

    @property
    def shape(self) -> BatchShape: ...
    @property
    def lengths(self) -> tuple[int, ...]: ...
    @property
    def epoch_sequences(self) -> int: ...
    @property
    def steps_per_epoch(self) -> int: ...
    @cached_property
    def digest(self) -> str: ...

    def steps_left(self, position: int) -> int: ...
    def advance(self, position: int, steps: int = 1) -> int: ...
    def count_uneven_steps(self, epochs: int) -> int: ...
    def state_dict(self, position: int) -> dict[str, Any]: ...
    def load_state_dict(self, saved: Mapping[str, Any]) -> None: ...
    def batches(self, position: int, steps: int | None, threads: int) -> Iterator[Batch]: ...
    def report(self) -> list[str]: ...


@lru_cache(maxsize=4)
def _draw_samples(count: int, draws: tuple[Draw, ...], seed: int, number: int) -> np.ndarray:
    """Returns the samples of a pass: all that no draw is of, and what each draws."""
    is_taken = np.ones(count, dtype=bool)
    for first, size, taken in draws:
        is_taken[first + permutation(size, MIXTURE, seed, first, number)[taken:]] = False
    return np.flatnonzero(is_taken)


@lru_cache(maxsize=4)  # the end of an epoch needs two; training and evaluation sets alternate
def _order_epoch(count: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(count, EPOCH, seed, epoch)


def choose_fused(count: int, share: float, seed: int) -> np.ndarray:
    """Chooses about `share` of the packed sequences to be one document each, bool [count]."""
    drawn = hash_with_keys(np.arange(count, dtype=np.uint64), FUSE, seed)
    return drawn / 2.0**64 < share


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The batch of every position. An epoch is complete: its last step is filled up with sequences
    that have no token."""

    documents: Documents
    packing: PackingPlan
    shape: BatchShape
    lengths: tuple[int, ...]
    """What T may be, rising: a step takes the shortest that holds its longest sequence. The step
    compiles at most so often."""
    seed: int | None
    """None takes the sequences in their order, in every epoch."""
    fused: np.ndarray | None = None
    """bool [sequences]: those whose documents share positions and attend to one another; None is
    no sequence."""
    passes: int = 1
    """Times that an epoch takes all sequences, in an order of its own each time."""
    first_only: bool = False
    """Every step has the sequences of the first."""
    together: int = 1
    """So many neighbouring sequences stay side by side in one microbatch, as those of a pair do."""
    draws: tuple[Draw, ...] = ()
    """Parts of weighted sources, of which each pass takes others."""
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Name → [sequences, ...]: what `Batch.extras` has of each sequence."""

    @property
    def pass_sequences(self) -> int:
        """Number of sequences of one pass."""
        left_out = sum(draw.count - draw.taken for draw in self.draws)
        return self.packing.num_sequences - left_out * self.together

    @property
    def epoch_sequences(self) -> int:
        return self.pass_sequences * self.passes

    @property
    def steps_per_epoch(self) -> int:
        return self.steps_left(0)

    def steps_left(self, position: int) -> int:
        """Returns the number of steps from a position to the end of its epoch."""
        left = self.epoch_sequences - position % self.epoch_sequences
        return -(-left // self.shape.step_sequences)

    def advance(self, position: int, steps: int = 1) -> int:
        """Returns the position so many steps after another."""
        if (steps_left := self.steps_left(position)) <= steps:
            epochs, steps = divmod(steps - steps_left, self.steps_per_epoch)
            position = (position // self.epoch_sequences + 1 + epochs) * self.epoch_sequences
        return position + steps * self.shape.step_sequences

    @cached_property
    def digest(self) -> str:
        """Of the content of every sequence, in the order of their numbers."""
        found = hashlib.sha256(self.documents.index["digest"][self.packing.documents].tobytes())
        for part in (self.packing.starts, self.packing.lengths, self.packing.offsets):
            found.update(np.ascontiguousarray(part, np.int64).tobytes())
        return found.hexdigest()[:16]

    def state_dict(self, position: int) -> dict[str, Any]:
        """Returns what a checkpoint keeps beside the position; JSON data."""
        return {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over what a checkpoint kept."""

    def report(self) -> list[str]:
        """Returns lines on what was read since the start of the run."""
        return []

    def count_uneven_steps(self, epochs: int) -> int:
        """Returns by how many steps so many epochs are longer than if each were like the first."""
        return 0

    def repeat(self, min_steps: int) -> "BatchPlan":
        """Returns the plan with as many passes per epoch as fill so many steps."""
        filled = max(min_steps - 1, 0) * self.shape.step_sequences
        return replace(self, passes=filled // self.pass_sequences + 1)

    def batch(self, position: int) -> Batch:
        """Returns this process's sequences of the step at a position: leaves
        [M, sequences of the process, T]."""
        sequences, length = self._find_step(position)
        return self.fill_batch(self.shape.of_process(sequences), length)

    def batches(self, position: int, steps: int | None, threads: int) -> Iterator[Batch]:
        """Yields the batches of so many steps from a position on, without end when it is None.
        `threads` make them ahead, 0 makes each when needed."""
        # grain imports jax, which reading and checking data does without.
        import grain

        numbers = grain.MapDataset.range(ENDLESS if steps is None else steps)
        found = numbers.map(lambda number: self.batch(self.advance(position, number)))
        # Batches are large and made much faster than they are used: two per thread are plenty.
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        return iter(found.to_iter_dataset(options))

    def sequence_numbers(self, position: int) -> np.ndarray:
        """Returns the sequences of the step at a position, int64 [M, B]; -1 is a filler."""
        return self._find_step(position)[0]

    def _find_step(self, position: int) -> tuple[np.ndarray, int]:
        """Returns the sequences of the step at a position, and T."""
        epoch, place = divmod(0 if self.first_only else position, self.epoch_sequences)
        places = place // self.together + np.arange(self.shape.step_sequences // self.together)
        sequences = self._find_sequences(epoch, places)
        sequences = sequences.reshape(self.shape.microbatches, self.shape.sequences)
        return sequences, int(self._choose_length(sequences.ravel()))

    def _find_sequences(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Returns the sequences at places of an epoch, int64 [places, together]; -1 after its
        end."""
        count = self.pass_sequences // self.together
        turns, found = np.divmod(places, count)
        if self.seed is not None:
            total = self.packing.num_sequences // self.together
            for turn in np.unique(turns[turns < self.passes]):
                number = epoch * self.passes + int(turn)
                order = _order_epoch(count, self.seed, number)
                if self.draws:
                    order = _draw_samples(total, self.draws, self.seed, number)[order]
                found[turns == turn] = order[found[turns == turn]]
        sequences = found[:, None] * self.together + np.arange(self.together)
        return np.where(turns[:, None] < self.passes, sequences, -1)

    def _choose_length(self, sequences: np.ndarray) -> np.ndarray:
        """Returns T of steps that take the sequences [..., sequences of a step], int64 [...]."""
        longest = np.where(sequences >= 0, self._sequence_lengths[sequences], 0).max(axis=-1)
        return np.asarray(self.lengths)[np.searchsorted(self.lengths, longest)]

    @cached_property
    def _sequence_lengths(self) -> np.ndarray:
        return self.packing.sequence_lengths

    def fill_batch(self, sequences: np.ndarray, length: int) -> Batch:
        """Returns the sequences as a batch of the same leading dimensions, and T of `length`."""
        shape = (*sequences.shape, length)
        tokens, positions, segments = (np.zeros(shape, dtype=np.int32) for _ in range(3))
        loss_weights = np.zeros(shape, dtype=np.float32)
        for place in np.ndindex(sequences.shape):
            if sequences[place] >= 0:
                leaves = (tokens, positions, segments, loss_weights)
                self._fill_sequence(int(sequences[place]), *(leaf[place] for leaf in leaves))
        extras = {name: values[sequences] for name, values in self.extras.items()}
        for values in extras.values():
            values[sequences < 0] = 0
        return Batch(tokens, positions, segments, loss_weights, sequences.astype(np.int32), extras)

    def _fill_sequence(
        self,
        sequence: int,
        tokens: np.ndarray,
        positions: np.ndarray,
        segments: np.ndarray,
        loss_weights: np.ndarray,
    ) -> None:
        end = 0
        for segment, piece in enumerate(self.pieces(sequence), start=1):
            length = int(self.packing.lengths[piece])
            source = self._find_token(piece)
            start, end = end, end + length
            tokens[start:end] = self.documents.tokens[source : source + length]
            positions[start:end] = np.arange(length)
            segments[start:end] = segment
            loss_weights[start:end] = self.documents.weights[source : source + length]
            loss_weights[start] = 0  # what stands before it is another document
        if self.fused is not None and self.fused[sequence]:
            positions[:end] = np.arange(end)
            segments[:end] = 1

    def _find_token(self, piece: int) -> int:
        """Returns the place of a piece's first token among those of all documents."""
        document = self.packing.documents[piece]
        return int(self.documents.offsets[document] + self.packing.starts[piece])

    def pieces(self, sequence: int) -> range:
        """Returns the numbers of the pieces in `packing` that make up a sequence."""
        return range(int(self.packing.offsets[sequence]), int(self.packing.offsets[sequence + 1]))

    def origins(self, sequence: int) -> list[Origin]:
        """Returns the source and the record of every document of a sequence, in their order."""
        entries = self.documents.index[self.packing.documents[self.pieces(sequence)]]
        return [Origin(int(entry["source"]), int(entry["record"])) for entry in entries]

    @cached_property
    def _first_pieces(self) -> np.ndarray:
        """bool [pieces]: those of the first pass."""
        places = np.arange(self.pass_sequences // self.together)
        is_taken = np.zeros(self.packing.num_sequences, dtype=bool)
        is_taken[self._find_sequences(0, places)] = True
        return np.repeat(is_taken, np.diff(self.packing.offsets))

    @property
    def trained_tokens(self) -> int:
        """Of the first pass; a document's own count holds where it is whole in a sequence."""
        documents, _, lengths, _ = self.packing
        is_whole = lengths == self.documents.lengths[documents]
        whole = documents[is_whole & self._first_pieces]
        total = int(self.documents.index["trained"][whole].sum())
        for piece in np.flatnonzero(~is_whole & self._first_pieces).tolist():
            begin = self._find_token(piece)
            part = self.documents.weights[begin + 1 : begin + int(lengths[piece])]
            total += int(np.count_nonzero(part))
        return total

    @property
    def fill(self) -> float:
        """Fraction of the places of the sequences that hold a token, in the first pass."""
        size = self.shape.step_sequences
        steps = -(-self.pass_sequences // size)
        sequences = self._find_sequences(0, np.arange(steps * size // self.together))
        sequences = sequences.reshape(steps, size)
        is_sequence = sequences >= 0
        tokens = self._sequence_lengths[sequences[is_sequence]].sum()
        places = self._choose_length(sequences) * is_sequence.sum(axis=-1)
        return float(tokens / places.sum())

    def count(self, label: str) -> SetCounts:
        return SetCounts(
            label=label,
            documents=len(np.unique(self.packing.documents[self._first_pieces])),
            tokens=int(self.packing.lengths[self._first_pieces].sum()),
            trained_tokens=self.trained_tokens,
            sequences=self.pass_sequences,
            lengths=self.lengths,
            fill=self.fill,
            steps=self.steps_per_epoch,
        )


@dataclass(frozen=True, eq=False)
class TrainingData:
    """All batches of a run, for training and for each evaluation set."""

    train: TrainingBatches
    evals: Mapping[str, BatchPlan]
    """Name of the set → its batches; the one set of a plain list is `eval`."""
    ledger: Ledger
    threads: int

    @property
    def sequence_tokens(self) -> int:
        """T of the longest batches."""
        return self.train.lengths[-1]

    @property
    def steps_per_epoch(self) -> int:
        return self.train.steps_per_epoch

    @property
    def train_rows(self) -> int:
        """Sequences of an epoch."""
        return self.train.epoch_sequences

    @property
    def eval_rows(self) -> int:
        """Sequences of all evaluation sets."""
        return sum(plan.packing.num_sequences for plan in self.evals.values())

    def train_batches(self, position: int = 0, steps: int | None = None) -> Iterator[Batch]:
        """Yields this process's batches of so many steps from a position on, without end when it is
        None."""
        return self.train.batches(position, steps, self.threads)

    def eval_batches(self, name: str = "eval") -> Iterator[Batch]:
        """Yields every sequence of a set once, in order."""
        return self.batches_of(self.evals[name])

    def batches_of(self, plan: BatchPlan) -> Iterator[Batch]:
        """Yields every sequence of an evaluation set, planned in this way, once, in order."""
        return plan.batches(0, plan.steps_per_epoch, self.threads)
