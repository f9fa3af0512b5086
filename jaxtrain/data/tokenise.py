"""All rows of a source to documents, in the order of the rows, by one process or by several."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

from jaxtrain.data.conversation import Conversation, to_conversation
from jaxtrain.data.documents import DocumentWriter
from jaxtrain.data.encode import ConversationEncoder, Encoded, Fault, Outcome
from jaxtrain.data.ledger import SourceCounts
from jaxtrain.data.rows import Rows
from jaxtrain.recipe.errors import DataError

BATCH_ROWS = 128
POOL_ROWS = 20_000
"""From this many rows on, processes pay for their start of some seconds."""

Encode = Callable[[list[Conversation]], list[Outcome]]


def workers_for(num_rows: int, num_proc: int) -> int:
    """Processes worth having; 0 stays in this one, where the tokenizer has threads of its own."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    workers = min(num_proc, cores)
    return workers if workers > 1 and num_rows >= POOL_ROWS else 0


def tokenise(
    rows: Rows,
    encoder: ConversationEncoder,
    writer: DocumentWriter,
    counts: SourceCounts,
    *,
    source: int,
    workers: int = 0,
) -> None:
    """Appends the documents of `rows`, and counts what became of each row.

    Raises `DataError` with the place of the first row that cannot be read."""
    encode = _in_processes(encoder, workers) if workers else _here(encoder)
    for start, outcomes in encode(_batches(rows)):
        for row, outcome in enumerate(outcomes, start):
            if isinstance(outcome, Fault):
                raise DataError(f"{rows.where(row)}: {outcome.what}")
            counts.add(outcome)
            if isinstance(outcome, Encoded):
                writer.append(outcome.tokens, outcome.weights, source=source, row=row)


def _batches(rows: Rows) -> Iterator[tuple[int, list[Conversation]]]:
    for start in range(0, len(rows), BATCH_ROWS):
        stop = min(start + BATCH_ROWS, len(rows))
        yield start, [_conversation(rows, index) for index in range(start, stop)]


def _conversation(rows: Rows, index: int) -> Conversation:
    row = rows[index]  # a fault in here names its place already
    try:
        return to_conversation(row)
    except DataError as fault:
        raise DataError(f"{rows.where(index)}: {fault}") from None


Batches = Iterator[tuple[int, list[Conversation]]]
Results = Iterator[tuple[int, list[Outcome]]]


def _here(encoder: ConversationEncoder) -> Callable[[Batches], Results]:
    return lambda batches: ((start, encoder.encode(batch)) for start, batch in batches)


_encoder: ConversationEncoder  # of a worker process, set once when it starts


def _start_worker(encoder: ConversationEncoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is parallel enough


def _encode(batch: list[Conversation]) -> list[Outcome]:
    return _encoder.encode(batch)


def _in_processes(encoder: ConversationEncoder, workers: int) -> Callable[[Batches], Results]:
    def run(batches: Batches) -> Results:
        # Forked children would inherit the threads' locks of jax and of the tokenizer.
        pool = ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=_start_worker, initargs=(encoder,)
        )
        waiting: deque[tuple[int, Future[list[Outcome]]]] = deque()
        with pool:
            for start, batch in batches:
                waiting.append((start, pool.submit(_encode, batch)))
                if len(waiting) > 2 * workers:  # what is under way is all that is in memory
                    start, future = waiting.popleft()
                    yield start, future.result()
            for start, future in waiting:
                yield start, future.result()

    return run
