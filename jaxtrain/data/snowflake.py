"""Rows of a Snowflake account. Credentials are a matter of its own package: the default connection
in its files and environment."""

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

from jaxtrain.data.files import JsonLines, mapped, temporary_file
from jaxtrain.data.rows import Rows, SelectedRows, first_line, renamed
from jaxtrain.data.source import DataSource
from jaxtrain.recipe.errors import DataError, RecipeError
from jaxtrain.recipe.snowflake import SnowflakeSourceConfig


class SnowflakeSource(DataSource):
    name = "snowflake"
    config: SnowflakeSourceConfig

    @property
    def label(self) -> str:
        return self.config.name or self.config.table_name or "snowflake query"

    def load(self, config: SnowflakeSourceConfig, split: str) -> Rows:
        session = _session()
        try:
            frame = (
                session.table(config.table_name) if config.table_name else session.sql(config.sql)
            )
            rows = _kept(frame.limit(config.limit) if config.limit else frame, self.label)
        except (Error, SnowparkClientException) as fault:
            raise DataError(f"{self.label}: {first_line(fault)}") from None
        return self.only_split(renamed(rows, config.column_mapping), split)


def _session() -> Any:
    """The one that is open, or one by the default connection; RecipeError when there is none."""
    try:
        return Session.builder.getOrCreate()
    except (Error, SnowparkClientException) as fault:
        raise RecipeError(
            f"no connection to Snowflake: {first_line(fault)}; write a default connection into the "
            f"package's connections.toml"
        ) from None


def _kept(frame: Any, label: str) -> Rows:
    """The rows in a file without a name, one object a line. A query has no order, and a run must
    have one: it is that of the rows' digests."""
    nested = {
        field.name.strip('"')
        for field in frame.schema.fields
        if isinstance(field.datatype, ArrayType | MapType | VariantType)
    }
    digests = bytearray()
    file = temporary_file()
    for record in frame.to_local_iterator():
        row = {
            name: json.loads(value) if name in nested and isinstance(value, str) else value
            for name, value in record.as_dict().items()
        }
        line = json.dumps(row, default=_plain).encode()
        digests += hashlib.blake2b(line, digest_size=8).digest()
        file.write(line + b"\n")
    if not digests:
        raise DataError(f"{label}: no rows")
    file.flush()
    order = np.argsort(np.frombuffer(digests, dtype=np.uint64), kind="stable")
    return SelectedRows(JsonLines(Path(label), mapped(file, Path(label))), order)


def _plain(value: Any) -> float | str:
    return float(value) if isinstance(value, Decimal) else str(value)
