"""What usually goes wrong with training data, said before it costs a run."""

from collections.abc import Iterator

import numpy as np

from jaxtrain.data.documents import Documents
from jaxtrain.data.encode import OVERLONG
from jaxtrain.data.ledger import SetCounts, SourceCounts
from jaxtrain.data.source import LoadedSource

MANY = 0.1
FEW_TRAINED = 0.02
FEW_FILLED = 0.5
MANY_EQUAL = 0.01


def sample_warnings(loaded: LoadedSource) -> Iterator[str]:
    wanted = loaded.source.config.sample_count
    if wanted is not None and wanted > len(loaded.rows):
        yield f"{loaded.label}: sample_count {wanted} takes all, there are {len(loaded.rows)} rows"


def source_warnings(source: SourceCounts) -> Iterator[str]:
    label, rows = source.label, max(source.rows, 1)
    overlong = source.dropped.get(OVERLONG, 0)
    if overlong > MANY * rows:
        yield (
            f"{label}: {overlong / rows:.0%} of the rows are dropped as longer than max_length; "
            f"raise data.max_length, or set data.overlong: truncate"
        )
    if source.truncated > MANY * rows:
        yield (
            f"{label}: {source.truncated / rows:.0%} of the rows are truncated, and lose their "
            f"end; raise data.max_length"
        )
    if source.documents == 0:
        yield f"{label}: none of its {source.rows} rows is trained"
    elif source.trained_tokens < FEW_TRAINED * source.tokens:
        share = source.trained_tokens / source.tokens
        yield f"{label}: only {share:.1%} of the tokens are trained"
    if source.systems_hidden:
        yield (
            f"{label}: the chat template leaves the system text out of {source.systems_hidden} of "
            f"{source.documents} documents; set tokenizer.chat_template to one that shows it"
        )
    if source.turns and source.ended_turns == 0:
        yield (
            f"{label}: no turn ends in a special token, so the model may never stop; use a chat "
            f"template that ends turns"
        )


def set_warnings(counts: SetCounts) -> Iterator[str]:
    if counts.documents == counts.rows and counts.fill < FEW_FILLED:
        yield (
            f"{counts.label}: rows are filled to {counts.fill:.0%}, the rest is padding; "
            f"data.pack_samples: true puts several documents into a row"
        )


def document_warnings(documents: Documents, bos: int | None) -> Iterator[str]:
    digests = documents.index["digest"]
    equal = len(digests) - len(np.unique(digests))
    if equal > MANY_EQUAL * len(digests):
        yield f"{equal} of {len(digests)} training documents are copies of another"
    firsts = documents.offsets[:-1][documents.lengths > 1]
    if bos is None or not len(firsts):
        return
    twice = (documents.tokens[firsts] == bos) & (documents.tokens[firsts + 1] == bos)
    if twice.any():
        yield (
            f"{np.count_nonzero(twice)} training documents begin with BOS twice; the chat template "
            f"or the rows write one too many"
        )
