"""Warnings of what usually goes wrong with training data, before it costs a run."""

from collections.abc import Iterator

import numpy as np

from jaxtrain.data.documents import Documents
from jaxtrain.data.encode import OVERLONG
from jaxtrain.data.ledger import SetCounts, SourceCounts
from jaxtrain.data.source import LoadedSource

MAX_LOST_SHARE = 0.1
MIN_TRAINED_SHARE = 0.02
MIN_FILL = 0.5
MAX_EQUAL_SHARE = 0.01


def check_sample(loaded: LoadedSource) -> Iterator[str]:
    wanted = loaded.source.config.sample_count
    if wanted is not None and wanted > len(loaded.rows):
        yield f"{loaded.label}: sample_count {wanted} takes all {len(loaded.rows)} records"


def check_source(source: SourceCounts) -> Iterator[str]:
    label, records = source.label, max(source.rows, 1)
    overlong = source.dropped.get(OVERLONG, 0)
    if overlong > MAX_LOST_SHARE * records:
        yield (
            f"{label}: {overlong / records:.0%} of the records are longer than max_length and "
            f"dropped; raise data.max_length, or set data.overlong: truncate"
        )
    if source.truncated > MAX_LOST_SHARE * records:
        yield (
            f"{label}: {source.truncated / records:.0%} of the records lose their end to "
            f"truncation; raise data.max_length"
        )
    if source.documents == 0:
        yield f"{label}: none of its {source.rows} records is trained"
    elif source.trained_tokens < MIN_TRAINED_SHARE * source.tokens:
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


def check_set(counts: SetCounts) -> Iterator[str]:
    if counts.documents == counts.rows and counts.fill < MIN_FILL:
        yield (
            f"{counts.label}: sequences are {counts.fill:.0%} full, the rest is padding; "
            f"data.pack_samples: true packs several documents into a sequence"
        )


def check_documents(documents: Documents, bos: int | None) -> Iterator[str]:
    digests = documents.index["digest"]
    equal = len(digests) - len(np.unique(digests))
    if equal > MAX_EQUAL_SHARE * len(digests):
        yield f"{equal} of {len(digests)} training documents are copies of another"
    firsts = documents.offsets[:-1][documents.lengths > 1]
    if bos is None or not len(firsts):
        return
    twice = (documents.tokens[firsts] == bos) & (documents.tokens[firsts + 1] == bos)
    if twice.any():
        yield (
            f"{np.count_nonzero(twice)} training documents begin with BOS twice; the chat template "
            f"or the data add one too many"
        )
