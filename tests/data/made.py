"""Documents and plans made by hand. Token 0 of document d is 100 + d; the others count from 1."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxtrain.batch import Batch
from jaxtrain.data import BatchShape, CausalDataFactory, JsonLinesSource, SFTDataFactory
from jaxtrain.data.documents import Documents, DocumentWriter
from jaxtrain.data.encode import Encoded
from jaxtrain.data.packing import pack
from jaxtrain.data.plan import BatchPlan
from jaxtrain.recipe.data import CausalDataConfig, LocalDataSourceConfig, SFTDataConfig
from tests.tiny import chat, tiny_tokenizer


def documents_of(lengths: list[int], folder: Path) -> Documents:
    with DocumentWriter(folder) as writer:
        for row, length in enumerate(lengths):
            tokens = np.arange(length)
            tokens[0] = 100 + row
            document = Encoded(tokens, np.ones(length, np.uint8))
            writer.append(document, source=0, record=row)
    return Documents.open(folder)


def plan_of(documents: Documents, *, capacity: int, shape: BatchShape, seed: int = 42) -> BatchPlan:
    chosen = np.arange(len(documents.index))
    rows = pack(documents.lengths, capacity, "best_fit", chosen)
    return BatchPlan(documents, rows, shape, (capacity,), seed)


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def jsonl(folder, rows, name="rows", **keys):
    path = write(folder / f"{name}.jsonl", rows)
    return JsonLinesSource(LocalDataSourceConfig(path=str(path), name=name, **keys))


def chats(folder, name, count, words=3, **keys):
    rows = [
        {"messages": chat(f"{name} {n}", " ".join(["yes"] * (1 + n % words)))} for n in range(count)
    ]
    return jsonl(folder, rows, name, **keys)


def sft(sources, *, max_length=64, evals=None, tokenizer=None, **keys):
    config = SFTDataConfig(sources=("x",), **keys)
    factory = SFTDataFactory(config, tokenizer or tiny_tokenizer(), max_length)
    return factory.prepare(sources, evals or {}, BatchShape(1, 2))


def causal(sources, *, max_length=16, evals=None, **keys):
    factory = CausalDataFactory(
        CausalDataConfig(sources=("x",), **keys), tiny_tokenizer(), max_length
    )
    return factory.prepare(sources, evals or {}, BatchShape(1, 2))


def all_rows(plan):
    return plan.fill_batch(np.arange(plan.packing.num_sequences), plan.lengths[-1])


def texts(folder, rows, **keys):
    return jsonl(folder, rows, "texts", **keys)


def of_processes(plan, count):
    """The plan as each of so many processes has it, with rows of its own."""
    own = np.split(np.arange(plan.shape.sequences), count)
    return [replace(plan, shape=plan.shape._replace(process_sequences=rows)) for rows in own]


def arrays(batch):
    """Those of a batch, without jax, which the processes that import this file must not know."""
    return [*batch[:5], *batch.extras.values()]


def are_equal(one, other):
    return all((a == b).all() for a, b in zip(arrays(one), arrays(other), strict=True))


def joined(parts):
    """The batch that several processes have together."""
    return Batch(
        *(
            np.concatenate(leaves, axis=1)
            for leaves in zip(*(part[:5] for part in parts), strict=True)
        )
    )
