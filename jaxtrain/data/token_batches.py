"""Batches that are filled to a number of tokens (`data.batch_tokens`) instead of sequences.

All sequences of a step are padded to one of the plan's lengths, and each length has its own number
of sequences, so that a run has no more shapes than lengths.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from jaxtrain.data.plan import BatchPlan
from jaxtrain.recipe.errors import DataError


class Steps(NamedTuple):
    """The steps of an epoch, in their order."""

    sequences: np.ndarray
    """int64 [sequences of the epoch], step by step"""
    starts: np.ndarray
    """int64 [steps + 1]: where each begins among them, and the last one ends"""
    lengths: np.ndarray
    """int64 [steps]: number of T in the lengths of the plan"""

    @property
    def count(self) -> int:
        return len(self.lengths)

    def find(self, place: int) -> int:
        """Returns the number of the step that holds a place of the epoch."""
        return int(np.searchsorted(self.starts, place, side="right")) - 1


@dataclass(frozen=True, eq=False)
class TokenBatchPlan(BatchPlan):
    """Its `shape` is that of one sample per batch shard; a step has a multiple of it."""

    batch_tokens: int = 0
    """Padded tokens of a microbatch per batch shard, at most."""

    def __post_init__(self) -> None:
        if self.batch_tokens < (needed := self.lengths[-1] * self.together):
            raise DataError(
                f"data.batch_tokens: {self.batch_tokens} holds no sequence of {self.lengths[-1]} "
                f"tokens; write at least {needed}, or a smaller data.max_length"
            )

    @cached_property
    def step_sizes(self) -> np.ndarray:
        """int64 [lengths]: sequences of a full step of each length."""
        samples = self.batch_tokens // (self.together * np.asarray(self.lengths))
        return samples * self.shape.step_sequences

    @cached_property
    def _epoch(self) -> Callable[[int], Steps]:
        return lru_cache(maxsize=2)(self._cut_epoch)  # its end needs two

    def _cut_epoch(self, epoch: int) -> Steps:
        """Fills steps with sequences of one padded length, in the epoch's order, each given out
        when it is full. What fills none is padded to the next length, and in the end is a step."""
        places = np.arange(self.epoch_sequences // self.together)
        samples = self._find_sequences(epoch, places)
        fitting = np.searchsorted(self.lengths, self._sequence_lengths[samples].max(axis=1))
        steps: list[tuple[int, np.ndarray]] = []
        left = places[:0]
        for number, size in enumerate((self.step_sizes // self.together).tolist()):
            left = np.sort(np.concatenate([left, np.flatnonzero(fitting == number)]))
            full = len(left) // size * size
            steps += [(number, members) for members in left[:full].reshape(-1, size)]
            left = left[full:]
        if len(left):
            steps.append((int(fitting[left].max()), left))
        steps.sort(key=lambda step: step[1][-1])
        lengths, members = zip(*steps, strict=True)
        starts = np.cumsum([0, *(len(part) * self.together for part in members)])
        return Steps(samples[np.concatenate(members)].ravel(), starts, np.array(lengths))

    def _find_step(self, position: int) -> tuple[np.ndarray, int]:
        epoch, place = divmod(0 if self.first_only else position, self.epoch_sequences)
        steps = self._epoch(epoch)
        step = steps.find(place)
        length = int(steps.lengths[step])
        found = np.full(self.step_sizes[length], -1)
        members = steps.sequences[steps.starts[step] : steps.starts[step + 1]]
        found[: len(members)] = members
        return found.reshape(self.shape.microbatches, -1), self.lengths[length]

    def steps_left(self, position: int) -> int:
        epoch, place = divmod(position, self.epoch_sequences)
        steps = self._epoch(epoch)
        return steps.count - steps.find(place)

    def advance(self, position: int, steps: int = 1) -> int:
        epoch, place = divmod(position, self.epoch_sequences)
        step = self._epoch(epoch).find(place) + steps
        while step >= (count := self._epoch(epoch).count):
            epoch, step = epoch + 1, step - count
        return epoch * self.epoch_sequences + int(self._epoch(epoch).starts[step])

    def count_uneven_steps(self, epochs: int) -> int:
        if not self.draws:  # every epoch has the same lengths
            return 0
        steps = sum(self._epoch(epoch).count for epoch in range(epochs))
        return steps - epochs * self.steps_per_epoch

    def repeat(self, min_steps: int) -> "TokenBatchPlan":
        # Looking for them by the epochs' orders would take minutes where a set is small.
        samples = self._epoch(0).sequences.reshape(-1, self.together)
        lengths = np.searchsorted(self.lengths, self._sequence_lengths[samples].max(axis=1))
        counts = np.bincount(lengths, minlength=len(self.lengths)).tolist()
        sizes = (self.step_sizes // self.together).tolist()

        def count_steps(passes: int) -> int:
            steps = left = 0
            for size, count in zip(sizes, counts, strict=True):
                full, left = divmod(left + passes * count, size)
                steps += full
            return steps + (left > 0)

        enough = range(1, 2 + max(min_steps, 0) * sizes[0] // len(lengths))
        passes = 1 + bisect_left(enough, min_steps, key=count_steps)
        while (plan := replace(self, passes=passes)).steps_per_epoch < min_steps:
            passes += 1  # passes that draw anew have other lengths
        return plan

    @property
    def fill(self) -> float:
        """Of the first epoch."""
        steps = self._epoch(0)
        places = np.diff(steps.starts) * np.asarray(self.lengths)[steps.lengths]
        return float(self._sequence_lengths[steps.sequences].sum() / places.sum())
