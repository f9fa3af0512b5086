"""Records that a program passes in memory."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxtrain.data.records import Records
from jaxtrain.data.source import ConversationSource
from jaxtrain.recipe.data import RowsConfig
from jaxtrain.recipe.errors import DataError


class GivenSource(ConversationSource):
    """The source that a recipe names where a program passes the records."""

    name = "given"
    config: RowsConfig

    def __init__(
        self, config: RowsConfig, trainer: Any = None, *, records: Sequence[dict[str, Any]] = ()
    ):
        super().__init__(config, trainer)
        self.records = records

    @classmethod
    def from_records(cls, records: Iterable[dict[str, Any]], config: Any = None) -> "GivenSource":
        """Makes a source of `records`; `config` is the recipe's `given` source, if it has one, else
        records with `input_ids` are read as tokens and all others as raw data."""
        records = records if isinstance(records, Sequence) else list(records)
        if not isinstance(config, RowsConfig) or config.type != cls.name:
            is_tokens = any(isinstance(one, Mapping) and "input_ids" in one for one in records[:1])
            config = RowsConfig(type=cls.name, process=not is_tokens)
        return cls(config, records=records)

    def load(self, config: RowsConfig, split: str) -> Records:
        if not self.records:
            raise DataError(
                f"{self.label}: no records; pass them as `train_data` or `eval_data` of the trainer"
            )
        return self.only_split(self.records, split)
