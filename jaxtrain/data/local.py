"""Sources of local files: one for each format, and one for any format."""

from jaxtrain.data.files import open_files
from jaxtrain.data.paths import find_data_files
from jaxtrain.data.records import Records, rename_columns
from jaxtrain.data.source import ConversationSource
from jaxtrain.recipe.data import (
    AnyLocalDataSourceConfig,
    LocalDataSourceConfig,
    TextDataSourceConfig,
)


class _LocalSource(ConversationSource, abstract=True):
    config: LocalDataSourceConfig

    @property
    def label(self) -> str:
        path = self.config.path
        return self.config.name or (path if isinstance(path, str) else ", ".join(path))

    def load(self, config: LocalDataSourceConfig, split: str) -> Records:
        kind = config.format if isinstance(config, AnyLocalDataSourceConfig) else self.name
        per_line = isinstance(config, TextDataSourceConfig) and config.per_line
        paths = find_data_files(config.path)
        records = open_files(paths, kind, column=config.column, per_line=per_line)
        return self.only_split(rename_columns(records, config.columns), split)


class JsonSource(_LocalSource):
    name = "json"


class JsonLinesSource(_LocalSource):
    name = "jsonl"


class CsvSource(_LocalSource):
    name = "csv"


class ParquetSource(_LocalSource):
    name = "parquet"


class ArrowSource(_LocalSource):
    name = "arrow"


class TextSource(_LocalSource):
    name = "text"
    config: TextDataSourceConfig


class LocalSource(_LocalSource):
    name = "local"
    config: AnyLocalDataSourceConfig
