"""What the chunked loss computes, and how it is split over tokens and devices."""

from math import prod
from typing import Literal, NamedTuple

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

from jaxtrain.kernels.axes import BATCH_AXES, TENSOR_AXIS, free_axis_sizes

HeadLayout = Literal["DV", "VD"]
"""Order of the head's dimensions; 'VD' is that of a tied embedding."""

MIN_BYTES = 64 * 2**20  # of a chunk's logits, which need not be smaller
MAX_TOKENS = 1024  # of a chunk on one device; more are no faster


class NLL(NamedTuple):
    """Sums over the batch, float32 []. Only `total` is differentiated; the others are metrics."""

    total: Array
    """weighted negative log-likelihood, smoothing and z-loss included"""
    z_total: Array
    """the part of `total` that is z-loss"""
    correct: Array
    """weight of the tokens that the model ranks first"""


class Plan(NamedTuple):
    """Hashable and static. `shards` is the number of parts of the batch over `batch_axes`."""

    head_layout: HeadLayout
    z_loss: float
    label_smoothing: float
    chunk_tokens: int
    """of each sequence"""
    batch_axes: tuple[str, ...]
    shards: int
    vocabulary_axis: str | None
    on_mesh: bool

    def place(self, x: Array, *spec) -> Array:
        """Constrains the sharding of x, if there is a mesh."""
        return jax.lax.with_sharding_constraint(x, P(*spec)) if self.on_mesh else x


def make_plan(
    hidden_BTD: Array,
    head: Array,
    head_layout: HeadLayout,
    chunk_tokens: int | None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Plan:
    B, T, D = hidden_BTD.shape
    width, V = head.shape if head_layout == "DV" else head.shape[::-1]
    if width != D:
        raise ValueError(
            f"head of shape {head.shape} does not fit a hidden width of {D} in layout "
            f"{head_layout!r}; the other layout is {'VD' if head_layout == 'DV' else 'DV'!r}"
        )
    sizes = free_axis_sizes()
    batch_axes: tuple[str, ...] = ()
    for axis in BATCH_AXES:
        shards = prod(sizes[a] for a in batch_axes) * sizes.get(axis, 1)
        if sizes.get(axis, 1) > 1 and B % shards == 0:
            batch_axes = (*batch_axes, axis)
    shards = prod(sizes[a] for a in batch_axes)
    splits = sizes.get(TENSOR_AXIS, 1)
    splits = splits if V % splits == 0 else 1
    if chunk_tokens is None:
        # With D tokens the logits take as much memory as the float32 gradient of the head.
        tokens = min(MAX_TOKENS, max(D, MIN_BYTES // (4 * V // splits)))
        chunk_tokens = max(1, tokens // (B // shards))
    chunks = -(-T // chunk_tokens)
    return Plan(
        head_layout=head_layout,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        chunk_tokens=-(-T // chunks),  # equal chunks, so that little padding fills the last
        batch_axes=batch_axes,
        shards=shards,
        vocabulary_axis=TENSOR_AXIS if splits > 1 else None,
        on_mesh=bool(batch_axes) or splits > 1,
    )
