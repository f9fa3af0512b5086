"""What became of every record: the counts to look at before trusting a run, and warnings of what
usually goes wrong."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import dataclasses

from jaxtrain.data.encode import OVERLONG, Dropped, Encoded
from jaxtrain.recipe.errors import pluralize

PERCENTILES = (50, 90, 99, 100)
FAULTY = "faulty"
SHOWN_FAULTS = 3
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
    systems_hidden: int = 0
    """Documents whose system text the template leaves out."""
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
        self.systems_hidden += outcome.hides_system

    def lines(self) -> list[str]:
        records, documents = pluralize(self.rows, "record"), pluralize(self.documents, "document")
        cut = f", {self.truncated:,} truncated" if self.truncated else ""
        lines = [f"{self.label}: {records} read, {documents}{cut}"]
        lines += [f"  dropped {count:,}: {reason}" for reason, count in self.dropped.most_common()]
        lines += [f"    {message}" for message in self.faults]
        if not self.documents:
            return lines
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
        if self.systems_hidden:
            yield (
                f"{label}: the chat template leaves the system text out of {self.systems_hidden} "
                f"of {self.documents} documents; set tokenizer.chat_template to one that shows it"
            )
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


def format_range(lengths: Sequence[int]) -> str:
    """Writes one length, or the first and the last of several."""
    return " to ".join(f"{length:,}" for length in dict.fromkeys((lengths[0], lengths[-1])))


def _format_tokens(tokens: int, trained: int) -> str:
    return f"{tokens:,} tokens, {trained:,} trained ({trained / max(tokens, 1):.1%})"
