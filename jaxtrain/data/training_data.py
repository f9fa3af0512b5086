"""All batches of a run."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from jaxtrain.batch import Batch
from jaxtrain.data.ledger import Ledger
from jaxtrain.data.plan import BatchPlan


@dataclass(frozen=True, eq=False)
class TrainingData:
    """All batches of a run, for training and for each evaluation set."""

    train: BatchPlan
    evals: Mapping[str, BatchPlan]
    """Name of the set → its batches; the one set of a plain list is `eval`."""
    ledger: Ledger
    threads: int

    @property
    def row_tokens(self) -> int:
        """T of the longest batches."""
        return self.train.row_tokens

    @property
    def steps_per_epoch(self) -> int:
        return self.train.steps_per_epoch

    @property
    def train_rows(self) -> int:
        """Of an epoch."""
        return self.train.rows.num_sequences * self.train.passes

    @property
    def eval_rows(self) -> int:
        """Of all evaluation sets."""
        return sum(plan.rows.num_sequences for plan in self.evals.values())

    @property
    def trained_share(self) -> float:
        """Of the training tokens, those that have a weight."""
        return self.ledger.sets[0].trained_tokens / self.ledger.sets[0].tokens

    def repeated(self, *, min_updates: int, first_only: bool) -> "TrainingData":
        """The same with longer epochs, of at least so many updates, or with one update for ever."""
        train = replace(self.train.repeated(min_updates), first_only=first_only)
        return replace(self, train=train)

    def train_batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """This process's batches from update `start` on, over as many epochs as are asked for."""
        return iterate(self.train.batch, start=start, stop=stop, threads=self.threads)

    def eval_batches(self, name: str = "eval") -> Iterator[Batch]:
        """Every row of the set once, in order."""
        return self.batches_of(self.evals[name])

    def batches_of(self, plan: BatchPlan) -> Iterator[Batch]:
        """Every row of an evaluation set, planned in this way, once, in order."""
        return iterate(plan.batch, stop=plan.steps_per_epoch, threads=self.threads)


def iterate(
    batch: Callable[[int], Batch], *, start: int = 0, stop: int | None = None, threads: int = 2
) -> Iterator[Batch]:
    """The batches of updates `start` to `stop`, without end when it is None: the number of the
    update is all the position there is. `threads` make them ahead, 0 makes each when asked for."""
    # grain imports jax, which reading and checking data does without.
    import grain

    steps = grain.MapDataset.range(start, sys.maxsize if stop is None else stop)
    # Batches are large and made much faster than they are used: two a thread is plenty.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(steps.map(batch).to_iter_dataset(options))
