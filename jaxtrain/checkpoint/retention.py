"""Which checkpoints are best, and which stay."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

Mode = Literal["min", "max"]


def ranked(steps: Sequence[int], scores: Mapping[int, float], mode: Mode) -> list[int]:
    """The steps that have a score, best first. Of equal scores the earlier step is better; NaN is
    no score; 0.0 is one."""
    sign = 1 if mode == "min" else -1
    scored = [step for step in steps if not math.isnan(scores.get(step, math.nan))]
    return sorted(scored, key=lambda step: (sign * scores[step], step))


def retained(
    steps: Sequence[int],
    scores: Mapping[int, float],
    *,
    keep_last_n: int | None,
    keep_best_n: int,
    keep_every_n_steps: int,
    mode: Mode,
) -> set[int]:
    """The union of the newest, the best and every n-th of these steps; all of them when
    `keep_last_n` is None."""
    if keep_last_n is None:
        return set(steps)
    every = [step for step in steps if keep_every_n_steps and step % keep_every_n_steps == 0]
    return {*sorted(steps)[-keep_last_n:], *ranked(steps, scores, mode)[:keep_best_n], *every}
