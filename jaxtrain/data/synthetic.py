"""Rows of random tokens, for plans and benchmarks."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtrain.data.order import keyed
from jaxtrain.data.rows import Rows
from jaxtrain.data.source import DataSource, Limits
from jaxtrain.recipe.data import SyntheticDataSourceConfig

TOKENS = 6  # keeps these numbers apart from orders under the same seed


class SyntheticSource(DataSource):
    name = "synthetic"
    config: SyntheticDataSourceConfig

    def read(self, default_split: str, limits: Limits | None = None) -> Rows:
        assert limits is not None, "a factory reads its sources with its limits"
        most = self.config.vocab_size or limits.vocab_size
        rows = SyntheticRows(self.config.rows, limits._replace(vocab_size=most))
        return self._sampled(self.only_split(rows, self.config.split or default_split))


@dataclass(frozen=True)
class SyntheticRows:
    """Each `max_length` tokens, a function of the seed and the row's number; all are trained."""

    count: int
    limits: Limits

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        length, vocab_size, seed = self.limits
        places = np.arange(index * length, (index + 1) * length, dtype=np.uint64)
        tokens = (keyed(places, TOKENS, seed) % np.uint64(vocab_size)).astype(np.int64)
        return {"input_ids": tokens, "labels": tokens}

    def where(self, index: int) -> str:
        return f"synthetic row {index}"

    def content(self, digest: Any) -> None:
        digest.update(repr((self.count, *self.limits)).encode())
