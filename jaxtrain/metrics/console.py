"""The output of a run: one live line on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from jaxtrain.metrics.log import screen
from jaxtrain.recipe.errors import printable
from jaxtrain.recipe.load import Secrets
from jaxtrain.recipe.secrets import hide_secrets


class Console:
    """Writes to the terminal, if this process `prints`, and hides `secrets`."""

    def __init__(self, *, prints: bool = True, secrets: Secrets | None = None):
        self._secrets = secrets or {}
        self._console = RichConsole(quiet=not prints, highlight=False, soft_wrap=True)
        self._live: Live | None = None

    def header(self, facts: dict[str, str]) -> None:
        width = max(map(len, facts))
        for name, fact in facts.items():
            fact = hide_secrets(fact, self._secrets)
            screen.info("%s: %s", name, fact)
            first, *more = fact.splitlines()
            self._console.print(Text.assemble((name.ljust(width), "bold"), "  ", first))
            for line in more:
                self._console.print(Text(" " * (width + 2) + line))

    def line(self, text: str) -> None:
        """Prints a line that stays, above the live one, and logs it."""
        text = printable(hide_secrets(text, self._secrets))
        screen.info(text)
        self._console.print(Text(text))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows what is being done and then how long it took."""
        start = time.perf_counter()
        if self._console.is_terminal and self._live is None:
            with self._console.status(name):
                yield
        else:
            yield
        self.line(f"{name}: {time.perf_counter() - start:.1f} s")

    def progress(self, row: dict[str, Any], total: int) -> None:
        """Shows a step, in place of the one before if the terminal can."""
        text = Text(format_progress(row, total))
        if not self._console.is_terminal:
            self._console.print(text)
            return
        if self._live is None:
            self._live = Live(text, console=self._console, refresh_per_second=8)
            self._live.start()
        done = int(24 * row["iter"] / max(total, 1))
        bar = Text.assemble(("━" * done, "green"), ("━" * (24 - done), "dim"), " ")
        self._live.update(Text.assemble(bar, text))

    def close(self) -> None:
        """Stops the live line and leaves it on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def format_progress(row: dict[str, Any], total: int) -> str:
    parts = [
        f"step {row['iter']}/{total}",
        f"loss {row['loss']:.4f}",
        f"grad norm {row['grad_norm']:.3g}",
        f"lr {row['lr']:.2e}",
    ]
    if row.get("tokens_per_sec"):
        parts.append(f"{row['tokens_per_sec']:,.0f} tokens/s")
        parts.append(f"{row['trained_tokens_per_sec']:,.0f} trained/s")
        parts.append(f"data wait {row['data_share']:.0%}")
    if row.get("mfu") is not None:
        parts.append(f"MFU {row['mfu']:.1%}")
    if row.get("eta") is not None:
        parts.append(f"ETA {format_duration(row['eta'])}")
    return "  ".join(parts)


def format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
