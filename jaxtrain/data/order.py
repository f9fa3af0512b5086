"""Orders that depend on their keys alone: not on a library's version, a machine or a past state."""

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer over uint64: equal in, equal out, and else as good as random."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def keyed(values: np.ndarray, *keys: int) -> np.ndarray:
    """A hash of each of `values` (uint64) under integer keys."""
    for key in keys:
        shift = np.array([(key * GOLDEN + GOLDEN) & MASK], dtype=np.uint64)
        values = mixed(values + mixed(shift))
    return values


def permutation(count: int, *keys: int) -> np.ndarray:
    """An order of `count` things, int64 [count]; numpy's own generators may change by release."""
    return np.argsort(keyed(np.arange(count, dtype=np.uint64), *keys), kind="stable")


def sample(count: int, size: int, *keys: int) -> np.ndarray:
    """`size` of `count` numbers, rising, so that files are read from front to back."""
    return np.sort(permutation(count, *keys)[:size])
