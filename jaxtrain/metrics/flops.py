"""Model FLOPs and the share of a chip's peak that they are."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.batch import Batch

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
"""Dense bfloat16 FLOP/s of a device, by the start of its kind, from the makers' data sheets."""


def peak_flops(device_kind: str) -> float | None:
    """The longest entry of the table that the kind starts with; None for a chip it does not
    know."""
    known = [kind for kind in PEAK_FLOPS if device_kind.startswith(kind)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def matmul_parameters(params: Any) -> int:
    """Parameters that a token is multiplied with: all but norms and biases, and an embedding only
    where it is the head too. Each costs 2 FLOPs a token forward and 4 backward (Kaplan et al. 2020,
    arXiv:2001.08361); a pair of query and key costs 4 and 8 times query heads times head size."""
    count = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        lookup_only = name.startswith("embed/") and "head" in params
        if not lookup_only and not name.endswith(("norm", "bias")):
            count += leaf.size
    return count


def counts(batch: Batch, windows: Sequence[int | None]) -> dict[str, jax.Array]:
    """Rows that have a token, the length of a row with its padding, tokens, trained tokens, and
    pairs of a query and a key that it sees, summed over the layers.

    `windows` has one entry a layer. A document of n tokens has n * (n + 1) / 2 pairs, less with a
    window.
    """
    visible = jnp.where(batch.segments > 0, batch.positions + 1, 0)
    pairs = jnp.float32(0)
    for window, layers in Counter(windows).items():
        seen = visible if window is None else jnp.minimum(visible, window)
        pairs += layers * jnp.sum(seen, dtype=jnp.float32)
    return {
        "rows": jnp.sum(batch.segments[..., 0] > 0, dtype=jnp.int32),
        "seqlen": jnp.int32(batch.tokens.shape[-1]),
        "tokens": jnp.sum(batch.segments > 0, dtype=jnp.int32),
        "trained_tokens": jnp.sum(batch.loss_weights > 0, dtype=jnp.int32),
        "pairs": pairs,
    }
