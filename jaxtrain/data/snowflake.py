"""Records of a Snowflake account; its own package finds the credentials of the default connection
in its files and the environment."""

import hashlib
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from snowflake.connector.errors import Error  # pyright: ignore[reportMissingImports]
from snowflake.snowpark import Session  # pyright: ignore[reportMissingImports]
from snowflake.snowpark.exceptions import SnowparkClientException  # pyright: ignore[reportMissingImports]
from snowflake.snowpark.types import ArrayType, MapType, VariantType  # pyright: ignore[reportMissingImports]

from jaxtrain.data.files import JsonLines, map_file, open_temporary_file
from jaxtrain.data.records import Records, SelectedRecords, first_line, rename_columns
from jaxtrain.data.source import DataSource
from jaxtrain.recipe.errors import DataError, RecipeError
from jaxtrain.recipe.snowflake import SnowflakeSourceConfig

DATA_FILES = ".*data_.*[.]parquet"
"""Names of the files of a data set's version that hold its records."""


class SnowflakeSource(DataSource):
    name = "snowflake"
    config: SnowflakeSourceConfig

    @property
    def label(self) -> str:
        config = self.config
        return config.name or config.table_name or config.dataset_uri or "snowflake query"

    def load(self, config: SnowflakeSourceConfig, split: str) -> Records:
        session = _open_session()
        try:
            frame = _find_frame(session, config)
            frame = frame.limit(config.limit) if config.limit else frame
            records = _save_records(frame, self.label)
        except (Error, SnowparkClientException) as fault:
            raise DataError(f"{self.label}: {first_line(fault)}") from None
        return self.only_split(rename_columns(records, config.column_mapping), split)


def _open_session() -> Any:
    """Returns the open session, or opens the default connection; RecipeError without one."""
    try:
        return Session.builder.getOrCreate()
    except (Error, SnowparkClientException) as fault:
        raise RecipeError(
            f"no connection to Snowflake: {first_line(fault)}; write a default connection into the "
            f"package's connections.toml"
        ) from None


def _find_frame(session: Any, config: SnowflakeSourceConfig) -> Any:
    if config.table_name:
        return session.table(config.table_name)
    if config.dataset_uri:
        return session.read.option("pattern", DATA_FILES).parquet(f"{config.dataset_uri}/")
    return session.sql(config.sql)


def _save_records(frame: Any, label: str) -> Records:
    """Saves the records in a nameless file, one object per line, and orders them by their digests:
    a query has no order of its own, and a run needs one."""
    nested = {
        field.name.strip('"')
        for field in frame.schema.fields
        if isinstance(field.datatype, ArrayType | MapType | VariantType)
    }
    digests = bytearray()
    file = open_temporary_file()
    for record in frame.to_local_iterator():
        values = {
            name: json.loads(value) if name in nested and isinstance(value, str) else value
            for name, value in record.as_dict().items()
        }
        line = json.dumps(values, default=_to_json_value).encode()
        digests += hashlib.blake2b(line, digest_size=8).digest()
        file.write(line + b"\n")
    if not digests:
        raise DataError(f"{label}: no records")
    file.flush()
    order = np.argsort(np.frombuffer(digests, dtype=np.uint64), kind="stable")
    return SelectedRecords(JsonLines(Path(label), map_file(file, Path(label))), order)


def _to_json_value(value: Any) -> float | str:
    return float(value) if isinstance(value, Decimal) else str(value)
