"""Records as they come (`data.streaming`): blocks of them are read, encoded, packed and shuffled
when training gets there, and nothing else is kept.

A block depends on nothing but its number and the places in the sources where it begins. So a
position and the start of its block are the whole state of a stream, and what comes after a resume
is bit for bit what would have come without it.
"""

import hashlib
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from copy import deepcopy
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtrain.assets import cache_folder
from jaxtrain.batch import Batch
from jaxtrain.data.documents import Documents, DocumentWriter, Tolerance, tokenise
from jaxtrain.data.encode import Encoder
from jaxtrain.data.ledger import FAULTY, SourceCounts, compute_percentiles, describe_drops
from jaxtrain.data.order import apportion, permutation
from jaxtrain.data.plan import ENDLESS, BatchPlan, BatchShape
from jaxtrain.data.records import Records, SelectedRecords
from jaxtrain.data.source import DataSource, LoadedSource
from jaxtrain.recipe.errors import DataError, pluralize

STREAM = 7  # keeps this draw apart from other orders under the same seed
ORDERED_RECORDS = 1_000
"""Records of a block that is not shuffled."""
OTHER_RECORDS = (
    "the stream has other records now where the checkpoint was saved; `reset: [data]` in the "
    "checkpoint entry begins with its first record"
)


class Place(NamedTuple):
    """Where a source is read next."""

    passes: int = 0
    """Times that it was read to its end."""
    part: Any = None
    """What `DataSource.parts` begins with."""
    record: int = 0
    """Number of the record in that part."""


class Start(NamedTuple):
    """Where a block begins, as JSON data."""

    position: int
    """Sequences before it."""
    block: int
    current: int
    """Number of the source that is read, where none has a weight."""
    places: Sequence[Place]
    counts: Sequence[dict[str, Any]]
    """`SourceCounts` of what was read before it."""
    digest: str | None = None
    """Of its documents, once they were read."""


class Block(NamedTuple):
    start: Start
    plan: BatchPlan
    sequences: np.ndarray
    """int64 [sequences]: those of the plan, in the order of training"""
    after: Start

    def find(self, positions: np.ndarray) -> np.ndarray:
        """Returns the sequences of the plan at those of the positions that are in this block."""
        places = positions - self.start.position
        return self.sequences[places[(places >= 0) & (places < len(self.sequences))]]


class Reading:
    """Reads one source from a place on."""

    def __init__(self, source: DataSource, place: Place):
        self.source = source
        self._open(place)

    def _open(self, place: Place) -> None:
        self.place = place
        self._parts = self.source.parts("train", place.part)
        self._records: Records | None = None

    def rewind(self) -> None:
        self._open(Place(self.place.passes + 1))

    def take(self, count: int) -> Iterator[Records]:
        """Yields the next `count` records, those of each part together; fewer at the end."""
        while count and (records := self._find_part()) is not None:
            first = self.place.record
            stop = min(first + count, len(records))
            self.place = self.place._replace(record=stop)
            yield SelectedRecords(records, range(first, stop))
            count -= stop - first

    def _find_part(self) -> Records | None:
        """Returns the part that has the next record; None at the end of the source."""
        while self._records is None or self.place.record >= len(self._records):
            if (found := next(self._parts, None)) is None:
                return None
            record = self.place.record if self._records is None else 0
            part, self._records = found
            self.place = self.place._replace(part=part, record=record)
        return self._records


class Readings:
    """Reads all sources of a stream: so much of each by its weight, or without weights one after
    the other. They begin again when they end."""

    def __init__(self, sources: Sequence[DataSource], start: Start):
        pairs = zip(sources, start.places, strict=True)
        self._readings = [Reading(source, Place(*place)) for source, place in pairs]
        self._weights = [source.config.weight or 0.0 for source in sources]
        self.are_mixed = any(self._weights)
        self.current = start.current
        self.counts = [SourceCounts(**deepcopy(count)) for count in start.counts]

    @property
    def places(self) -> list[Place]:
        return [reading.place for reading in self._readings]

    def take(self, count: int) -> Iterator[tuple[int, Records]]:
        """Yields the next `count` records, with the numbers of their sources; fewer where all
        sources end. Those before have to be counted when the next are asked for."""
        if self.are_mixed:
            documents = [one.documents for one in self.counts]
            shares = np.array(self._weights) / sum(self._weights)
            wanted = shares * (sum(documents) + count) - documents
            for number, part in enumerate(apportion(count, np.maximum(wanted, 0).tolist())):
                while part:
                    for records in self._readings[number].take(part):
                        yield number, records
                        part -= len(records)
                    if part:
                        self._rewind(number)
            return
        if self.current == len(self._readings):
            self._rewind(*range(self.current))
            self.current = 0
        while count and self.current < len(self._readings):
            for records in self._readings[self.current].take(count):
                yield self.current, records
                count -= len(records)
            if count:
                self.current += 1

    def _rewind(self, *numbers: int) -> None:
        """Begins with these sources again; DataError if no document came of them."""
        counts = [self.counts[number] for number in numbers]
        if not any(count.documents for count in counts):
            raise DataError(f"no record is left: {describe_drops(counts)}")
        for number in numbers:
            self._readings[number].rewind()


