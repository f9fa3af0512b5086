"""Errors that a user can act on: one line per fault, an exit code, no traceback."""

import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that write over a terminal, turn the direction of the text after them, or are halves
that cannot be written out."""
MAX_FOUND = 60  # characters of a found value that a message shows


class UserError(ValueError):
    """A fault in the recipe, the data or the machine, which is printed without a traceback."""

    exit_code = 1


class Place(NamedTuple):
    """The file and line of a value."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


class Fault(NamedTuple):
    """One fault of a recipe; `key` is dotted, with list positions from 0."""

    key: str
    what: str
    place: Place | None = None

    def __str__(self) -> str:
        return ": ".join(str(part) for part in (self.place, self.key, self.what) if part)


class RecipeError(UserError):
    """Every fault of a recipe, or of what it names."""

    exit_code = 2

    def __init__(self, faults: str | Iterable[Fault], *, recipe: Path | None = None):
        if isinstance(faults, str):
            faults = [Fault("", faults)]
        self.faults = tuple(sorted(faults, key=lambda fault: fault.place or Place("", 0)))
        lines = [str(fault) for fault in self.faults]
        if recipe is not None:
            lines.append(f"{pluralize(len(lines), 'error')} in {recipe.name}; nothing was started")
        super().__init__("\n".join(lines))


class WeightError(RecipeError):
    """A model folder that cannot be read or does not match its config."""


class DataError(UserError):
    """A record, file or data set that cannot be trained on."""

    exit_code = 3


class OutOfMemoryError(UserError):
    """The memory of the devices or of the machine does not suffice."""

    exit_code = 4


class NonFiniteError(UserError):
    """The loss or the gradient norm is not finite, or the loss diverges."""

    exit_code = 5


class ReplicaError(UserError):
    """Devices hold different copies of what is one array."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read or trusted."""


class AbortedError(UserError):
    """The run was ended early, and nothing was saved."""


class PreemptedError(UserError):
    """A signal ended the run early. Its full state is saved; the same command resumes it."""

    exit_code = 75


def show(value: Any) -> str:
    """A found value, formatted and shortened for a message."""
    if value is None or isinstance(value, bool):  # as YAML and JSON write them
        return "null" if value is None else str(value).lower()
    try:
        text = str(value) if isinstance(value, int | float) else repr(value)
    except ValueError:  # Python writes out no integer of so many digits
        text = "a number that is too large to show"
    return text if len(text) <= MAX_FOUND else text[: MAX_FOUND - 1] + "…"


def printable(text: str) -> str:
    """`text` with control characters escaped, for terminals and pages."""
    escape = lambda code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    return CONTROL.sub(lambda found: escape(ord(found[0])), text)


def pluralize(number: int, what: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def did_you_mean(found: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean …?` with up to three similar names, or nothing."""
    near = difflib.get_close_matches(found, list(known), n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else ""


def nearest_multiples(value: int, step: int) -> str:
    """The nearest multiples of `step` below and above `value`."""
    below, above = value // step * step, -(-value // step) * step
    return f"{below} or {above}" if below else str(above)


def nearest_divisors(value: int, of: int) -> str:
    """The nearest divisors of a number below and above `value`."""
    small = [n for n in range(1, min(math.isqrt(of), 10**6) + 1) if of % n == 0]
    divisors = sorted({*small, *(of // n for n in small)})
    below = [n for n in divisors if n < value][-1:]
    return " or ".join(map(str, [*below, *[n for n in divisors if n > value][:1]]))
