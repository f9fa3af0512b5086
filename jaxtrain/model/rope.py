"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), and its ways to longer contexts.

B batch, T tokens, H head size, R rotated pairs, H / 2 unless only a part of a head is rotated.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.kernels.attention import TokenPositions
from jaxtrain.kernels.axes import current_platform
from jaxtrain.kernels.product import is_for_unit
from jaxtrain.recipe.errors import show

MAX_FLOAT = 3e38  # in float32; an integer of JSON may even be too large for a float of Python
LONGEST, ORIGINAL = "max_position_embeddings", "original_max_position_embeddings"
FIELDS = ("rope_theta", "rope_local_base_freq", "rope_scaling", "rope_parameters", ORIGINAL)
"""Its fields in config.json: the first three up to transformers 4, the fourth from 5; the last
counts before its namesake in one of them."""


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
class Dynamic:
    """Raises theta in documents longer than the model was trained for."""

    factor: float
    max_positions: int


@dataclass(frozen=True)
class Yarn:
    """Divides the pairs that turn less than `beta_slow` times in the original context, and none
    that turns more than `beta_fast` times (Peng et al., 2023, arXiv:2309.00071)."""

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    truncate: bool


@dataclass(frozen=True)
class LongRope:
    """A divisor for each pair, of two lists: one for documents up to the original context, one for
    longer ones (Ding et al., 2024, arXiv:2402.13753)."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_positions: int


@dataclass(frozen=True)
class Proportional:
    """Rotates the first pairs of a head by the frequencies that they have in a whole one."""

    factor: float


@dataclass(frozen=True)
class QueryScale:
    """Multiplies queries by 1 + beta * log(1 + position // original_max_positions)."""

    beta: float
    original_max_positions: int


@dataclass(frozen=True)
class Rope:
    theta: float
    scaling: Linear | Llama3 | Dynamic | Yarn | LongRope | Proportional | None = None
    fraction: float = 1.0
    """of a head that is rotated, from its start"""
    interleaved: bool = False
    """a pair is (2h, 2h + 1), not (h, h + R)"""
    attention_factor: float = 1.0
    """multiplies rotated queries and keys"""
    query_scale: QueryScale | None = None
    score_scale: float = 1.0
    """multiplies the scores of latent attention"""

    @property
    def turns_after(self) -> int | None:
        """The length beyond which all tokens of a document have another rotation at once."""
        scaling = self.scaling
        return scaling.original_max_positions if isinstance(scaling, LongRope) else None


class Rotation(NamedTuple):
    """Of every token, float32 [B, T, 1, 1, R]: all heads share it."""

    cos: jax.Array
    sin: jax.Array
    query_scale: jax.Array | None
    """float32 [B, T, 1, 1, 1]"""


def read_ropes(
    hf: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]], *, interleaved: bool = False
) -> dict[str, Rope]:
    """Reads the ropes of a config.json of either style: type of layer → rope, or `*` → that of all.

    `defaults` are the family's fields, by type of layer or under `*`; `partial_rotary_factor`,
    `llama_4_scaling_beta` and a `mscale_all_dim` of scores count only if they are among them.
    ValueError for an unsupported rope.
    """
    given, scaling = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    by_type = "*" not in defaults
    for fields, nests in ((given, by_type), (scaling, False)):
        is_map = isinstance(fields, Mapping)
        if not is_map or (fields and nests != any(isinstance(v, Mapping) for v in fields.values())):
            each = f"hold a map for each of {', '.join(defaults)}"
            what = each if nests else "be one map for all layers"
            raise ValueError(f"must {what}, found {show(fields)}")
    beside = {name: hf.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    if by_type:
        # What stands beside the maps is meant for the full layers.
        local = {"rope_theta": hf.get("rope_local_base_freq")}
        sources = {
            "full_attention": (beside, given.get("full_attention"), scaling, {"truncate": True}),
            "sliding_attention": (local, given.get("sliding_attention"), {"truncate": True}),
        }
    else:
        sources = {"*": (beside, scaling or given, {ORIGINAL: hf.get(ORIGINAL)})}
    ropes = {}
    for kind, default in defaults.items():
        longest = hf.get("max_position_embeddings")
        fields: dict[str, Any] = {LONGEST: longest, ORIGINAL: longest, **default}
        for source in sources[kind]:
            fields |= {k: v for k, v in (source or {}).items() if v is not None}
        ropes[kind] = replace(_build_rope(fields, default), interleaved=interleaved)
    return ropes


def check_sizes(ropes: Iterable[tuple[Rope | None, int]]) -> None:
    """ValueError for ropes that do not fit the rotated pairs of a head of this size."""
    for rope, head_size in ropes:
        if rope is None:
            continue
        pairs = len(range(0, int(head_size * rope.fraction), 2))
        if isinstance(rope.scaling, Dynamic) and pairs < 2:
            raise ValueError(f"rope type dynamic needs 2 rotated pairs of a head, found {pairs}")
        if isinstance(rope.scaling, LongRope):
            found = [len(rope.scaling.short_factors), len(rope.scaling.long_factors)]
            if found != [pairs, pairs]:
                raise ValueError(
                    f"short_factor and long_factor must have a number for each of the {pairs} "
                    f"rotated pairs, found {found[0]} and {found[1]}"
                )


def _build_rope(fields: Mapping[str, Any], default: Mapping[str, Any]) -> Rope:
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if kind == "su" or (kind == "yarn" and "short_factor" in fields):  # in files of Phi-3
        kind = "longrope"
    number = partial(_number, fields, kind)
    rope = Rope(number("rope_theta"), fraction=number("partial_rotary_factor", 1.0))
    is_partial = "partial_rotary_factor" in default or kind == "proportional"
    if rope.fraction > 1 or (rope.fraction < 1 and not is_partial):
        most = "at most 1.0" if is_partial else "1.0 in this family"
        raise ValueError(f"partial_rotary_factor must be {most}, found {rope.fraction}")
    if "llama_4_scaling_beta" in default and fields["llama_4_scaling_beta"]:
        scale = QueryScale(number("llama_4_scaling_beta"), _whole(number, ORIGINAL))
        rope = replace(rope, query_scale=scale)
    if "mscale_all_dim" in default and fields["mscale_all_dim"] and kind != "default":
        grown = _grown(number("factor"), number("mscale_all_dim"))
        rope = replace(rope, score_scale=grown**2)
    build = SCALINGS.get(kind) if isinstance(kind, str) else None
    if build is None:
        kinds = ", ".join(SCALINGS)
        raise ValueError(f"rope type must be one of {kinds}, found {show(kind)}")
    return build(rope, fields, number)


Number = Callable[..., float]
"""Name of a field, and what it is where it lacks → its value; ValueError unless it is positive."""


def _number(fields: Mapping[str, Any], kind: str, name: str, default: float | None = None) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_FLOAT:
        raise ValueError(f"rope type {kind} needs a positive float32 {name}, found {show(value)}")
    return float(value)


def _whole(number: Number, name: str) -> int:
    if (value := number(name)) < 1:
        raise ValueError(f"{name} must be at least 1, found {value}")
    return int(value)


def _llama3(rope: Rope, fields: Mapping[str, Any], number: Number) -> Rope:
    names = ("factor", "low_freq_factor", "high_freq_factor")
    factor, low, high = (number(name) for name in names)
    if low >= high:
        raise ValueError(f"low_freq_factor must be below the high one, found {low} and {high}")
    return replace(rope, scaling=Llama3(factor, low, high, _whole(number, ORIGINAL)))


def _yarn(rope: Rope, fields: Mapping[str, Any], number: Number) -> Rope:
    original = _whole(number, ORIGINAL)
    if rope.theta <= 1:
        raise ValueError(f"rope type yarn needs a rope_theta above 1, found {rope.theta}")
    factor = number("factor", number(LONGEST) / original)
    attention_factor = _grown(factor, 1.0)
    if fields.get("mscale") and fields.get("mscale_all_dim"):
        scales = number("mscale"), number("mscale_all_dim")
        attention_factor = _grown(factor, scales[0]) / _grown(factor, scales[1])
    return replace(
        rope,
        scaling=Yarn(
            factor,
            original,
            beta_fast=number("beta_fast", 32.0),
            beta_slow=number("beta_slow", 1.0),
            truncate=bool(fields.get("truncate", True)),
        ),
        attention_factor=number("attention_factor", attention_factor),
    )


def _grown(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(rope: Rope, fields: Mapping[str, Any], number: Number) -> Rope:
    lists = []
    for name in ("short_factor", "long_factor"):
        found = fields.get(name)
        if not isinstance(found, list) or not found:
            raise ValueError(f"rope type longrope needs a list {name}, found {show(found)}")
        lists.append(tuple(_number({name: value}, "longrope", name) for value in found))
    original = _whole(number, ORIGINAL)
    factor = number("factor", number(LONGEST) / original)
    is_longer = factor > 1 and original > 1
    attention_factor = math.sqrt(1 + math.log(factor, original)) if is_longer else 1.0
    return replace(
        rope,
        scaling=LongRope(lists[0], lists[1], original),
        attention_factor=number("attention_factor", attention_factor),
    )


SCALINGS: Mapping[str, Callable[[Rope, Mapping[str, Any], Number], Rope]] = {
    "default": lambda rope, fields, number: rope,
    "linear": lambda rope, fields, number: replace(rope, scaling=Linear(number("factor"))),
    "llama3": _llama3,
    "dynamic": lambda rope, fields, number: replace(
        rope, scaling=Dynamic(number("factor"), _whole(number, LONGEST))
    ),
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": lambda rope, fields, number: replace(
        rope, scaling=Proportional(number("factor", 1.0))
    ),
}
"""`rope_type` → what it makes of a rope."""


def frequencies(rope: Rope, head_size: int, lengths_BT1: Any = 1) -> Any:
    """Radians per position of each rotated pair, float32 [R]; [B, T, R] by the lengths of the
    documents where they matter."""
    size, scaling = int(head_size * rope.fraction), rope.scaling
    if isinstance(scaling, Proportional):
        turned = int(rope.fraction * head_size // 2)
        exponents_R = np.arange(0, 2 * turned, 2, dtype=np.float32) / np.float32(head_size)
        freqs_R = 1.0 / np.float32(rope.theta) ** exponents_R / scaling.factor
        return np.pad(freqs_R, (0, head_size // 2 - turned)).astype(np.float32)
    exponents_R = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    if isinstance(scaling, Dynamic):
        most = scaling.max_positions
        growth = scaling.factor * jnp.maximum(lengths_BT1, most) / most - (scaling.factor - 1)
        return 1.0 / (rope.theta * growth ** (size / (size - 2))) ** exponents_R
    freqs_R = 1.0 / np.float32(rope.theta) ** exponents_R
    if isinstance(scaling, Linear):
        freqs_R = freqs_R / scaling.factor
    elif isinstance(scaling, Llama3):
        wavelengths_R = 2 * math.pi / freqs_R
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        # 0 for fewer than `low` turns in the original context, 1 for more than `high`.
        turns_R = scaling.original_max_positions / wavelengths_R
        keep_R = np.clip((turns_R - low) / (high - low), 0.0, 1.0)
        freqs_R = keep_R * freqs_R + (1 - keep_R) * freqs_R / scaling.factor
    elif isinstance(scaling, Yarn):
        keep_R = _yarn_kept(rope.theta, scaling, size)
        freqs_R = keep_R * freqs_R + (1 - keep_R) * freqs_R / scaling.factor
    elif isinstance(scaling, LongRope):
        is_long_BT1 = lengths_BT1 > scaling.original_max_positions
        long_R = freqs_R / np.array(scaling.long_factors, np.float32)
        return jnp.where(is_long_BT1, long_R, freqs_R / np.array(scaling.short_factors, np.float32))
    return freqs_R.astype(np.float32)


def _yarn_kept(theta: float, yarn: Yarn, size: int) -> np.ndarray:
    """1 for pairs whose frequency stays, 0 for those whose is divided, a ramp between."""

    def pair_that_turns(times: float) -> float:
        turn = yarn.original_max_positions / (times * 2 * math.pi)
        return size * math.log(turn) / (2 * math.log(theta))

    first, last = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    last = first + 0.001 if first == last else last
    ramp_R = (np.arange(size // 2, dtype=np.float32) - first) / (last - first)
    return 1 - np.clip(ramp_R, 0, 1)


def rotation(rope: Rope, head_size: int, tokens: TokenPositions) -> Rotation:
    positions_BT1 = tokens.positions[..., None].astype(jnp.float32)
    depends = isinstance(rope.scaling, Dynamic | LongRope)
    lengths_BT1 = document_lengths(tokens)[..., None] if depends else 1
    freqs = jnp.asarray(frequencies(rope, head_size, lengths_BT1))
    angles_BT11R = (positions_BT1 * freqs)[:, :, None, None]
    scale_BT111 = None
    if query := rope.query_scale:
        turns_BT1 = jnp.floor(positions_BT1 / query.original_max_positions)
        scale_BT111 = (1 + query.beta * jnp.log(1 + turns_BT1))[..., None, None]
    factor = rope.attention_factor
    return Rotation(jnp.cos(angles_BT11R) * factor, jnp.sin(angles_BT11R) * factor, scale_BT111)


def document_lengths(tokens: TokenPositions) -> jax.Array:
    """Number of tokens, int32 [B, T], of each token's document, so far where its end is absent."""

    def lengths(segments_T: jax.Array, positions_T: jax.Array) -> jax.Array:
        last = jax.ops.segment_max(positions_T, segments_T, segments_T.shape[0] + 1)
        return last[segments_T] + 1

    return jax.vmap(lengths)(*tokens)


def rotate(x: jax.Array, rotation: Rotation, *, interleaved: bool) -> jax.Array:
    """Rotates the first 2 R channels of x [B, T, K, G, H] by its positions."""
    if (current_platform() == "tpu" and x.dtype == jnp.bfloat16) or is_for_unit(x):
        return rotate_by_product(interleaved, x, rotation.cos, rotation.sin)
    turned, rest = jnp.split(x, [2 * rotation.cos.shape[-1]], axis=-1)
    turned = turned.astype(jnp.float32)
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else jnp.split(turned, 2, axis=-1)
    pairs = (a * rotation.cos - b * rotation.sin, b * rotation.cos + a * rotation.sin)
    if interleaved:
        turned = jnp.stack(pairs, axis=-1).reshape(turned.shape)
    else:
        turned = jnp.concatenate(pairs, axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def rotate_by_product(interleaved: bool, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`rotate`, with each channel's partner fetched by an exact product with 0, 1 and -1.

    The channels of a head are one row of a TPU's vector unit: to cut rows in two and to join them
    takes the compiled layer of a Llama as long as its product for queries, keys and values. XLA on
    CPU would join them in one loop with what comes before, by a branch for each channel.
    """
    (H,), R = x.shape[-1:], cos.shape[-1]
    first = 2 * np.arange(R) if interleaved else np.arange(R)
    second = first + (1 if interleaved else R)
    partners_HH = np.zeros((H, H), np.float32)
    partners_HH[second, first], partners_HH[first, second] = -1, 1
    partner = jax.lax.dot_general(
        x,
        jnp.asarray(partners_HH, x.dtype),
        (((x.ndim - 1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )

    def spread(pairs: jax.Array, rest: float) -> jax.Array:
        each = jnp.repeat(pairs, 2, -1) if interleaved else jnp.concatenate([pairs, pairs], -1)
        fill = [(0, 0)] * (each.ndim - 1) + [(0, H - 2 * R)]
        return jnp.pad(each, fill, constant_values=rest)

    y = x.astype(jnp.float32) * spread(cos, 1.0) + partner * spread(sin, 0.0)
    return y.astype(x.dtype)


def _rotate_by_product_fwd(interleaved: bool, x: jax.Array, cos: jax.Array, sin: jax.Array):
    return rotate_by_product(interleaved, x, cos, sin), (cos, sin)


def _rotate_by_product_bwd(interleaved: bool, saved: tuple[jax.Array, jax.Array], dy: jax.Array):
    cos, sin = saved
    return rotate_by_product(interleaved, dy, cos, -sin), None, None


rotate_by_product.defvjp(_rotate_by_product_fwd, _rotate_by_product_bwd)
