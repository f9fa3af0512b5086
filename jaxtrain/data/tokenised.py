"""Rows that come as tokens already: `input_ids`, and for conversations `labels`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtrain.data.encode import (
    CUT_AWAY,
    NOTHING,
    UNTRAINED,
    Dropped,
    Encoded,
    Outcome,
    Overlong,
    beyond_limit,
)
from jaxtrain.data.rows import missing_column
from jaxtrain.recipe.errors import DataError, show

IGNORED = -100
"""A label that says: this token is not trained."""


@dataclass(frozen=True)
class TokenisedEncoder:
    """Takes tokens as they stand, and checks them. Without `max_length` a row has any length."""

    vocab_size: int
    with_labels: bool
    max_length: int | None = None
    overlong: Overlong = "drop"

    def read(self, row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """int32 and uint8 [n]: tokens, and which are trained."""
        tokens = _integers(row, "input_ids")
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)][0]
            raise DataError(
                f"input_ids: {wrong} is no token; the tokenizer has {self.vocab_size}, from 0"
            )
        if not self.with_labels:
            return tokens.astype(np.int32), np.ones(len(tokens), np.uint8)
        labels = _integers(row, "labels")
        if len(labels) != len(tokens):
            raise DataError(f"labels: {len(labels)} of them beside {len(tokens)} input_ids")
        wrong = np.flatnonzero((labels != IGNORED) & (labels != tokens))
        if len(wrong):
            raise DataError(
                f"labels[{wrong[0]}]: must be the token {tokens[wrong[0]]} itself or {IGNORED}, "
                f"found {labels[wrong[0]]}; labels are not shifted"
            )
        return tokens.astype(np.int32), (labels != IGNORED).astype(np.uint8)

    def encode(self, items: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Outcome]:
        return [self._outcome(*item) for item in items]

    def _outcome(self, tokens: np.ndarray, weights: np.ndarray) -> Outcome:
        length = len(tokens)
        if not length:
            return Dropped(NOTHING, 0)
        most = self.max_length or length
        if refused := beyond_limit(length, most, self.overlong):
            return refused
        weights = weights[:most].copy()
        weights[0] = 0  # nothing stands before it that could predict it
        if self.with_labels and not weights.any():
            return Dropped(CUT_AWAY if length > most else UNTRAINED, length)
        return Encoded(tokens[:most], weights, 0, 0, length > most)


def _integers(row: Mapping[str, Any], column: str) -> np.ndarray:
    if column not in row:
        raise missing_column(column, row)
    try:
        values = np.asarray(row[column])
    except ValueError:  # lists of different lengths
        values = np.zeros((0, 0))
    if values.ndim != 1 or (len(values) and values.dtype.kind not in "iu"):
        raise DataError(f"{column}: must be a list of whole numbers, found {show(row[column])}")
    return values.astype(np.int64)
