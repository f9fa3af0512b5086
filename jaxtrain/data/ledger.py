"""What became of every record: the counts to look at before trusting a run, and warnings of what
usually goes wrong."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import dataclasses

from jaxtrain.data.encode import CONTROL_TOKENS, EMPTY_REPLY, OVERLONG, Dropped, Encoded
from jaxtrain.data.spans import HIDDEN_SYSTEM, HIDDEN_THOUGHTS
from jaxtrain.recipe.errors import pluralize

PERCENTILES = (50, 90, 99, 100)
FAULTY = "faulty"
SHOWN_FAULTS = 3
SHOWN_NAMES = 12
TOLD = {
    HIDDEN_THOUGHTS: "documents whose earlier replies lose their thoughts by the chat template",
    EMPTY_REPLY: "documents with an empty reply, which is not trained",
}
"""Note → what the counts say after the number of documents."""
WARNED = {
    HIDDEN_SYSTEM: (
        "the chat template leaves the system text out of {}; set tokenizer.chat_template to one "
        "that shows it"
    ),
    CONTROL_TOKENS: (
        "special tokens are written in the text of {} and become control tokens; "
        "data.split_special_tokens: true keeps them text"
    ),
}
"""Note → the warning, with a place for the number of documents."""
MAX_LOST_SHARE = 0.1
MIN_TRAINED_SHARE = 0.02
MIN_FILL = 0.5


@dataclasses.dataclass
class SourceCounts:
    """Counts of one source before packing; the cache keeps its `vars` as JSON."""

    label: str
    rows: int = 0
    """Records read."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason → records."""
    truncated: int = 0
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    turns: int = 0
    """Trained assistant turns."""
    ended_turns: int = 0
    """Trained turns whose end-of-turn token is trained too."""
    notes: Counter[str] = field(default_factory=Counter)
    """Note of an encoder → documents."""
    unread: Counter[str] = field(default_factory=Counter)
    """Column, field of a turn or argument of the template that nothing reads → records."""
    lengths: tuple[int, ...] = ()
    """Tokens per document at PERCENTILES."""
    faults: list[str] = field(default_factory=list)
    """The first records that were skipped as faulty, with what is wrong with them."""

    def add_fault(self, message: str) -> None:
        self.rows += 1
        self.dropped[FAULTY] += 1
        if len(self.faults) < SHOWN_FAULTS:
            self.faults.append(message)

    def add(self, outcome: Encoded | Dropped) -> None:
        self.rows += 1
        if isinstance(outcome, Dropped):
            self.dropped[outcome.reason] += 1
            return
        self.documents += 1
        self.tokens += len(outcome.tokens)
        self.trained_tokens += int(np.count_nonzero(outcome.weights))
        self.truncated += outcome.truncated
        self.turns += outcome.turns
        self.ended_turns += outcome.ended
        self.notes.update(outcome.notes)
        self.unread.update(outcome.unread)

    def lines(self) -> list[str]:
        records, documents = pluralize(self.rows, "record"), pluralize(self.documents, "document")
        cut = f", {self.truncated:,} truncated" if self.truncated else ""
        lines = [f"{self.label}: {records} read, {documents}{cut}"]
        lines += [f"  dropped {count:,}: {reason}" for reason, count in self.dropped.most_common()]
        lines += [f"    {message}" for message in self.faults]
        if self.unread:
            names = ", ".join(f"{name} ({n:,})" for name, n in self.unread.most_common(SHOWN_NAMES))
            more = len(self.unread) - SHOWN_NAMES
            lines.append(f"  not read: {names}" + (f" and {more:,} more" if more > 0 else ""))
        if not self.documents:
            return lines
        told = ((self.notes[note], text) for note, text in TOLD.items())
        lines += [f"  {count:,} {text}" for count, text in told if count]
        lines.append(f"  {_format_tokens(self.tokens, self.trained_tokens)}")
        steps = (f"{value} at {p}%" for p, value in zip(PERCENTILES, self.lengths, strict=True))
        lines.append(f"  document lengths: {', '.join(steps)}")
        if self.turns:
            share = self.ended_turns / self.turns
            lines.append(f"  end of turn trained in {share:.1%} of {self.turns:,} assistant turns")
        return lines

    def warnings(self) -> Iterator[str]:
        label, records = self.label, max(self.rows, 1)
        overlong = self.dropped.get(OVERLONG, 0)
        if overlong > MAX_LOST_SHARE * records:
            yield (
                f"{label}: {overlong / records:.0%} of the records are longer than max_length and "
                f"dropped; raise data.max_length, or set data.overlong: truncate"
            )
        if self.truncated > MAX_LOST_SHARE * records:
            yield (
                f"{label}: {self.truncated / records:.0%} of the records lose their end to "
                f"truncation; raise data.max_length"
            )
        if self.documents == 0:
            yield f"{label}: none of its {self.rows} records is trained"
        elif self.trained_tokens < MIN_TRAINED_SHARE * self.tokens:
            share = self.trained_tokens / self.tokens
            yield f"{label}: only {share:.1%} of the tokens are trained"
        for note, text in WARNED.items():
            if count := self.notes[note]:
                yield f"{label}: {text.format(f'{count} of {self.documents} documents')}"
        if self.turns and self.ended_turns == 0:
            yield (
                f"{label}: no turn ends in a special token, so the model may never stop; use a "
                f"chat template that ends turns"
            )


