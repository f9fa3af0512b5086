"""Chats of the wheel `chitchat-dataset` as conversations; recipes name this under `code:`."""

import json
from itertools import groupby
from pathlib import Path

from jaxtrain import DataSource, assets
from jaxtrain.data import Records
from jaxtrain.recipe.data import DataSourceConfig

SYSTEM = {"role": "system", "content": "You are a friendly person who likes to chat."}
FEWEST_TURNS = 6


class ChitchatConfig(DataSourceConfig):
    path: str
    """`dataset.json` of the wheel, as a file or an asset."""


class ChitchatSource(DataSource):
    name = "chitchat"
    config: ChitchatConfig

    def load(self, config: ChitchatConfig, split: str) -> Records:
        path = assets.fetch(config.path) if assets.is_asset(config.path) else Path(config.path)
        spoken = [conversation(c["messages"]) for c in json.loads(path.read_bytes()).values()]
        rows = [{"messages": [SYSTEM, *turns]} for turns in spoken if len(turns) >= FEWEST_TURNS]
        return self.only_split(rows, split)


def conversation(turns: list[list[dict[str, str]]]) -> list[dict[str, str]]:
    """The first to write is the user; what one person writes in a row is one turn."""
    said = [message for turn in turns for message in turn]
    return [
        {
            "role": "user" if sender == said[0]["sender"] else "assistant",
            "content": " ".join(message["text"] for message in messages),
        }
        for sender, messages in groupby(said, key=lambda message: message["sender"])
    ]
