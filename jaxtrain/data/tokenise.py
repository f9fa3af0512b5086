"""All rows of a source to documents, in the order of the rows, by one process or by several."""

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
from jaxtrain.data.rows import Rows, number_in_source
from jaxtrain.recipe.code import find_user_files, run_user_code
from jaxtrain.recipe.errors import DataError

BATCH_ROWS = 128
THREADS = 2
POOL_ROWS = 20_000
"""From this many rows on, processes pay for their start of some seconds."""


class Encoder(Protocol):
    """Rows of one source to documents; holds all that decides their tokens and weights."""

    def read(self, row: Mapping[str, Any], /) -> Any:
        """What is taken from a row; `DataError` names the field at fault."""
        ...

    def encode(self, items: Sequence[Any], /) -> list[Outcome]:
        """One outcome for each thing that was read; no outcome depends on the others."""
        ...


class Tolerance:
    """How many faulty rows may be skipped before a run stops."""

    def __init__(self, allowed: int = 0):
        self._allowed = allowed
        self._count = 0

    def skip(self, what: str) -> None:
        """`DataError` for the first row that is one too many."""
        self._count += 1
        if self._count <= self._allowed:
            return
        so_far = f"; data.max_rows_with_errors allows {self._allowed}" if self._allowed else ""
        raise DataError(what + so_far)


def workers_for(num_rows: int, num_proc: int) -> int:
    """Processes worth having; 0 stays in this one, where the tokenizer has threads of its own."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    workers = min(num_proc, cores)
    return workers if workers > 1 and num_rows >= POOL_ROWS else 0


def tokenise(
    rows: Rows,
    encoder: Encoder,
    writer: DocumentWriter,
    counts: SourceCounts,
    *,
    source: int,
    tolerance: Tolerance,
    workers: int = 0,
) -> None:
    """Appends the documents of `rows`, and counts what became of each row.

    Raises `DataError` with the place of a row that cannot be read and is not tolerated."""
    label = f"tokenising {counts.label}"
    with tqdm(total=len(rows), desc=label, unit=" rows", disable=None, leave=False) as bar:
        starts = range(0, len(rows), BATCH_ROWS)
        for start, outcomes in zip(starts, _results(rows, encoder, workers), strict=True):
            for row, outcome in enumerate(outcomes, start):
                if isinstance(outcome, Fault):
                    place = "" if outcome.has_place else f"{rows.where(row)}: "
                    tolerance.skip(what := place + outcome.what)
                    counts.add_fault(what)
                    continue
                counts.add(outcome)
                if isinstance(outcome, Encoded):
                    writer.append(
                        outcome.tokens, outcome.weights,
                        source=source, row=number_in_source(rows, row),
                        border=outcome.border, scores=outcome.scores,
                    )  # fmt: skip
            bar.update(len(outcomes))


Items = list[Any | Fault]


def _item(rows: Rows, index: int, encoder: Encoder) -> Any | Fault:
    try:
        row = rows[index]
    except DataError as fault:
        return Fault(str(fault), has_place=True)
    try:
        return encoder.read(row)
    except DataError as fault:
        return Fault(str(fault))


def _outcomes(encoder: Encoder, items: Items) -> list[Outcome]:
    """The faults of reading stay in their places."""
    sound = [item for item in items if not isinstance(item, Fault)]
    encoded = iter(encoder.encode(sound) if sound else ())
    return [item if isinstance(item, Fault) else next(encoded) for item in items]


_encoder: Encoder  # of a worker process, set once when it starts


def _start_worker(pickled: bytes, user_files: Sequence[Path]) -> None:
    global _encoder
    for file in user_files:  # which are no modules that a new process could find
        run_user_code(file)
    _encoder = pickle.loads(pickled)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is parallel enough


def _encode(items: Items) -> list[Outcome]:
    return _outcomes(_encoder, items)


def _results(rows: Rows, encoder: Encoder, workers: int) -> Iterator[list[Outcome]]:
    """Outcomes of one batch of rows after the other, with some batches under way at a time."""
    if not workers:
        # The tokenizer works without Python's lock, so one batch is rendered while it has another.
        pool, encode = ThreadPoolExecutor(THREADS), partial(_outcomes, encoder)
    else:
        # Forked children would inherit the threads' locks of jax and of the tokenizer.
        pickled = pickle.dumps(encoder)
        start = partial(_start_worker, pickled, find_user_files(pickled))
        pool, encode = ProcessPoolExecutor(workers, get_context("spawn"), start), _encode
    waiting: deque[Future[list[Outcome]]] = deque()
    try:
        for first in range(0, len(rows), BATCH_ROWS):
            numbers = range(first, min(first + BATCH_ROWS, len(rows)))
            waiting.append(pool.submit(encode, [_item(rows, n, encoder) for n in numbers]))
            if len(waiting) > 2 * (workers or THREADS):  # what is under way is all in memory
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
