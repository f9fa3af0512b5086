"""Documents kept back for evaluation."""

import numpy as np

from jaxtrain.data.order import keyed
from jaxtrain.recipe.errors import DataError

SPLIT = 3  # keeps this draw apart from other orders under the same seed


def split_by_content(digests: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rising document numbers for training and for evaluation, `share` of them in the second.

    Equal documents go to the same side, so the share is met to within one group of equals."""
    groups, members, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    if len(groups) < 2:
        raise DataError(
            f"train_eval_split needs two different documents, found {len(groups)} in {len(digests)}"
        )
    order = np.argsort(keyed(groups, SPLIT, seed), kind="stable")
    # The cut whose number of documents is nearest to the share, with something on either side.
    totals = np.cumsum(sizes[order])
    cut = int(np.argmin(np.abs(totals[:-1] - share * len(digests)))) + 1
    is_held_out = np.zeros(len(groups), dtype=bool)
    is_held_out[order[:cut]] = True
    held_out = is_held_out[members]
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
