"""Sources in a Snowflake account."""

import re
from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field

from jaxtrain.recipe.data import DataSourceConfig
from jaxtrain.recipe.errors import show
from jaxtrain.recipe.section import no_effect

DATASET_URI = re.compile(r"snow://dataset/[^/]+/versions/[^/]+")
TABLE_NAME = re.compile(r'(?:[\w$"]+\.){0,2}[\w$"]+')


class SnowflakeSourceConfig(DataSourceConfig):
    """Records of a query, a table or a data set."""

    sql: str | None = None
    """A query; its records are sorted, as a query has no order."""
    table_name: str | None = None
    """A table, `[[db.]schema.]table`, with all its columns."""
    dataset_uri: str | None = None
    """A version of a data set, `snow://dataset/<name>/versions/<version>`."""
    column_mapping: dict[str, str] = {}
    """Column → its new name."""
    column: str = "text"
    """Column of the text of causal training."""
    limit: int | None = Field(default=None, gt=0)
    """Maximum number of records."""
    batch_size: Annotated[int, no_effect("the package chooses how it fetches records")] = Field(
        default=1024, ge=1
    )

    PACKAGE: ClassVar[str] = "snowflake-snowpark-python"

    @property
    def selection_keys(self) -> tuple[str, ...]:
        place = ("sql", "table_name", "dataset_uri", "limit", "batch_size")
        return (*super().selection_keys, *place)

    @property
    def text_column(self) -> str:
        return self.column

    def contradictions(self) -> Iterator[tuple[str, str]]:
        written = [k for k in ("sql", "table_name", "dataset_uri") if getattr(self, k) is not None]
        if len(written) != 1:
            found = " and ".join(written) or "none"
            yield "", f"needs exactly one of sql, table_name and dataset_uri, found {found}"
        for key, form, like in (
            ("table_name", TABLE_NAME, "[[db.]schema.]table"),
            ("dataset_uri", DATASET_URI, "snow://dataset/<name>/versions/<version>"),
        ):
            value = getattr(self, key)
            if value is not None and not form.fullmatch(value):
                yield key, f"must look like {like}, found {show(value)}"
