"""Turns all records of a source into documents, in their order, with one process or several."""

import os
import pickle
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from jaxtrain.data.documents import DocumentWriter
from jaxtrain.data.encode import Encoded, Fault, Outcome
from jaxtrain.data.ledger import SourceCounts
from jaxtrain.data.records import Records, find_source_index
from jaxtrain.recipe.code import find_user_files, run_user_code
from jaxtrain.recipe.errors import DataError

BATCH_RECORDS = 128
THREADS = 2
MIN_POOL_RECORDS = 20_000
"""From this many records on, processes are worth the seconds that they take to start."""


class Encoder(Protocol):
    """Turns records of a source into documents; holds all that decides tokens and weights."""

    def read(self, record: Mapping[str, Any], /) -> Any:
        """Takes what it needs from a record; `DataError` names the field at fault."""
        ...

    def encode(self, items: Sequence[Any], /) -> list[Outcome]:
        """Returns one outcome per item that was read, independent of the others."""
        ...


class Tolerance:
    """How many faulty records may be skipped before a run stops."""

    def __init__(self, allowed: int = 0):
        self._allowed = allowed
        self._count = 0

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
) -> None:
    """Appends the documents of `records` and counts what became of each record.

    Raises `DataError` with the place of a faulty record that `tolerance` does not allow."""
    label = f"tokenising {counts.label}"
    with tqdm(total=len(records), desc=label, unit=" records", disable=None, leave=False) as bar:
        starts = range(0, len(records), BATCH_RECORDS)
        for start, outcomes in zip(starts, _encode_batches(records, encoder, workers), strict=True):
            for index, outcome in enumerate(outcomes, start):
                if isinstance(outcome, Fault):
                    place = "" if outcome.names_record else f"{records.where(index)}: "
                    tolerance.skip(message := place + outcome.message)
                    counts.add_fault(message)
                    continue
                counts.add(outcome)
                if isinstance(outcome, Encoded):
                    writer.append(
                        outcome.tokens, outcome.weights,
                        source=source, record=find_source_index(records, index),
                        rejected_start=outcome.rejected_start, scores=outcome.scores,
                    )  # fmt: skip
            bar.update(len(outcomes))


Items = list[Any | Fault]


def _read(records: Records, index: int, encoder: Encoder) -> Any | Fault:
    try:
        record = records[index]
    except DataError as fault:
        return Fault(str(fault), names_record=True)
    try:
        return encoder.read(record)
    except DataError as fault:
        return Fault(str(fault))


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


def _encode_batches(records: Records, encoder: Encoder, workers: int) -> Iterator[list[Outcome]]:
    """Yields the outcomes of one batch of records after the other, with several in flight."""
    if not workers:
        # The tokenizer releases Python's lock, so one batch renders while it tokenises another.
        pool, encode = ThreadPoolExecutor(THREADS), partial(_encode_items, encoder)
    else:
        # Forked children would inherit the threads' locks of jax and of the tokenizer.
        pickled = pickle.dumps(encoder)
        start = partial(_start_worker, pickled, find_user_files(pickled))
        pool, encode = ProcessPoolExecutor(workers, get_context("spawn"), start), _encode_in_worker
    waiting: deque[Future[list[Outcome]]] = deque()
    try:
        for first in range(0, len(records), BATCH_RECORDS):
            numbers = range(first, min(first + BATCH_RECORDS, len(records)))
            waiting.append(pool.submit(encode, [_read(records, n, encoder) for n in numbers]))
            if len(waiting) > 2 * (workers or THREADS):  # batches in flight are in memory
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
