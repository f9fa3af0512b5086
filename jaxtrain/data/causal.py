"""Pre-training: texts joined and cut into rows that are full to the last token."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtrain.data.documents import Documents
from jaxtrain.data.encode import NOTHING, Dropped, Encoded, Outcome, plain_backend
from jaxtrain.data.factory import DataFactory
from jaxtrain.data.packing import RowPlan, slices
from jaxtrain.data.render import check_characters
from jaxtrain.data.rows import missing_column
from jaxtrain.data.source import LoadedSource
from jaxtrain.data.tokenise import Encoder
from jaxtrain.data.tokenised import TokenisedEncoder
from jaxtrain.recipe.data import CausalDataConfig
from jaxtrain.recipe.errors import DataError, RecipeError, show


class TextEncoder:
    """Text between BOS, where the tokenizer has one, and EOS; every token but the first trained."""

    def __init__(self, tokenizer: Any, column: str, kwargs: Mapping[str, Any]):
        if tokenizer.eos_token_id is None:
            raise RecipeError("tokenizer: has no EOS token, which ends every document")
        self._tokenizer, self._backend = tokenizer, plain_backend(tokenizer)
        self._column = column
        self._kwargs = dict(kwargs)
        self._before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._eos = tokenizer.eos_token_id

    def read(self, row: Mapping[str, Any]) -> str:
        column = next(iter(row)) if len(row) == 1 else self._column
        if column not in row:
            raise missing_column(column, row)
        if not isinstance(row[column], str):
            raise DataError(f"{column}: must be text, found {show(row[column])}")
        check_characters(row[column])
        return row[column]

    def encode(self, items: Sequence[str]) -> list[Outcome]:
        if not self._kwargs:
            encodings = self._backend.encode_batch_fast(list(items), add_special_tokens=False)
            return [self._outcome(encoding.ids) for encoding in encodings]
        asked = {**self._kwargs, "add_special_tokens": False, "return_attention_mask": False}
        encoding = self._tokenizer(list(items), verbose=False, **asked)
        return [self._outcome(ids) for ids in encoding["input_ids"]]

    def _outcome(self, ids: list[int]) -> Outcome:
        if not ids:
            return Dropped(NOTHING, 0)
        tokens = np.array([*self._before, *ids, self._eos], dtype=np.int32)
        weights = np.ones(len(tokens), dtype=np.uint8)
        weights[0] = 0  # what stands before it in a row is another text
        return Encoded(tokens, weights, 0, 0, False)


class CausalDataFactory(DataFactory):
    name = "causal"
    config: CausalDataConfig

    def encoder(self, loaded: LoadedSource) -> Encoder:
        if loaded.source.config.is_tokenised:
            return TokenisedEncoder(vocab_size=len(self.tokenizer), with_labels=False)
        column = loaded.source.config.text_column
        return TextEncoder(self.tokenizer, column, self.tokenize_kwargs)

    def remarks(self) -> list[str]:
        return []  # no text goes through a template

    def key_parts(self, loaded: Sequence[LoadedSource]) -> dict[str, str]:
        kwargs = json.dumps(dict(self.tokenize_kwargs), sort_keys=True)
        return super().key_parts(loaded) | {"tokenizer.tokenize_kwargs": kwargs}

    def plan_rows(self, documents: Documents, chosen: np.ndarray, *, train: bool) -> RowPlan:
        """In the order of the documents. The tail that fills no row is left out of training, once,
        and kept in evaluation."""
        plan = slices(documents.lengths, self.max_length, chosen)
        if not train or plan.row_lengths[-1] == self.max_length:
            return plan
        if plan.num_rows == 1:
            raise DataError(
                f"{plan.row_lengths[0]} tokens in all, which is less than one row of max_length "
                f"{self.max_length}; lower data.max_length or add text"
            )
        return plan.without(plan.num_rows - 1)
