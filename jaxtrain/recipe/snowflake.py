"""Sources in a Snowflake account."""

import re
from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from jaxtrain.recipe.data import DataSourceConfig
from jaxtrain.recipe.errors import show

DATASET_URI = re.compile(r"snow://dataset/[^/]+/versions/[^/]+")
TABLE_NAME = re.compile(r'(?:[\w$"]+\.){0,2}[\w$"]+')


class SnowflakeSourceConfig(DataSourceConfig):
    """Rows of a query, a table or a data set."""

    sql: str | None = None
    """A query; its rows are put into an order of their own."""
    table_name: str | None = None
    """`[[db.]schema.]table`, all its columns."""
    dataset_uri: str | None = None
    """`snow://dataset/<name>/versions/<version>`."""
    column_mapping: dict[str, str] = {}
    """Column → the name it goes by from here on."""
    column: str = "text"
    """Text column of causal rows."""
    limit: int | None = Field(default=None, gt=0)
    """At most so many rows."""
    batch_size: int = Field(default=1024, ge=1)
    """No effect: the package fetches rows in parts of its own."""

    PACKAGE: ClassVar[str] = "snowflake-snowpark-python"

    @property
    def selection_keys(self) -> tuple[str, ...]:
        place = ("sql", "table_name", "dataset_uri", "limit", "batch_size")
        return (*super().selection_keys, *place)

    @property
    def text_column(self) -> str:
        return self.column

    def contradictions(self) -> Iterator[str]:
        written = [k for k in ("sql", "table_name", "dataset_uri") if getattr(self, k) is not None]
        if len(written) != 1:
            found = " and ".join(written) or "none"
            yield f"needs exactly one of sql, table_name and dataset_uri, found {found}"
        for key, form, like in (
            ("table_name", TABLE_NAME, "[[db.]schema.]table"),
            ("dataset_uri", DATASET_URI, "snow://dataset/<name>/versions/<version>"),
        ):
            value = getattr(self, key)
            if value is not None and not form.fullmatch(value):
                yield f"{key} must look like {like}, found {show(value)}"
