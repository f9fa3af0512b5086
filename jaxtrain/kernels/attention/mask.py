"""Who may look at whom, and how scores are scaled: what every implementation shares."""

from typing import NamedTuple

from jax import Array


class TokenPositions(NamedTuple):
    """Where each token of a row stands."""

    segments: Array
    """int32 [B, T]: the document, counted from 1; 0 is padding"""
    positions: Array
    """int32 [B, T]: place inside the document"""


def score_scale(q: Array) -> float:
    return q.shape[-1] ** -0.5


def sees(q_places: TokenPositions, kv_places: TokenPositions, window: int | None) -> Array:
    """Bool [B, T, S]: the definition of what a query sees. All false for a padding query."""
    q_segments, kv_segments = q_places.segments[:, :, None], kv_places.segments[:, None, :]
    distance = q_places.positions[:, :, None] - kv_places.positions[:, None, :]
    seen = (q_segments == kv_segments) & (q_segments != 0) & (distance >= 0)
    return seen if window is None else seen & (distance < window)
