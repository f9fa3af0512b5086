"""Records that are tokens already: `input_ids`, and `labels` for conversations."""

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
    check_length,
)
from jaxtrain.data.records import get_column
from jaxtrain.recipe.errors import DataError, show

IGNORED = -100
"""The label of a token that is not trained."""


@dataclass(frozen=True)
class TokenisedEncoder:
    """Checks tokens and takes them as they are, of any length unless `max_length` is given."""

    vocab_size: int
    with_labels: bool
    max_length: int | None = None
    overlong: Overlong = "drop"

    def read(self, record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens, int32 [n], and which of them are trained, uint8 [n]."""
        tokens = _read_integers(record, "input_ids")
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)][0]
            raise DataError(
                f"input_ids: {wrong} is no token; must be from 0 to {self.vocab_size - 1}"
            )
        if not self.with_labels:
            return tokens.astype(np.int32), np.ones(len(tokens), np.uint8)
        labels = _read_integers(record, "labels")
        if len(labels) != len(tokens):
            raise DataError(f"labels: must be {len(tokens)}, as input_ids, found {len(labels)}")
        wrong = np.flatnonzero((labels != IGNORED) & (labels != tokens))
        if len(wrong):
            raise DataError(
                f"labels[{wrong[0]}]: must be the token {tokens[wrong[0]]} itself or {IGNORED}, "
                f"found {labels[wrong[0]]}; labels are not shifted"
            )
        return tokens.astype(np.int32), (labels != IGNORED).astype(np.uint8)

    def encode(self, items: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Outcome]:
        return [self._encode_one(*item) for item in items]

    def _encode_one(self, tokens: np.ndarray, weights: np.ndarray) -> Outcome:
        length = len(tokens)
        if not length:
            return Dropped(NOTHING, 0)
        most = self.max_length or length
        if refused := check_length(length, most, self.overlong):
            return refused
        weights = weights[:most].copy()
        weights[0] = 0  # nothing before it predicts it
        if self.with_labels and not weights.any():
            return Dropped(CUT_AWAY if length > most else UNTRAINED, length)
        return Encoded(tokens[:most], weights, 0, 0, length > most)


def _read_integers(record: Mapping[str, Any], column: str) -> np.ndarray:
    numbers = get_column(record, column)
    try:
        values = np.asarray(numbers)
    except ValueError:  # lists of different lengths
        values = np.zeros((0, 0))
    if values.ndim != 1 or (len(values) and values.dtype.kind not in "iu"):
        raise DataError(f"{column}: must be a list of whole numbers, found {show(numbers)}")
    return values.astype(np.int64)
