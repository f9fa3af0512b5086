"""Model FLOPs and the share of a chip's peak that they are."""

from typing import Any

import jax
import numpy as np

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
    """The longest entry of the table that the kind starts with; None for a chip it does not know."""
    known = [kind for kind in PEAK_FLOPS if device_kind.startswith(kind)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def matmul_parameters(params: Any) -> int:
    """Parameters that a token is multiplied with: all but norms and biases, and an embedding only where it
    is the head too. Each costs 2 FLOPs a token forward and 4 backward (Kaplan et al. 2020,
    arXiv:2001.08361)."""
    count = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        lookup_only = name.startswith("embed/") and "head" in params
        if not lookup_only and not name.endswith(("norm", "bias")):
            count += leaf.size
    return count


def attention_pairs(batch: Batch, window: int | None = None) -> int:
    """Pairs of a query and a key that it sees, over the documents of a host batch: len * (len + 1) / 2 for
    each, less with a window."""
    visible = np.where(batch.segments > 0, batch.positions + 1, 0)
    return int(np.minimum(visible, window or visible).sum(dtype=np.int64))


def training_flops(*, matmul_parameters: int, tokens: int, pairs: int, attention_width: int) -> float:
    """FLOPs of forward and backward, recomputation not counted. `pairs` is summed over layers and
    `attention_width` is query heads times head size: two products of it for each pair."""
    return 6.0 * matmul_parameters * tokens + 12.0 * pairs * attention_width
