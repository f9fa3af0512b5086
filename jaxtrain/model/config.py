"""The architecture of a decoder and how it is computed: hashable, so static under jit."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxtrain.model.rope import Rope

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclass(frozen=True)
class Norm:
    eps: float
    kind: Literal["rms", "layer"] = "rms"
    zero_centered: bool = False
    """the scale is stored less 1"""
    has_bias: bool = False


@dataclass(frozen=True)
class Experts:
    """Feed-forward layers of which each token takes a few, and how a router chooses them."""

    count: int
    per_token: int
    width: int
    """feed-forward channels of each"""
    is_normalized: bool = True
    """the weights of those that a token takes sum to 1; else they are their probabilities among all
    """
    has_bias: bool = False
    """the router and the experts have biases"""
    swiglu_alpha: float = 1.0
    swiglu_limit: float | None = None
    """with a limit, gate and up make (up + 1) * gate * sigmoid(alpha * gate), both cut above it and
    up below its negative too"""
    balance_loss: float = 0.0
    """coefficient of the load-balancing loss of training; 0 is off"""


@dataclass(frozen=True)
class LayerSpec:
    """The settings that may differ between layers."""

    window: int | None = None
    """number of last tokens that a query sees, itself included; None: all of its document"""
    rope: Rope | None = None
    """how queries and keys are rotated; None: not at all"""
    has_experts: bool = False
    """the feed-forward layer is `DecoderConfig.experts`"""


@dataclass(frozen=True)
class LayerGroup:
    """A repeating pattern of layers; each member is stacked over the repeats and scanned."""

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
    norm: Norm
    max_positions: int
    experts: Experts | None = None
    tied: bool = False
    """the head is the embedding"""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    attention_sinks: bool = False
    """queries attend to a learned score of nothing too, one of each head"""
    qk_norm: Literal["head", "all_heads"] | None = None
    """a norm over each head of queries and keys, or over all at once, before their rotation"""
    norm_place: Literal["before", "after", "around"] = "before"
    """where attention and feed-forward are normalised: what they read, what they add, or both"""
    parallel_block: bool = False
    """attention and feed-forward read the same residual stream"""
    shared_norm: bool = False
    """and the same norm of it"""
    gated_mlp: bool = True
    activation: Activation = "silu"
    learned_positions: bool = False
    """an embedding of positions is added to that of tokens"""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """of what attention and feed-forward add"""
    attention_scale: float | None = None
    """of the scores; None: head_size ** -0.5"""
    attention_softcap: float | None = None
    """caps the scores s at this c, as c * tanh(s / c)"""
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    """caps the scaled logits"""
    initializer_range: float = 0.02
    """standard deviation of random weights"""

    @property
    def num_layers(self) -> int:
        return sum(len(group.layers) * group.repeats for group in self.groups)

    @property
    def num_expert_layers(self) -> int:
        return sum(
            spec.has_experts * group.repeats for group in self.groups for spec in group.layers
        )

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different rotations of the layers."""
        found = (layer.rope for group in self.groups for layer in group.layers)
        return tuple(dict.fromkeys(rope for rope in found if rope is not None))

    def layer_numbers(self, group: int, layer: int) -> range:
        """Numbers in the whole stack of the layers that one stacked member holds."""
        before = sum(len(g.layers) * g.repeats for g in self.groups[:group])
        period = len(self.groups[group].layers)
        return range(before + layer, before + period * self.groups[group].repeats, period)


@dataclass(frozen=True)
class ComputeConfig:
    """How a decoder is computed; changes no result beyond rounding."""

    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: str = "reference"
    """implementation of the attention kernel"""
    remat: Literal["full", "dots", "none"] = "full"
    """what is recomputed in the backward pass: layers, all but their matrix products, nothing"""
    remat_every: int = 1
    """applies `remat` to every n-th layer of a stack; the others save everything"""
    routing_replay: bool = False
    """what is recomputed keeps the choices of the routers"""
    tiled_mlp: bool = False
    """feed-forward layers process as many tokens at a time as the model is wide"""
    stages: int = 1
    """parts of the stack over the `pipeline` axis"""
    microbatches: int = 1
    """parts of a batch that pass through the stages"""


class AdapterSite(NamedTuple):
    """The low-rank adapters of one module in the layers of a stack, which is a parameter or joined
    with others into one."""

    name: str
    """of the module, without its layer: `q_proj`"""
    begin: int
    end: int
    """its entries of the last dimension but one of the parameter, where several are joined; equal
    for the whole of a parameter"""
    ranks: tuple[int, ...]
    """of each layer; 0 without an adapter"""
    scales: tuple[float, ...]
    dropout: float
    """probability that an input is 0 in training"""
    is_dora: bool = False
    """the columns of the adapted weight have lengths of their own"""


def group_layers(layers: tuple[LayerSpec, ...]) -> tuple[LayerGroup, ...]:
    """Groups the stack by what repeats: equal layers, or a longer pattern."""
    groups = []
    while layers:
        period, repeats = max(
            ((period, _repeats(layers, period)) for period in range(1, len(layers) + 1)),
            key=lambda pair: (pair[0] * pair[1] if pair[1] > 1 else 0, -pair[0]),
        )
        groups.append(LayerGroup(layers[:period], repeats))
        layers = layers[period * repeats :]
    return tuple(groups)


def _repeats(layers: tuple[LayerSpec, ...], period: int) -> int:
    """How often the first `period` layers repeat from the start."""
    repeats = 1
    while layers[repeats * period :][:period] == layers[:period]:
        repeats += 1
    return repeats
