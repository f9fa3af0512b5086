"""The sequences that one forward pass works on. B sequences, T tokens."""

from typing import Any, NamedTuple

Array = Any  # numpy on the host, jax inside a jitted function: this floor imports neither


class Batch(NamedTuple):
    """Packed sequences; a document never attends to, nor predicts, a token of another one."""

    tokens: Array
    """int32 [B, T]"""
    positions: Array
    """int32 [B, T]: place in its document, from 0"""
    segments: Array
    """int32 [B, T]: 0 is padding; the documents of a sequence count from 1"""
    loss_weights: Array
    """float32 [B, T]: weight of the prediction *of* token t; 0 on padding, on masked roles and on
    the first token of every document"""
    rows: Array
    """int32 [B]: number of the sequence in its data set, -1 for a filler"""
    extras: dict[str, Array] = {}
    """Further arrays [B, ...] that the data of an objective adds: labels of pairs, reference
    log-probabilities, rewards; 0 for a filler"""
    step: Array | None = None
    """int32 []: number of the step, from 0; only inside a loss function"""
    is_training: bool | None = None
    """False in an evaluation; only inside a loss function"""
    whole: Any = None
    """what a survey summed over the microbatches of the step; None where there is only one"""
