"""What every source of rows is."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtrain.data.conversation import RoleMapper
from jaxtrain.data.order import sample
from jaxtrain.data.records import MappedRecords, NamedRecords, Records, SelectedRecords, take_split
from jaxtrain.recipe.data import DataSourceConfig, RowsConfig
from jaxtrain.recipe.errors import DataError
from jaxtrain.registry import Factory

SAMPLE = 1  # keeps the draw of a sample apart from other orders under the same seed


class Limits(NamedTuple):
    """What the rows are for; a source that makes rows up needs to know."""

    max_length: int
    vocab_size: int
    seed: int


class DataSource(Factory, kind="data_source"):
    """Rows from one place. A subclass has a `name`, a `config` annotation and `load`."""

    events = {"load": "load"}
    retired = {
        "load_fn": "define `load(config, split)`, which returns the rows of a split",
        "cache_path_args": "the cache is keyed by the rows that `load` gives and by `options()`",
    }
    config: DataSourceConfig
    data_factory: Any = None
    """The one that makes batches of these rows."""

    @property
    def label(self) -> str:
        """What logs and messages call this source."""
        return self.config.name or self.config.type or self.name

    def load(self, config: Any, split: str) -> Records | Sequence[dict[str, Any]]:
        """All rows of `split`; a plain list of dicts will do."""
        raise NotImplementedError(f"{type(self).__name__} must define load(config, split)")

    def options(self) -> dict[str, Any]:
        """The recipe's keys that decide what a row becomes once it is read."""
        return self.config.model_dump(mode="json", exclude=set(self.config.selection_keys))

    def only_split(self, rows: Records | Sequence[dict[str, Any]], split: str) -> Records:
        """`split` of rows that are one split: `train` or `eval`, as the recipe uses them, or a
        slice such as `train[:100]`; DataError for any other name."""
        rows = rows if isinstance(rows, Records) else NamedRecords(rows, self.label)
        return take_split({"train": rows, "eval": rows}, split, self.label)

    def read(self, default_split: str, limits: Limits | None = None) -> Records:
        """The rows to train on: the recipe's split, then its sample; DataError when there are
        none."""
        loaded = self.load(self.config, self.config.split or default_split)
        rows = loaded if isinstance(loaded, Records) else NamedRecords(loaded, self.label)
        if len(rows) == 0:
            raise DataError(f"{self.label}: no rows")
        return self._sampled(rows)

    def _sampled(self, rows: Records) -> Records:
        count = self.config.sample_count
        if self.config.sample_ratio is not None:
            count = max(1, round(self.config.sample_ratio * len(rows)))
        if count is None or count >= len(rows):
            return rows
        return SelectedRecords(rows, sample(len(rows), count, SAMPLE, self.config.sample_seed))


class LoadedSource(NamedTuple):
    """A source beside its rows."""

    source: DataSource
    rows: Records

    @property
    def label(self) -> str:
        return self.source.label


class ConversationSource(DataSource, abstract=True):
    """Rows whose columns the recipe maps to roles."""

    config: RowsConfig

    def role_mapping(self) -> dict[str, str]:
        """Role → column or `array.field.value`; empty leaves rows as they are."""
        return self.config.role_mapping

    def read(self, default_split: str, limits: Limits | None = None) -> Records:
        rows = super().read(default_split, limits)
        if not (mapping := self.role_mapping()):
            return rows
        return MappedRecords(rows, RoleMapper(mapping, self.config.content_key))
