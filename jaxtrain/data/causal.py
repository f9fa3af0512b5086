"""Pre-training: texts joined and cut into sequences that are full to the last token."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtrain.data.documents import Documents
from jaxtrain.data.encode import (
    NOTHING,
    Dropped,
    Encoded,
    Encoder,
    Outcome,
    TokenisedEncoder,
    prepare_backend,
)
from jaxtrain.data.factory import DataFactory
from jaxtrain.data.packing import PackingPlan, cut_documents
from jaxtrain.data.records import get_text
from jaxtrain.data.render import check_characters
from jaxtrain.data.source import LoadedSource
from jaxtrain.recipe.data import CausalDataConfig
from jaxtrain.recipe.errors import DataError, RecipeError


@dataclass
class TextEncoder:
    """Puts text between BOS, if there is one, and EOS, and trains every token but the first."""

    tokenizer: Any
    column: str
    kwargs: Mapping[str, Any]

    def __post_init__(self):
        if self.tokenizer.eos_token_id is None:
            raise RecipeError("tokenizer: has no EOS token, which must end every document")
        self._backend = prepare_backend(self.tokenizer)

    def read(self, record: Mapping[str, Any]) -> str:
        column = next(iter(record)) if len(record) == 1 else self.column
        text = get_text(record, column)
        check_characters(text)
        return text

    def encode(self, items: Sequence[str]) -> list[Outcome]:
        if not self.kwargs:
            encodings = self._backend.encode_batch_fast(list(items), add_special_tokens=False)
            return [self._encode_one(encoding.ids) for encoding in encodings]
        kwargs = {**self.kwargs, "add_special_tokens": False, "return_attention_mask": False}
        encoding = self.tokenizer(list(items), verbose=False, **kwargs)
        return [self._encode_one(ids) for ids in encoding["input_ids"]]

    def _encode_one(self, ids: list[int]) -> Outcome:
        if not ids:
            return Dropped(NOTHING, 0)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        before = [] if bos is None else [bos]
        tokens = np.array([*before, *ids, eos], dtype=np.int32)
        weights = np.ones(len(tokens), dtype=np.uint8)
        weights[0] = 0  # before it in a sequence is another text
        return Encoded(tokens, weights)


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

    def plan_packing(self, documents: Documents, chosen: np.ndarray, *, train: bool) -> PackingPlan:
        """Cuts the documents in their order; training leaves out the last sequence unless full."""
        plan = cut_documents(documents.lengths, self.max_length, chosen)
        if not train or plan.sequence_lengths[-1] == self.max_length:
            return plan
        if plan.num_sequences == 1:
            raise DataError(
                f"data.max_length: {self.max_length} is more than all {plan.sequence_lengths[0]} "
                f"tokens; lower it or add text"
            )
        return plan.drop(plan.num_sequences - 1)
