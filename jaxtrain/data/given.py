"""Rows that a program has in hand."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxtrain.data.rows import Rows
from jaxtrain.data.source import ConversationSource
from jaxtrain.recipe.data import RowsConfig
from jaxtrain.recipe.errors import DataError


class GivenSource(ConversationSource):
    """What a recipe names where a program will give the rows."""

    name = "given"
    config: RowsConfig

    def __init__(
        self, config: RowsConfig, trainer: Any = None, *, rows: Sequence[dict[str, Any]] = ()
    ):
        super().__init__(config, trainer)
        self.rows = rows

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]], config: Any = None) -> "GivenSource":
        """`config` is a recipe's `given` source; without one, rows are as the factory reads them,
        and those that have `input_ids` are tokens already."""
        rows = rows if isinstance(rows, Sequence) else list(rows)
        if not isinstance(config, RowsConfig) or config.type != cls.name:
            is_tokens = any(isinstance(row, Mapping) and "input_ids" in row for row in rows[:1])
            config = RowsConfig(type=cls.name, process=not is_tokens)
        return cls(config, rows=rows)

    def load(self, config: RowsConfig, split: str) -> Rows:
        if not self.rows:
            raise DataError(
                f"{self.label}: no rows; give them as `train_data` or `eval_data` of the trainer"
            )
        return self.only_split(self.rows, split)
