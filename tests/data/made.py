"""Documents and plans made by hand. Token 0 of document d is 100 + d; the others count from 1."""

from pathlib import Path

import numpy as np

from jaxtrain.data.documents import Documents, DocumentWriter
from jaxtrain.data.packing import plan_rows
from jaxtrain.data.plan import BatchPlan, BatchShape


def documents_of(lengths: list[int], folder: Path) -> Documents:
    with DocumentWriter(folder) as writer:
        for row, length in enumerate(lengths):
            tokens = np.arange(length)
            tokens[0] = 100 + row
            writer.append(tokens, np.ones(length, np.uint8), source=0, row=row)
    return Documents.open(folder)


def plan_of(documents: Documents, *, capacity: int, shape: BatchShape, seed: int = 42) -> BatchPlan:
    chosen = np.arange(len(documents.index))
    rows = plan_rows(documents.lengths, capacity, "best_fit", chosen)
    return BatchPlan(documents, rows, shape, capacity, seed)