class Stream:
    """The sequences of sources without end. Answers what training asks of a `BatchPlan`: all of
    it is one epoch."""

    epoch_sequences = ENDLESS

    def __init__(
        self,
        sources: Sequence[DataSource],
        make_encoder: Callable[[LoadedSource], Encoder],
        make_plan: Callable[[Documents, np.ndarray], BatchPlan],
        *,
        shape: BatchShape,
        lengths: tuple[int, ...],
        window: int,
        seed: int,
        tolerated: int = 0,
    ):
        """`make_plan` packs the documents of these numbers. A block has `window` records and is
        shuffled; with 1 their order is kept. So many faulty ones are `tolerated`."""
        self.sources, self.shape, self.lengths = sources, shape, lengths
        self.window, self._seed, self._tolerated = window, seed, tolerated
        self._make_encoder, self._make_plan = make_encoder, make_plan
        self._encoders: dict[int, Encoder] = {}
        counts = [vars(SourceCounts(source.label)) for source in sources]
        self._starts = {0: Start(0, 0, 0, [Place()] * len(sources), counts)}
        self.first_block = self._newest = next(self._read(self._starts[0]))

    @cached_property
    def digest(self) -> str:
        return "stream"  # each block has its own

    # Positions.

    @property
    def steps_per_epoch(self) -> int:
        return self.steps_left(0)

    def steps_left(self, position: int) -> int:
        return (ENDLESS - position) // self.shape.step_sequences

    def advance(self, position: int, steps: int = 1) -> int:
        return position + steps * self.shape.step_sequences

    def count_uneven_steps(self, epochs: int) -> int:
        return 0

    def state_dict(self, position: int) -> dict[str, Any]:
        """Returns what a checkpoint keeps beside the position; JSON data."""
        start = self._find_start(position)
        # The first one is kept for those who look at the data again.
        kept = {p: one for p, one in tuple(self._starts.items()) if p >= start.position or not p}
        self._starts = kept
        return {"stream": start._asdict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        if "stream" in saved:
            start = Start(**saved["stream"])
            if len(start.places) != len(self.sources):
                raise DataError(OTHER_RECORDS)
            self._starts[start.position] = start

    def _find_start(self, position: int) -> Start:
        """Returns the start of the block that has a position, or of one before it."""
        return self._starts[max(p for p in tuple(self._starts) if p <= position)]

    # Batches.

    def batches(self, position: int, steps: int | None, threads: int) -> Iterator[Batch]:
        """Yields this process's batches of so many steps from a position on, without end when it
        is None. The next block is read meanwhile, unless `threads` is 0."""
        held: list[Block] = []
        start, first = self._find_start(position), self.first_block
        blocks = self._read(start)
        if start.position == 0 and start.digest == first.start.digest:
            blocks = chain([first], self._read(first.after))
        with closing(_read_ahead(blocks, threads)) as coming:
            for _ in range(ENDLESS if steps is None else steps):
                stop = self.advance(position)
                while not held or held[-1].after.position < stop:
                    block = self._newest = next(coming)
                    held = [one for one in (*held, block) if one.after.position > position]
                yield self._join(held, position)
                position = stop
                held = [one for one in held if one.after.position > position]

    def _join(self, blocks: Sequence[Block], position: int) -> Batch:
        """Returns the batch at a position, whose sequences may be those of several blocks."""
        step = np.arange(position, self.advance(position))
        tokens = [block.plan.packing.sequence_lengths[block.find(step)] for block in blocks]
        length = self.lengths[int(np.searchsorted(self.lengths, np.concatenate(tokens).max()))]
        own = self.shape.of_process(step.reshape(self.shape.microbatches, -1))
        parts = [block.plan.fill_batch(block.find(own.ravel()), length) for block in blocks]

        def join(*leaves: np.ndarray) -> np.ndarray:
            whole = np.concatenate(leaves)
            return whole.reshape(*own.shape, *whole.shape[1:])

        arrays = [join(*leaves) for leaves in zip(*(part[:4] for part in parts), strict=True)]
        extras = {name: join(*(part.extras[name] for part in parts)) for name in parts[0].extras}
        return Batch(*arrays, rows=own.astype(np.int32), extras=extras)

    # Blocks.

    def _read(self, start: Start) -> Iterator[Block]:
        """Yields one block after the other; DataError where the first is not what it was."""
        readings = Readings(self.sources, start)
        while True:
            documents = self._encode(readings)
            digest = hashlib.sha256(documents.index["digest"].tobytes()).hexdigest()[:16]
            if start.digest not in (None, digest):
                raise DataError(OTHER_RECORDS)
            sequences = np.zeros(0, np.int64)
            if len(documents.index):
                chosen = np.arange(len(documents.index))
                if readings.are_mixed:
                    chosen = _interleave(documents.index["source"])
                plan = self._make_plan(documents, chosen)
                sequences = self._order(plan, start.block)
            after = Start(
                start.position + len(sequences), start.block + 1, readings.current,
                readings.places, deepcopy([vars(count) for count in readings.counts]),
            )  # fmt: skip
            if len(sequences):
                start = self._starts[start.position] = start._replace(digest=digest)
                yield Block(start, plan, sequences, after)
            start = after

    def _encode(self, readings: Readings) -> Documents:
        """Returns the documents of the next block, and counts what became of its records."""
        skipped = sum(count.dropped[FAULTY] for count in readings.counts)
        tolerance = Tolerance(self._tolerated, skipped)
        records_of_block = self.window if self.window > 1 else ORDERED_RECORDS
        parent = cache_folder() / "data"
        parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".new-") as folder:
            with DocumentWriter(Path(folder)) as writer:
                for number, records in readings.take(records_of_block):
                    if number not in self._encoders:
                        loaded = LoadedSource(self.sources[number], records)
                        self._encoders[number] = self._make_encoder(loaded)
                    tokenise(
                        records, self._encoders[number], writer, readings.counts[number],
                        source=number, tolerance=tolerance, shows_progress=False,
                    )  # fmt: skip
            documents = Documents.open(Path(folder))
        for number, count in enumerate(readings.counts):
            lengths = documents.sequence_lengths[documents.index["source"] == number]
            count.lengths = compute_percentiles(lengths) or count.lengths
        return documents

    def _order(self, plan: BatchPlan, block: int) -> np.ndarray:
        """Returns the sequences of a block in the order of training."""
        samples = np.arange(plan.packing.num_sequences // plan.together)
        if self.window > 1:
            samples = permutation(len(samples), STREAM, self._seed, block)
        return (samples[:, None] * plan.together + np.arange(plan.together)).ravel()

    # What was read.

    @property
    def counts(self) -> tuple[SourceCounts, ...]:
        """Of what was read up to the newest block."""
        return tuple(SourceCounts(**count) for count in self._newest.after.counts)

    def describe(self) -> list[str]:
        """Returns lines on how far it was read, and how."""
        how = f"blocks of {self.window:,} records are read, packed and shuffled"
        if self.window == 1:
            how = f"blocks of {ORDERED_RECORDS:,} records are read and packed in their order"
        after = self._newest.after
        lines = [f"stream: {how}; the counts are those of {pluralize(after.block, 'block')}"]
        for source, place in zip(self.sources, after.places, strict=True):
            if times := place.passes:
                lines.append(f"stream: {source.label} was read {pluralize(times, 'time')}")
        return lines

    def report(self) -> list[str]:
        if self._newest is self.first_block:
            return []
        counted = [line for count in self.counts for line in count.lines()]
        warnings = [f"warning: {text}" for count in self.counts for text in count.warnings()]
        return [*counted, *self.describe(), *warnings]


def _interleave(sources: np.ndarray) -> np.ndarray:
    """Returns the numbers of documents so that those of each source are spread evenly."""
    place = np.zeros(len(sources))
    for source in np.unique(sources):
        own = sources == source
        place[own] = (np.arange(own.sum()) + 0.5) / own.sum()
    return np.argsort(place, kind="stable")


def _read_ahead(blocks: Iterator[Block], threads: int) -> Generator[Block]:
    """Yields the same blocks; the next is read while one is used, unless `threads` is 0."""
    if not threads:
        yield from blocks
        return
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, blocks)
        while True:
            block = coming.result()
            coming = pool.submit(next, blocks)
            yield block
