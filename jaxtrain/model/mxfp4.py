"""Weights in MXFP4, read as the numbers that they are: blocks of 32 with a power of two to each
(OCP Microscaling Formats 1.0, sections 5.2 and 5.3.3).

A tensor [..., rows, columns] lies in the file turned: `…_blocks` [..., columns, rows / 32, 16] has
two numbers a byte, the first in the low half, and `…_scales` [..., columns, rows / 32] an exponent.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from jaxtrain.model.tensor_file import PACKED, StoredTensor

BLOCK = 32
BIAS = 127  # of the exponents
POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NUMBERS = np.array([*POSITIVE, *(-x for x in POSITIVE)], ml_dtypes.bfloat16)
PAIRS = np.stack([np.tile(NUMBERS, 16), np.repeat(NUMBERS, 16)], axis=-1)
"""The two numbers of each byte."""


def unpack(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The same tensors, with one in bfloat16, which has all of these numbers, for each pair of
    blocks and scales. It is unpacked whenever it is read: nothing keeps it."""
    blocks, scales = PACKED
    tensors = dict(stored)
    for name in [name.removesuffix(blocks) for name in stored if name.endswith(blocks)]:
        packed, exponents = stored[name + blocks], stored.get(name + scales)
        if exponents is None or packed.shape != (*exponents.shape, BLOCK // 2):
            continue  # reported as unknown tensors
        del tensors[name + blocks], tensors[name + scales]
        *lead, columns, groups = exponents.shape
        shape = (*lead, groups * BLOCK, columns)
        read = lambda packed=packed, exponents=exponents: _unpack(packed.read(), exponents.read())
        tensors[name] = StoredTensor(shape, read)
    return tensors


def _unpack(blocks: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    powers = np.ldexp(np.float32(1), exponents.astype(np.int32) - BIAS).astype(ml_dtypes.bfloat16)
    with np.errstate(over="ignore"):  # infinite in transformers too
        turned = np.multiply(PAIRS[blocks], powers[..., None, None])
    return turned.reshape(*exponents.shape[:-1], -1).swapaxes(-1, -2)
