"""The output of a run: lines that stay and, on a terminal, a live one below them."""

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

TIMES = (
    "import", "data", "weights", "compile", "step", "wait", "evaluation", "sample", "save", "other",
)  # fmt: skip
"""What a process spends its time on."""
REDRAW_S = 0.25
BAR_WIDTH = 40


class Console:
    """Writes to the terminal, if this process `prints`, and hides `secrets`."""

    def __init__(self, *, prints: bool = True, secrets: Secrets | None = None):
        self.spent_s: dict[str, float] = {}
        """of `TIMES`, seconds of this process so far"""
        self._secrets, self._began = secrets or {}, time.perf_counter()
        self._console = RichConsole(quiet=not prints, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._redraw_at = 0.0

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
    def phase(self, name: str, what: str) -> Iterator[None]:
        """Shows what is being done and then how long it took, which counts as one of `TIMES`."""
        start = time.perf_counter()
        with self.timing(what):
            if self._console.is_terminal and self._live is None:
                with self._console.status(name):
                    yield
            else:
                yield
        seconds = time.perf_counter() - start
        self.line(f"{name}: {seconds:.1f} s" if seconds >= 0.05 else name)

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Counts the time of what is inside it, but for what is counted there already."""
        began_s = self.elapsed_s - sum(self.spent_s.values())
        yield
        taken_s = self.elapsed_s - sum(self.spent_s.values()) - began_s
        self.spent_s[what] = self.spent_s.get(what, 0.0) + taken_s

    @property
    def elapsed_s(self) -> float:
        """Since the process began, as far as its imports were counted."""
        return time.perf_counter() - self._began + self.spent_s.get("import", 0.0)

    def progress(self, row: dict[str, Any], total: int) -> None:
        """Prints the metrics row of a step, fitted to the terminal."""
        width = self._console.width if self._console.is_terminal else None
        self._console.print(Text(format_progress(row, total, width)))

    def tick(self, step: int, total: int, eta_s: float | None) -> None:
        """Moves the bar, if this is a terminal; redraws it no more often than `REDRAW_S`."""
        now = time.monotonic()
        if not self._console.is_terminal or now < self._redraw_at:
            return
        self._redraw_at = now + REDRAW_S
        size = max(min(BAR_WIDTH, self._console.width - 30), 1)
        done = int(size * step / max(total, 1))
        eta = "" if eta_s is None else f"  ETA {format_duration(eta_s)}"
        bar = Text.assemble(("━" * done, "green"), ("━" * (size - done), "dim"))
        bar.append(f" {step:,}/{total:,}{eta}")
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(bar, refresh=True)

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def format_progress(row: dict[str, Any], total: int, width: int | None = None) -> str:
    """One line; in a narrow terminal without what matters least. The step, the loss and the ETA
    stay."""
    step = f"step {row['iter']}/{total}"
    parts = [(0, step), (0, f"loss {row['loss']:.4f}"), (3, f"grad norm {row['grad_norm']:.3g}")]
    parts.append((2, f"lr {row['lr']:.2e}"))
    if row.get("tokens_per_sec"):
        parts.append((1, f"{row['tokens_per_sec']:,.0f} tokens/s"))
        parts.append((5, f"{row['trained_tokens_per_sec']:,.0f} trained/s"))
        parts.append((6, f"data wait {row['data_share']:.0%}"))
    if row.get("mfu") is not None:
        parts.append((4, f"MFU {row['mfu']:.1%}"))
    if row.get("eta") is not None:
        parts.append((0, f"ETA {format_duration(row['eta'])}"))
    for rank in range(6, 0, -1):
        if width is None or len("  ".join(text for _, text in parts)) <= width:
            break
        parts = [part for part in parts if part[0] != rank]
    return "  ".join(text for _, text in parts)


def format_times(spent_s: dict[str, float], elapsed_s: float) -> str:
    """Where so many seconds went, without what took none of them."""
    spent_s = {**spent_s, "other": elapsed_s - sum(spent_s.values())}
    shown = ((name, spent_s.get(name, 0.0)) for name in TIMES)
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in shown if seconds >= 0.05)


def format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
