"""Pre-training: texts joined and cut into sequences that are full to the last token."""

import json
from collections.abc import Sequence

import numpy as np

from jaxtrain.data.documents import Documents
from jaxtrain.data.encode import Encoder, TextEncoder, TokenisedEncoder
from jaxtrain.data.factory import DataFactory
from jaxtrain.data.packing import PackingPlan, cut_documents
from jaxtrain.data.source import LoadedSource
from jaxtrain.recipe.data import CausalDataConfig
from jaxtrain.recipe.errors import DataError


class CausalDataFactory(DataFactory):
    name = "causal"
    config: CausalDataConfig

    def encoder(self, loaded: LoadedSource) -> Encoder:
        if loaded.source.config.is_tokenised:
            return TokenisedEncoder(vocab_size=len(self.tokenizer), with_labels=False)
        column = loaded.source.config.text_column
        kwargs = dict(self.tokenize_kwargs)
        return TextEncoder(self.tokenizer, column, kwargs, self.config.split_special_tokens)

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
