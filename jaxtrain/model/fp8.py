"""Weights in FP8, read as the numbers that they are: a factor to each block of 128 x 128
(DeepSeek-AI, 2024, arXiv:2412.19437, section 3.3).

Beside a tensor `….weight` [rows, columns] lies `….weight_scale_inv` [rows / 128, columns / 128],
both rounded up.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np

from jaxtrain.model.tensor_file import StoredTensor

BLOCK = 128
FACTORS = "_scale_inv"


def unpack_blocks(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The same tensors, with one in float32 for each pair of numbers and factors. It is unpacked
    whenever it is read: nothing keeps it."""
    tensors = dict(stored)
    for name in [name.removesuffix(FACTORS) for name in stored if name.endswith(FACTORS)]:
        packed, factors = stored.get(name), stored[name + FACTORS]
        if packed is None or factors.shape != tuple(-(-size // BLOCK) for size in packed.shape):
            continue  # reported as unknown tensors
        del tensors[name + FACTORS]
        tensors[name] = StoredTensor(packed.shape, partial(_unpack, packed, factors))
    return tensors


def _unpack(packed: StoredTensor, factors: StoredTensor) -> np.ndarray:
    numbers, each = packed.read().astype(np.float32), factors.read().astype(np.float32)
    for dim, size in enumerate(packed.shape):
        each = each.repeat(BLOCK, dim).take(np.arange(size), dim)
    return numbers * each
