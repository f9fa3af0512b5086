"""How often each source is seen in an epoch."""

from collections.abc import Sequence

import numpy as np

from jaxtrain.data.order import permutation
from jaxtrain.recipe.errors import DataError

MIXTURE = 4  # keeps this draw apart from other orders under the same seed


def mixed_documents(
    chosen: np.ndarray, sources: np.ndarray, weights: Sequence[float | None], seed: int
) -> np.ndarray:
    """Numbers of the documents of an epoch: as many as in `chosen`, each source cut or repeated to
    its share. `sources[d]` is the source of document d; weights of None leave `chosen` as it is.

    A source that is repeated is taken whole as often as it fits, and the rest is drawn."""
    shares = [weight for weight in weights if weight is not None]
    if not shares:
        return chosen
    passes: dict[int, list[np.ndarray]] = {}
    for number, count in enumerate(_counts(len(chosen), shares)):
        own = chosen[sources[chosen] == number]
        if not len(own):
            raise DataError(f"source {number} has a weight, and no document is left of it")
        whole, rest = divmod(count, len(own))
        drawn = np.sort(permutation(len(own), MIXTURE, seed, number)[:rest])
        for turn, taken in enumerate([*[own] * whole, own[drawn]]):
            passes.setdefault(turn, []).append(taken)
    # Pass by pass, so that copies of a document do not stand beside one another.
    return np.concatenate([taken for turn in sorted(passes) for taken in passes[turn]])


def _counts(total: int, shares: Sequence[float]) -> list[int]:
    """`total` divided by `shares`; what rounding leaves goes to the largest remainders."""
    exact = np.array(shares) / sum(shares) * total
    counts = np.floor(exact).astype(int)
    for number in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[number] += 1
    return counts.tolist()
