"""The attention mask and what scores are, shared by all implementations."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class TokenPositions(NamedTuple):
    """The document of each token, and its place there."""

    segments: Array
    """int32 [B, T]: the document, counted from 1; 0 is padding"""
    positions: Array
    """int32 [B, T]: index inside the document, from 0"""


@dataclass(frozen=True)
class Scoring:
    """How scores are made of the products of queries and keys."""

    scale: float
    softcap: float | None = None
    """caps the scaled scores s at this c, as c * tanh(s / c)"""
    window: int | None = None
    """number of last tokens that a query sees, itself included; None: all"""


def visible_keys(q: TokenPositions, kv: TokenPositions, window: int | None) -> Array:
    """Bool [B, T, S]: which keys each query attends to; none for a padding query."""
    return is_visible(expand(q, -1), expand(kv, -2), window)


def is_visible(q: TokenPositions, kv: TokenPositions, window: int | None) -> Array:
    """Of arrays that broadcast: whether the query attends to the key."""
    distance = q.positions - kv.positions
    visible = (q.segments == kv.segments) & (q.segments != 0) & (distance >= 0)
    return visible if window is None else visible & (distance < window)


def expand(positions: TokenPositions, axis: int) -> TokenPositions:
    return TokenPositions(*(jnp.expand_dims(x, axis) for x in positions))
