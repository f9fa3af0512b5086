"""What became of every row: the counts that a person looks at before trusting a run."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import dataclasses

from jaxtrain.data.encode import Dropped, Encoded
from jaxtrain.data.plan import BatchPlan

PERCENTILES = (50, 90, 99, 100)
FAULTY = "faulty"
SHOWN_FAULTS = 3


@dataclasses.dataclass
class SourceCounts:
    """One source, before rows are packed; also made of what `vars` of one is in JSON."""

    label: str
    rows: int = 0
    """Rows read."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason → rows."""
    truncated: int = 0
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    turns: int = 0
    """Assistant turns that are trained."""
    ended_turns: int = 0
    """Those of them whose end-of-turn token is trained."""
    systems_hidden: int = 0
    """Documents without the text of the system, which the template leaves out."""
    lengths: tuple[int, ...] = ()
    """Tokens of a document at PERCENTILES."""
    faults: list[str] = field(default_factory=list)
    """The first of the rows that were skipped as faulty, and what is wrong with them."""

    def add_fault(self, what: str) -> None:
        self.rows += 1
        self.dropped[FAULTY] += 1
        if len(self.faults) < SHOWN_FAULTS:
            self.faults.append(what)

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
        rows, documents = _count(self.rows, "row"), _count(self.documents, "document")
        cut = f", {self.truncated} truncated" if self.truncated else ""
        lines = [f"{self.label}: {rows} read, {documents}{cut}"]
        lines += [f"  dropped {count}: {reason}" for reason, count in self.dropped.most_common()]
        lines += [f"    {what}" for what in self.faults]
        if not self.documents:
            return lines
        lines.append(f"  {_tokens(self.tokens, self.trained_tokens)}")
        steps = (f"{value} at {p}%" for p, value in zip(PERCENTILES, self.lengths, strict=True))
        lines.append(f"  document lengths: {', '.join(steps)}")
        if self.turns:
            share = self.ended_turns / self.turns
            lines.append(f"  end of turn trained in {share:.1%} of {self.turns} assistant turns")
        return lines


@dataclass(frozen=True)
class SetCounts:
    """One set of rows that is trained or evaluated on."""

    label: str
    documents: int
    tokens: int
    trained_tokens: int
    rows: int
    lengths: tuple[int, ...]
    """Tokens that a row of a batch may have."""
    fill: float
    """Share of the rows' tokens that is no padding."""
    steps: int
    """Updates of an epoch, or batches of one evaluation."""

    @classmethod
    def of(cls, label: str, plan: BatchPlan) -> "SetCounts":
        return cls(
            label=label,
            documents=len(np.unique(plan.rows.documents)),
            tokens=int(plan.rows.lengths.sum()),
            trained_tokens=plan.trained_tokens,
            rows=plan.rows.num_rows,
            lengths=plan.lengths,
            fill=plan.fill,
            steps=plan.steps_per_epoch,
        )

    def lines(self) -> list[str]:
        return [
            f"{self.label}: {_count(self.documents, 'document')} in {_count(self.rows, 'row')} of "
            f"{span(self.lengths)} tokens, filled {self.fill:.1%}; {_count(self.steps, 'step')}",
            f"  {_tokens(self.tokens, self.trained_tokens)}",
        ]


@dataclass(frozen=True)
class Ledger:
    sources: tuple[SourceCounts, ...]
    sets: tuple[SetCounts, ...]
    notes: tuple[str, ...] = ()
    """Whether prepared rows were found, and why not."""
    warnings: tuple[str, ...] = ()

    def joined(self, other: "Ledger") -> "Ledger":
        """Of the sources of both, before their sets are known."""
        return Ledger(self.sources + other.sources, (), self.notes + other.notes)

    def lines(self) -> list[str]:
        """For the log: what was read, then what came of it."""
        counted = [line for part in (*self.sources, *self.sets) for line in part.lines()]
        return [*counted, *self.notes, *(f"warning: {text}" for text in self.warnings)]


def length_percentiles(lengths: np.ndarray) -> tuple[int, ...]:
    if not len(lengths):
        return ()
    return tuple(int(v) for v in np.percentile(lengths, PERCENTILES, method="higher"))


def span(lengths: Sequence[int]) -> str:
    """The one, or the first and the last."""
    return " to ".join(f"{length:,}" for length in dict.fromkeys((lengths[0], lengths[-1])))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _tokens(tokens: int, trained: int) -> str:
    return f"{tokens} tokens, {trained} trained ({trained / max(tokens, 1):.1%})"