@dataclass(frozen=True)
class SetCounts:
    """Counts of one packed set, for training or for evaluation."""

    label: str
    documents: int
    tokens: int
    trained_tokens: int
    sequences: int
    lengths: tuple[int, ...]
    """Tokens that a sequence of a batch may have."""
    fill: float
    """Fraction of the sequences' tokens that is not padding."""
    steps: int
    """Steps of an epoch, or batches of one evaluation."""

    def lines(self) -> list[str]:
        documents = pluralize(self.documents, "document")
        sequences, steps = pluralize(self.sequences, "sequence"), pluralize(self.steps, "step")
        return [
            f"{self.label}: {documents} in {sequences} of {format_range(self.lengths)} tokens, "
            f"filled {self.fill:.1%}; {steps}",
            f"  {_format_tokens(self.tokens, self.trained_tokens)}",
        ]

    def warnings(self) -> Iterator[str]:
        if self.documents == self.sequences and self.fill < MIN_FILL:
            yield (
                f"{self.label}: sequences are {self.fill:.0%} full, the rest is padding; "
                f"data.pack_samples: true packs several documents into a sequence"
            )


@dataclass(frozen=True)
class Ledger:
    sources: tuple[SourceCounts, ...]
    sets: tuple[SetCounts, ...]
    notes: tuple[str, ...] = ()
    """Whether prepared documents were found, and why not."""
    warnings: tuple[str, ...] = ()

    def merge(self, other: "Ledger") -> "Ledger":
        """Returns a ledger of the sources of both, before their sets are known."""
        return Ledger(self.sources + other.sources, (), self.notes + other.notes)

    def lines(self) -> list[str]:
        """Returns lines for the log: what was read, then what became of it."""
        counted = [line for part in (*self.sources, *self.sets) for line in part.lines()]
        return [*counted, *self.notes, *(f"warning: {text}" for text in self.warnings)]


def compute_percentiles(lengths: np.ndarray) -> tuple[int, ...]:
    if not len(lengths):
        return ()
    return tuple(int(v) for v in np.percentile(lengths, PERCENTILES, method="higher"))


def describe_drops(counts: Sequence[SourceCounts]) -> str:
    return "; ".join(
        f"{count.label}: {count.rows} records read, "
        + ", ".join(f"{number} dropped as {reason}" for reason, number in count.dropped.items())
        for count in counts
    )


def format_range(lengths: Sequence[int]) -> str:
    """Writes one length, or the first and the last of several."""
    return " to ".join(f"{length:,}" for length in dict.fromkeys((lengths[0], lengths[-1])))


def _format_tokens(tokens: int, trained: int) -> str:
    return f"{tokens:,} tokens, {trained:,} trained ({trained / max(tokens, 1):.1%})"
