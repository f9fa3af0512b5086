"""What a decoder is, and how it is computed: hashable values, so that both may steer tracing."""

from dataclasses import dataclass
from typing import Literal

from jaxtrain.model.rope import Rope


@dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer."""

    window: int | None = None
    """How many of the last tokens a query sees, itself included; None: all of its document."""


@dataclass(frozen=True)
class LayerGroup:
    """Neighbouring layers that repeat; each member is stacked over the repeats and scanned."""

    layers: tuple[LayerSpec, ...]
    repeats: int


@dataclass(frozen=True)
class DecoderConfig:
    family: str
    vocab_size: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_width: int
    groups: tuple[LayerGroup, ...]
    rope: Rope
    rms_eps: float
    max_positions: int
    tied: bool = False
    """The head is the embedding."""
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    """Queries and keys pass an RMS norm over each head before they are rotated."""
    initializer_range: float = 0.02
    """Standard deviation of the weights of a model from scratch."""

    @property
    def num_layers(self) -> int:
        return sum(len(group.layers) * group.repeats for group in self.groups)

    def layer_numbers(self, group: int, layer: int) -> range:
        """Numbers, from the bottom of the stack, of the layers that one stacked member holds."""
        before = sum(len(g.layers) * g.repeats for g in self.groups[:group])
        period = len(self.groups[group].layers)
        return range(before + layer, before + period * self.groups[group].repeats, period)


@dataclass(frozen=True)
class ComputeConfig:
    """How a decoder is computed; no choice here changes a result beyond rounding."""

    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: str = "reference"
    """Implementation of the attention kernel."""
    remat: Literal["full", "dots", "none"] = "full"
    """What the backward pass finds: inputs of layers, their matrix products too, or everything."""
    remat_every: int = 1
    """Every how many layers of a stack one is treated so; the others keep everything."""
    tiled_mlp: bool = False
    """Feed-forward layers work on as many tokens at a time as the model is wide."""
    stages: int = 1
    """Pieces into which the stack is cut over the `pipeline` axis."""
    microbatches: int = 1
    """Pieces of a batch that are under way in the stages at once."""


def grouped(layers: tuple[LayerSpec, ...]) -> tuple[LayerGroup, ...]:
    """The stack as few repeating groups: a run of equal layers, or of a longer pattern, is one."""
    groups = []
    while layers:
        period, repeats = max(
            ((period, _repeats(layers, period)) for period in range(1, len(layers) // 2 + 1)),
            key=lambda found: (found[0] * found[1] if found[1] > 1 else 0, -found[0]),
            default=(1, 1),
        )
        repeats = repeats if repeats > 1 else 1
        period = period if repeats > 1 else 1
        groups.append(LayerGroup(layers[:period], repeats))
        layers = layers[period * repeats :]
    return tuple(groups)


def _repeats(layers: tuple[LayerSpec, ...], period: int) -> int:
    """How often the first `period` layers follow one another from the start."""
    repeats = 1
    while layers[repeats * period :][:period] == layers[:period]:
        repeats += 1
    return repeats
