"""Batches made ahead of the step. The position is the number of the update and nothing else."""

import sys
from collections.abc import Callable, Iterator

from jaxtrain.batch import Batch


def iterate(
    batch: Callable[[int], Batch], *, start: int = 0, stop: int | None = None, threads: int = 2
) -> Iterator[Batch]:
    """The batches of updates `start` to `stop`, without end when it is None. `threads` make them
    ahead, 0 makes each when it is asked for; the batches are the same."""
    # grain imports jax, which reading and checking data does without.
    import grain

    steps = grain.MapDataset.range(start, sys.maxsize if stop is None else stop)
    # Batches are large and made much faster than they are used: two a thread is plenty.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(steps.map(batch).to_iter_dataset(options))
