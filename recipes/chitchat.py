"""Chats of the wheel `chitchat-dataset` as conversations; recipes name this under `code:`."""

import json
from itertools import groupby
from pathlib import Path

from jaxtrain import DataSource, assets
from jaxtrain.recipe.data import DataSourceConfig

SYSTEM = "You are a friendly person who likes to chat."
FEWEST_TURNS = 6


class ChitchatConfig(DataSourceConfig):
    path: str
    """`dataset.json` of the wheel: a file, or an asset `pypi:...`."""


class ChitchatSource(DataSource):
    name = "chitchat"
    config: ChitchatConfig

    def load(self, config: ChitchatConfig, split: str) -> list[dict]:
        path = assets.fetch(config.path) if assets.is_asset(config.path) else Path(config.path)
        chats = json.loads(path.read_text(encoding="utf-8")).values()
        conversations = [conversation(chat["messages"]) for chat in chats]
        system = {"role": "system", "content": SYSTEM}
        return [{"messages": [system, *c]} for c in conversations if len(c) >= FEWEST_TURNS]


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
