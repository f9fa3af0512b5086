"""Orders, draws, splits and mixtures of documents that depend on their keys alone, never on a
library's version, a machine or earlier state."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxtrain.recipe.errors import DataError

SPLIT, MIXTURE = 3, 4  # keep these draws apart from other orders under the same seed
GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def mix_bits(values: np.ndarray) -> np.ndarray:
    """Applies splitmix64's finalizer to uint64 values, a bijection whose output looks random."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_with_keys(values: np.ndarray, *keys: int) -> np.ndarray:
    """Hashes each of `values` (uint64) under integer keys."""
    for key in keys:
        shift = np.array([(key * GOLDEN + GOLDEN) & MASK], dtype=np.uint64)
        values = mix_bits(values + mix_bits(shift))
    return values


def permutation(count: int, *keys: int) -> np.ndarray:
    """Returns a random order of `count` things, int64 [count], as no numpy release may change."""
    return np.argsort(hash_with_keys(np.arange(count, dtype=np.uint64), *keys), kind="stable")


def sample(count: int, size: int, *keys: int) -> np.ndarray:
    """Draws `size` of `count` numbers, in rising order, so that files are read front to back."""
    return np.sort(permutation(count, *keys)[:size])


def split_by_content(digests: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the documents to train on and those to evaluate on, `share` of them, both rising.

    Equal documents go to the same side, so the share is met to within one group of equals."""
    groups, members, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    if len(groups) < 2:
        raise DataError(
            f"data.train_eval_split: needs two different documents, found {len(groups)} in "
            f"{len(digests)}"
        )
    order = np.argsort(hash_with_keys(groups, SPLIT, seed), kind="stable")
    # Cut where the number of documents is nearest to the share, with something on either side.
    totals = np.cumsum(sizes[order])
    cut = int(np.argmin(np.abs(totals[:-1] - share * len(digests)))) + 1
    is_held_out = np.zeros(len(groups), dtype=bool)
    is_held_out[order[:cut]] = True
    held_out = is_held_out[members]
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


class Mixture(NamedTuple):
    """The documents of an epoch of weighted sources."""

    whole: np.ndarray
    """Documents of every epoch; a repeated source is in it as often as it fits."""
    drawn: list[tuple[np.ndarray, int]]
    """Documents of a source, and how many of them each epoch draws anew."""


def mix_sources(
    chosen: np.ndarray, sources: np.ndarray, weights: Sequence[float | None]
) -> Mixture:
    """Returns the documents of an epoch: as many as in `chosen`, each source cut or repeated to its
    share. `sources[d]` is the source of document d; weights of None leave `chosen` as it is."""
    shares = [weight for weight in weights if weight is not None]
    if not shares:
        return Mixture(chosen, [])
    passes: dict[int, list[np.ndarray]] = {}
    drawn = []
    for number, count in enumerate(apportion(len(chosen), shares)):
        own = chosen[sources[chosen] == number]
        if not len(own):
            raise DataError(f"source {number} has a weight, but none of its documents is left")
        whole, rest = divmod(count, len(own))
        drawn += [(own, rest)] if rest else []
        for turn in range(whole):
            passes.setdefault(turn, []).append(own)
    # Pass by pass, so that copies of a document are not neighbours.
    copies = [taken for turn in sorted(passes) for taken in passes[turn]]
    return Mixture(np.concatenate(copies) if copies else chosen[:0], drawn)


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Divides `total` by `shares`; the largest remainders get what rounding leaves."""
    exact = np.array(shares) / sum(shares) * total
    counts = np.floor(exact).astype(int)
    for number in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[number] += 1
    return counts.tolist()
