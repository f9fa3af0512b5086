"""Batches for tests of the model; needs no torch."""

import numpy as np

from jaxtrain.batch import Batch


def batch_of(tokens: np.ndarray, segments: np.ndarray | None = None) -> Batch:
    """One document a row, or those of `segments`."""
    segments = np.ones_like(tokens) if segments is None else segments
    starts = np.diff(segments, axis=1, prepend=0) != 0
    index = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    weights = np.where(starts | (segments == 0), 0, 1).astype(np.float32)
    return Batch(
        tokens.astype(np.int32),
        positions.astype(np.int32),
        segments.astype(np.int32),
        weights,
        np.arange(len(tokens), dtype=np.int32),
    )


def random_tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 96, (rows, length)).astype(np.int32)
