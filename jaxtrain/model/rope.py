"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864).

B batch, T tokens, H head size, R = H / 2 rotated pairs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.recipe.errors import show

DEFAULT_THETA = 10_000.0
MAX_FLOAT = 3e38  # in float32; an integer of JSON may even be too large for a float of Python
FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
"""Its fields in config.json: the first two up to transformers 4, the third from 5; the last counts
before its namesake in one of them."""


@dataclass(frozen=True)
class Linear:
    """Divides positions by a factor."""

    factor: float


@dataclass(frozen=True)
class Llama3:
    """Divides only the low frequencies, as in Llama 3.1."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Rope:
    theta: float
    scaling: Linear | Llama3 | None = None


def read_rope(hf: Mapping[str, Any]) -> Rope:
    """Reads the rope of a config.json of either style; ValueError for an unsupported one."""
    fields = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(fields, Mapping) or any(isinstance(v, Mapping) for v in fields.values()):
        raise ValueError(f"must be one map for all layers, found {show(fields)}")
    whole: dict[str, Any] = {"rope_theta": DEFAULT_THETA}
    for part in ({"rope_theta": hf.get("rope_theta")}, fields):
        whole |= {name: value for name, value in part.items() if value is not None}
    fields = whole
    kind = fields.get("rope_type") or fields.get("type") or "default"
    theta = _number(fields, kind, "rope_theta")
    if fields.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            "partial_rotary_factor must be 1.0; rotating part of a head is not supported"
        )
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, Linear(_number(fields, kind, "factor")))
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        original = "original_max_position_embeddings"
        places = (hf.get(original), fields.get(original), hf.get("max_position_embeddings"))
        fields[original] = next((n for n in places if n is not None), None)
        factor, low, high = (_number(fields, kind, name) for name in names)
        if low >= high:
            raise ValueError(f"low_freq_factor must be below the high one, found {low} and {high}")
        return Rope(theta, Llama3(factor, low, high, int(_number(fields, kind, original))))
    raise ValueError(f"rope type must be one of default, linear, llama3, found {show(kind)}")


def _number(fields: Mapping[str, Any], kind: str, name: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_FLOAT:
        raise ValueError(f"rope type {kind} needs a positive float32 {name}, found {show(value)}")
    return float(value)


def frequencies(rope: Rope, head_size: int) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [H / 2]."""
    exponents_R = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    freqs_R = 1.0 / np.float32(rope.theta) ** exponents_R
    scaling = rope.scaling
    if isinstance(scaling, Linear):
        freqs_R = freqs_R / scaling.factor
    elif isinstance(scaling, Llama3):
        wavelengths_R = 2 * math.pi / freqs_R
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        # 0 for fewer than `low` turns in the original context, 1 for more than `high`.
        turns_R = scaling.original_max_positions / wavelengths_R
        keep_R = np.clip((turns_R - low) / (high - low), 0.0, 1.0)
        freqs_R = keep_R * freqs_R + (1 - keep_R) * freqs_R / scaling.factor
    return freqs_R.astype(np.float32)


def rotation(rope: Rope, head_size: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every angle, float32 [B, T, 1, 1, R]: all heads share them."""
    freqs_R = jnp.asarray(frequencies(rope, head_size))
    angles_BT11R = positions_BT.astype(jnp.float32)[:, :, None, None, None] * freqs_R
    return jnp.cos(angles_BT11R), jnp.sin(angles_BT11R)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, T, K, G, H] by its positions; pairs are (h, h + H/2), as in Hugging Face."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
