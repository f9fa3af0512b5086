"""Records of random tokens, for plans and benchmarks."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtrain.data.order import hash_with_keys
from jaxtrain.data.records import Records
from jaxtrain.data.source import DataSource, Limits
from jaxtrain.recipe.data import SyntheticDataSourceConfig

TOKENS = 6  # keeps these numbers apart from orders under the same seed


class SyntheticSource(DataSource):
    name = "synthetic"
    config: SyntheticDataSourceConfig

    def read(self, default_split: str, limits: Limits | None = None) -> Records:
        assert limits is not None, "a factory reads its sources with its limits"
        vocab_size = self.config.vocab_size or limits.vocab_size
        records = SyntheticRecords(self.config.rows, limits._replace(vocab_size=vocab_size))
        return self._sampled(self.only_split(records, self.config.split or default_split))


@dataclass(frozen=True)
class SyntheticRecords:
    """Records of `max_length` trained tokens, a function of the seed and the record's number."""

    count: int
    limits: Limits

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        length, vocab_size, seed = self.limits
        places = np.arange(index * length, (index + 1) * length, dtype=np.uint64)
        tokens = (hash_with_keys(places, TOKENS, seed) % np.uint64(vocab_size)).astype(np.int64)
        return {"input_ids": tokens, "labels": tokens}

    def where(self, index: int) -> str:
        return f"synthetic record {index}"

    def update_digest(self, digest: Any) -> None:
        digest.update(repr((self.count, *self.limits)).encode())
