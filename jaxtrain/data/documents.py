"""Documents: the records of a source through its encoder, in one process or several, into flat
arrays on disk, which are mapped into memory without a Python object each."""

import hashlib
import os
import pickle
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jaxtrain.data.encode import Encoded, Encoder, Fault, Outcome, catch_fault
from jaxtrain.data.ledger import SourceCounts
from jaxtrain.data.records import ReadColumns, Records, find_source_index
from jaxtrain.recipe.code import find_user_files, run_user_code
from jaxtrain.recipe.errors import DataError
from jaxtrain.signals import spare_children

BATCH_RECORDS = 128
THREADS = 2
MIN_POOL_RECORDS = 20_000
"""From this many records on, processes are worth the seconds that they take to start."""

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
MAX_EQUAL_SHARE = 0.01
FILES = ("tokens.bin", "weights.bin", "index.bin")


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
            (folder / name).write_bytes(part.view(np.uint8).data)  # tofile hides what is wrong

    def warnings(self, bos: int | None) -> Iterator[str]:
        """Yields what usually goes wrong with documents to train on."""
        digests = self.index["digest"]
        equal = len(digests) - len(np.unique(digests))
        if equal > MAX_EQUAL_SHARE * len(digests):
            yield f"{equal} of {len(digests)} training documents are copies of another"
        firsts = self.offsets[:-1][self.lengths > 1]
        if bos is None or not len(firsts):
            return
        twice = (self.tokens[firsts] == bos) & (self.tokens[firsts + 1] == bos)
        if twice.any():
            yield (
                f"{np.count_nonzero(twice)} training documents begin with BOS twice; the chat "
                f"template or the data add one too many"
            )


class DocumentWriter(ExitStack):
    """Appends documents to the files of a folder, and closes the files on exit."""

    def __init__(self, folder: Path):
        super().__init__()
        files = ((folder / name).open("wb", buffering=1 << 20) for name in FILES)
        self._files = [self.enter_context(file) for file in files]
        self._end = 0

    def append(self, document: Encoded, *, source: int, record: int) -> None:
        tokens = np.ascontiguousarray(document.tokens, dtype=np.int32)
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
        self._end += len(tokens)
        trained = int(np.count_nonzero(document.weights))
        middle = len(tokens) if document.rejected_start is None else document.rejected_start
        digest = int.from_bytes(digest, "little")
        entry = (self._end, source, record, trained, digest, middle, document.scores)
        parts = (tokens, document.weights.astype(np.uint8), np.array([entry], dtype=INDEX_DTYPE))
        for file, part in zip(self._files, parts, strict=True):
            file.write(part.tobytes())


def _map_array(path: Path, dtype: np.dtype | type) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


class Tolerance:
    """How many faulty records may be skipped before a run stops."""

    def __init__(self, allowed: int = 0, count: int = 0):
        """So many of them were skipped already."""
        self._allowed = allowed
        self._count = count

    def skip(self, message: str) -> None:
        """Counts a fault; `DataError` for one more than is allowed."""
        self._count += 1
        if self._count <= self._allowed:
            return
        so_far = f"; data.max_rows_with_errors allows {self._allowed}" if self._allowed else ""
        raise DataError(message + so_far)


def choose_num_workers(num_records: int, num_proc: int) -> int:
    """Returns the number of worker processes; 0 is this process, whose tokenizer has threads."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    workers = min(num_proc, cores)
    return workers if workers > 1 and num_records >= MIN_POOL_RECORDS else 0


def tokenise(
    records: Records,
    encoder: Encoder,
    writer: DocumentWriter,
    counts: SourceCounts,
    *,
    source: int,
    tolerance: Tolerance,
    workers: int = 0,
    shows_progress: bool = True,
) -> None:
    """Appends the documents of `records` and counts what became of each record.

    Raises `DataError` with the place of a faulty record that `tolerance` does not allow."""
    label, hides = f"tokenising {counts.label}", None if shows_progress else True
    starts = range(0, len(records), BATCH_RECORDS)
    with (
        tqdm(total=len(records), desc=label, unit=" records", disable=hides, leave=False) as bar,
        # Left to a traceback, it would join its threads wherever the garbage collector runs.
        closing(_encode_batches(records, encoder, workers, counts)) as batches,
    ):
        for start, outcomes in zip(starts, batches, strict=True):
            for index, outcome in enumerate(outcomes, start):
                if isinstance(outcome, Fault):
                    place = "" if outcome.names_record else f"{records.where(index)}: "
                    tolerance.skip(message := place + outcome.message)
                    counts.add_fault(message)
                    continue
                counts.add(outcome)
                if isinstance(outcome, Encoded):
                    writer.append(outcome, source=source, record=find_source_index(records, index))
            bar.update(len(outcomes))


Items = list[Any | Fault]


def _read(records: Records, index: int, encoder: Encoder, counts: SourceCounts) -> Any | Fault:
    record = catch_fault(records.__getitem__, index)
    if isinstance(record, Fault):
        return record._replace(names_record=True)
    record = ReadColumns(record)
    item = catch_fault(encoder.read, record)
    if not isinstance(item, Fault) and item is not record:
        counts.unread.update(record.find_unread())
    return item


def _encode_items(encoder: Encoder, items: Items) -> list[Outcome]:
    """Encodes what was read; faults of reading stay in their places."""
    sound = [item for item in items if not isinstance(item, Fault)]
    encoded = iter(encoder.encode(sound) if sound else ())
    return [item if isinstance(item, Fault) else next(encoded) for item in items]


_encoder: Encoder  # of a worker process, set once when it starts


def _start_worker(pickled: bytes, user_files: Sequence[Path]) -> None:
    global _encoder
    for file in user_files:  # a new process cannot import them by name
        run_user_code(file)
    _encoder = pickle.loads(pickled)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is parallel enough


def _encode_in_worker(items: Items) -> list[Outcome]:
    return _encode_items(_encoder, items)


def _encode_batches(
    records: Records, encoder: Encoder, workers: int, counts: SourceCounts
) -> Generator[list[Outcome], None, None]:
    """Yields the outcomes of one batch of records after the other, with several in flight; counts
    the columns that are not read."""
    if not workers:
        # The tokenizer releases Python's lock, so one batch renders while it tokenises another.
        pool, encode = ThreadPoolExecutor(THREADS), partial(_encode_items, encoder)
    else:
        # Forked children would inherit the threads' locks of jax and of the tokenizer.
        pickled = pickle.dumps(encoder)
        start = partial(_start_worker, pickled, find_user_files(pickled))
        with spare_children():  # one tracks semaphores
            pool = ProcessPoolExecutor(workers, get_context("spawn"), start)
        encode = _encode_in_worker
    waiting: deque[Future[list[Outcome]]] = deque()
    try:
        for first in range(0, len(records), BATCH_RECORDS):
            numbers = range(first, min(first + BATCH_RECORDS, len(records)))
            items = [_read(records, n, encoder, counts) for n in numbers]
            with spare_children():  # the first call starts the workers
                waiting.append(pool.submit(encode, items))
            if len(waiting) > 2 * (workers or THREADS):  # batches in flight are in memory
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
