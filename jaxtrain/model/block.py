"""One layer of the decoder: a mixer of tokens and a feed-forward layer on the residual stream.

Its parameters are stacked over the layers of its group, as those of layers.py, where the dimensions
have their letters.
"""

from functools import partial
from typing import Any

from flax import nnx
from jax import Array, lax

from jaxtrain.model.config import ComputeConfig, DecoderConfig, LayerSpec
from jaxtrain.model.latent import LatentAttention
from jaxtrain.model.layers import (
    MLP,
    Attention,
    AttentionInputs,
    ExpertMLP,
    Initializer,
    LayerInput,
    Output,
    normalize,
)
from jaxtrain.model.recurrent import DeltaRule, ShortConvolution
from jaxtrain.parallel.sharding import constrain

MIXERS: dict[str, Any] = {
    "attention": Attention,
    "latent": LatentAttention,
    "delta": DeltaRule,
    "conv": ShortConvolution,
}
"""`LayerSpec.mixer` → the class."""


class Block(nnx.Module):
    """A mixer of tokens, mostly attention, and feed-forward, each reading the residual stream and
    added to it, with norms."""

    attention: Any = None
    mixer: Any = None

    def __init__(
        self,
        config: DecoderConfig,
        spec: LayerSpec,
        compute: ComputeConfig,
        init: Initializer,
        L: int,
    ):
        D, place = config.width, config.norm_place
        has_mlp_norm = place != "after" and not config.shared_norm
        has_bias = config.norm.has_bias
        self.attention_norm = init.norm(L, D) if place != "after" else None
        self.attention_norm_bias = init.zeros(L, D) if has_bias else None
        mixer = MIXERS[spec.mixer](config, spec, compute, init, L)
        if spec.is_recurrent:
            self.mixer = mixer
        else:
            self.attention = mixer
        self.attention_post_norm = init.norm(L, D) if place != "before" else None
        self.mlp_norm = init.norm(L, D) if has_mlp_norm else None
        self.mlp_norm_bias = init.zeros(L, D) if has_bias and has_mlp_norm else None
        is_beside = spec.has_experts and config.experts is not None and config.experts.is_beside_mlp
        kind = ExpertMLP if spec.has_experts and not is_beside else MLP
        self.mlp = kind(config.of_layer(spec), compute, init, L)
        self.experts = ExpertMLP(config, compute, init, L) if is_beside else None
        self.mlp_own_norm = init.norm(L, D) if is_beside else None
        self.experts_norm = init.norm(L, D) if is_beside else None
        self.experts_post_norm = init.norm(L, D) if is_beside else None
        self.mlp_post_norm = init.norm(L, D) if place != "before" else None
        self.layer_input = LayerInput(config, init, L) if config.per_layer_width else None
        self.layer_scale = init.ones(L, 1) if config.has_layer_scale else None
        self.config, self.spec = config, spec

    @property
    def token_mixer(self) -> Any:
        return self.attention if self.mixer is None else self.mixer

    def __call__(self, x_BTD: Array, inputs: AttentionInputs, cache: Any = None) -> Output:
        config, routing = self.config, None
        norm = partial(normalize, config.norm)
        read_BTD = norm(x_BTD, self.attention_norm, self.attention_norm_bias)
        mixed_BTD, cache = self.token_mixer(read_BTD, inputs, cache)
        y_BTD = x_BTD + config.residual_scale * norm(mixed_BTD, self.attention_post_norm)
        if not config.shared_norm:
            read_BTD = x_BTD if config.parallel_block else y_BTD
            read_BTD = norm(read_BTD, self.mlp_norm, self.mlp_norm_bias)
        if isinstance(self.mlp, ExpertMLP):
            wide_BTD, routing = self.mlp(read_BTD, inputs)
        else:
            wide_BTD = self.mlp(read_BTD, inputs.noise_BT)
        if self.experts is not None:
            mixed_BTD, routing = self.experts(norm(y_BTD, self.experts_norm), inputs, y_BTD)
            wide_BTD = norm(wide_BTD, self.mlp_own_norm) + norm(mixed_BTD, self.experts_post_norm)
        y_BTD += config.residual_scale * norm(wide_BTD, self.mlp_post_norm)
        if self.layer_input is not None:
            assert inputs.own_BTI is not None
            y_BTD += self.layer_input(y_BTD, inputs.own_BTI, inputs.noise_BT)
        if self.layer_scale is not None:
            # Part of the weights, which training leaves as it is, as in transformers.
            y_BTD *= lax.stop_gradient(self.layer_scale[...]).astype(y_BTD.dtype)
        return Output(constrain(y_BTD, "batch", "tokens", None), cache, routing)
