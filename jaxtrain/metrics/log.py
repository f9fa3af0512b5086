"""The log of a process: a file with everything, and warnings on the terminal."""

import logging
import os
from pathlib import Path

log = logging.getLogger("jaxtrain")
screen = logging.getLogger("jaxtrain.screen")
"""What the console has shown already; it goes into the file alone."""
LEVEL_VARIABLES = ("JAXTRAIN_LOG_LEVEL", "AT_LOG_LEVEL")


def open_log(folder: Path, *, process: int, level: str | None) -> None:
    """Write `folder/logs/rank_N.log`; the terminal gets what is at `level` or above.

    An environment variable goes before the recipe's level; WARNING when neither is written.
    """
    close_log()
    written = next((os.environ[name] for name in LEVEL_VARIABLES if os.environ.get(name)), level)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / "logs" / f"rank_{process}.log", encoding="utf-8")
    terminal = logging.StreamHandler()
    terminal.setLevel((written or "WARNING").upper())
    terminal.addFilter(lambda record: record.name != screen.name)
    for handler in (file, terminal):
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
    log.setLevel(min(logging.INFO, terminal.level))
    log.propagate = False


def close_log() -> None:
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
