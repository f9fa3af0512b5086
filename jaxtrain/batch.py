"""The rows that one forward pass works on. B rows, T tokens."""

from typing import Any, NamedTuple

Array = Any  # numpy on the host, jax inside a jitted function: this floor imports neither


class Batch(NamedTuple):
    """Packed rows; a document never attends to, nor predicts, a token of another one."""

    tokens: Array
    """int32 [B, T]"""
    positions: Array
    """int32 [B, T]: place in its document, from 0"""
    segments: Array
    """int32 [B, T]: 0 is padding; the documents of a row count from 1"""
    loss_weights: Array
    """float32 [B, T]: weight of the prediction *of* token t; 0 on padding, on masked roles and on
    the first token of every document"""
    rows: Array
    """int32 [B]: number of the packed row in its data set, -1 for a filler row"""
    step: Array | None = None
    """int32 []: number of the update, from 0; inside a loss function alone"""
