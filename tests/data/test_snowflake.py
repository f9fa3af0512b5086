"""Rows of Snowflake, through its own package in the mode in which that runs without an account."""

from importlib import metadata

import numpy as np
import pytest

from jaxtrain.recipe.errors import DataError, RecipeError
from jaxtrain.recipe.resolve import resolve
from jaxtrain.recipe.snowflake import SnowflakeSourceConfig
from tests.data.made import causal, sft
from tests.tiny import chat, tiny_tokenizer

TABLE = {
    "type": "snowflake",
    "table_name": "db.schema.chats",
    "column_mapping": {"CHAT": "messages"},
}


def faults(source):
    recipe = {"model": {"name_or_path": "m"}, "data": {"sources": ["a/b", source]}}
    return [f"{fault.key}: {fault.what}" for fault in resolve(recipe).faults]


def test_without_the_package_a_recipe_is_refused_before_anything_starts(monkeypatch):
    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", nothing)
    assert faults(TABLE) == [
        "data.sources.1.type: snowflake needs snowflake-snowpark-python: pip install "
        "'jaxtrain[snowflake]'"
    ]


def test_one_place_and_its_form():
    for keys, message in (
        ({}, "needs exactly one of sql, table_name and dataset_uri, found none"),
        ({"sql": "s", "table_name": "t"}, "found sql and table_name"),
        ({"table_name": "a.b.c.d"}, r"table_name: must look like \[\[db.\]schema.\]table"),
        ({"dataset_uri": "dataset/x"}, "dataset_uri: must look like snow://dataset/"),
    ):
        with pytest.raises(ValueError, match=message):
            SnowflakeSourceConfig(**keys)


@pytest.fixture
def session(tmp_path, monkeypatch):
    pytest.importorskip("snowflake.snowpark", reason="the extra `snowflake` is not installed")
    from snowflake.snowpark import Session

    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))
    session = Session.builder.config("local_testing", True).create()
    yield session
    session.close()


def source(**keys):
    from jaxtrain.data.snowflake import SnowflakeSource

    return SnowflakeSource(SnowflakeSourceConfig(**keys))


def chats(session, name, count):
    rows = [[n, chat(f"number {n}?", "yes")] for n in range(count)]
    session.create_dataframe(rows, schema=["ID", "CHAT"]).write.save_as_table(name)


def test_a_table_becomes_conversations(session):
    assert faults(TABLE) == []
    chats(session, "chats", 5)
    data = sft([source(table_name="chats", column_mapping={"CHAT": "messages"})])
    (counts,) = data.ledger.sources
    assert (counts.label, counts.rows, counts.documents) == ("chats", 5, 5)
    batch = data.train.fill_batch(np.arange(5), data.sequence_tokens)
    trained = [
        tiny_tokenizer().decode(row[weights > 0])
        for row, weights in zip(batch.tokens, batch.loss_weights, strict=True)
    ]
    assert trained == ["yes<|im_end|>"] * 5


def test_rows_have_one_order_whatever_the_query_gives(session):
    chats(session, "chats", 9)
    found = [
        [row["ID"] for row in rows]
        for rows in (source(table_name="chats").read("train") for _ in range(2))
    ]
    session.table("chats").sort("ID", ascending=False).write.save_as_table("turned")
    found.append([row["ID"] for row in source(table_name="turned").read("train")])
    assert found[0] == found[1] == found[2] and sorted(found[0]) == list(range(9))


@pytest.mark.covers(
    "data.sources.*.table_name", "data.sources.*.limit", "data.sources.*.column_mapping"
)
def test_limits_slices_and_text(session):
    rows = [[f"text {n}", None, 1.5] for n in range(8)]
    session.create_dataframe(rows, schema=["BODY", "NOTE", "SCORE"]).write.save_as_table("texts")
    assert len(source(table_name="texts", limit=3).read("train")) == 3
    assert len(source(table_name="texts", split="train[:2]").read("train")) == 2
    row = source(table_name="texts", column_mapping={"BODY": "text"}).read("train")[0]
    assert set(row) == {"text", "NOTE", "SCORE"} and row["NOTE"] is None and row["SCORE"] == 1.5
    data = causal([source(table_name="texts", column="BODY")], max_length=8)
    assert data.ledger.sources[0].documents == 8


def test_what_the_account_refuses_is_named(session):
    with pytest.raises(DataError, match="no_such: .*does not exist or not authorized"):
        source(table_name="no_such").read("train")
    chats(session, "chats", 2)
    with pytest.raises(DataError, match="no column 'MESSAGE', found ID, CHAT"):
        source(table_name="chats", column_mapping={"MESSAGE": "messages"}).read("train")[0]


@pytest.mark.covers("data.sources.*.sql")
def test_a_query_reaches_the_package(session):
    """As far as it goes without an account, where a query takes a server."""
    with pytest.raises(NotImplementedError, match=r"Session\.sql is not supported"):
        source(sql="select * from chats").read("train")


@pytest.mark.covers("data.sources.*.dataset_uri")
def test_a_version_of_a_data_set_reaches_the_package(session):
    """As far as it goes without an account: its files are read by a server."""
    uri = "snow://dataset/db.schema.chats/versions/v1"
    assert faults(TABLE | {"table_name": None, "dataset_uri": uri}) == []
    assert source(dataset_uri=uri).label == uri
    with pytest.raises(NotImplementedError, match="semi structured PARQUET"):
        source(dataset_uri=uri).read("train")


def test_without_a_connection_the_run_says_where_to_write_one(session, tmp_path, monkeypatch):
    session.close()
    monkeypatch.setenv("SNOWFLAKE_HOME", str(tmp_path))
    with pytest.raises(RecipeError, match=r"no connection to Snowflake: .*connections\.toml"):
        source(table_name="chats").read("train")
