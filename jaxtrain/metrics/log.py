"""The log of a process: everything in a file, and warnings on the terminal."""

import logging
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxtrain.recipe.load import Secrets
from jaxtrain.recipe.logger import LoggerConfig, is_among
from jaxtrain.recipe.secrets import hide_secrets

log = logging.getLogger("jaxtrain")
screen = logging.getLogger("jaxtrain.screen")
"""Logs what the console has shown already, to the file alone."""


class _SecretsFormatter(logging.Formatter):
    """Hides values that came from the environment."""

    def __init__(self, secrets: Secrets):
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self.secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        return hide_secrets(super().format(record), self.secrets)


class _File(logging.FileHandler):
    """Ends, and says so once, when its file cannot be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        log.removeHandler(self)
        log.warning("%s: %s; what follows is not logged", self.baseFilename, error.strerror)
        with suppress(OSError):  # the line is still in its buffer
            self.close()


class _Terminal(logging.StreamHandler):
    """Writes to what `sys.stderr` is now: a live line puts itself in its place."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, stream: Any) -> None: ...


def open_log(
    folder: Path, logger: LoggerConfig, *, process: int, secrets: Secrets | None = None
) -> None:
    """Logs to `folder/logs/rank_N.log`, and at the recipe's level to the terminal, in the processes
    that the recipe names."""
    close_log()
    _, level = logger.find_level()
    handlers: list[logging.Handler] = []
    if is_among(process, logger.file_output_ranks):
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        file = folder / "logs" / f"rank_{process}.log"
        handlers.append(_File(file, encoding="utf-8"))
    if is_among(process, logger.print_output_ranks):
        terminal = _Terminal()
        terminal.setLevel(level)
        terminal.addFilter(lambda record: record.name != screen.name)
        handlers.append(terminal)
    for handler in handlers:
        handler.setFormatter(_SecretsFormatter(secrets or {}))
        log.addHandler(handler)
    log.setLevel(min(logging.INFO, logging.getLevelNamesMapping()[level]))
    log.propagate = False


def close_log() -> None:
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
