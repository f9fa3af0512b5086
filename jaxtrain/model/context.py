"""What long sequences ask of a decoder, and a mesh that cuts them over its `context` axis."""

from collections.abc import Mapping
from functools import partial

from jaxtrain.kernels.attention import Exchange, choose_exchange
from jaxtrain.model.config import DecoderConfig
from jaxtrain.recipe.errors import RecipeError

RECURRENT = {"delta": "linear attention", "conv": "short convolutions"}
"""Mixer that passes a state from token to token → what its layers are called."""


def find_exchange(config: DecoderConfig, *, context: int, tensor: int) -> tuple[Exchange, str]:
    """How attention goes over `context`, and a sentence for the log; one way for all layers, which
    have the same order of tokens."""
    heads = []
    for spec in config.layer_kinds:
        sizes = config.of_layer(spec)
        is_latent = spec.mixer == "latent"
        heads.append((sizes.num_heads, sizes.num_heads if is_latent else sizes.num_kv_heads))
    exchange, why = choose_exchange(heads, parts=context, tensor=tensor)
    if exchange == "ring" and any(spec.window for spec in config.layer_kinds):
        why += " (layers with a window in plain jnp)"
    return exchange, why


def refuse_length(config: DecoderConfig, tokens: int) -> None:
    """RecipeError for sequences with more tokens than a table of positions has rows. Rotations are
    computed for any."""
    if config.learned_positions and tokens > config.max_positions:
        raise RecipeError(
            f"data.max_length: {tokens} is longer than the {config.max_positions} positions that "
            f"{config.family} has in a table; write at most that"
        )


def refuse_context(config: DecoderConfig, sizes: Mapping[str, int]) -> None:
    """RecipeError for layers whose tokens wait for a state of those before them, and for a ring in
    the stages of a pipeline, of which some are idle: a step of it waits for all devices."""
    if (context := sizes["context"]) == 1:
        return
    if found := {RECURRENT[spec.mixer] for spec in config.layer_kinds if spec.is_recurrent}:
        raise RecipeError(
            f"mesh.context: {context} cannot cut sequences for layers of "
            f"{' and '.join(sorted(found))}, which {config.family} has; write 1, and use mesh.fsdp "
            "or mesh.tensor"
        )
    find = partial(find_exchange, config, tensor=sizes["tensor"])
    exchange, why = find(context=context)
    if exchange == "ring" and sizes["pipeline"] > 1:
        legal = [n for n in range(1, context) if find(context=n)[0] == "all_to_all"]
        raise RecipeError(
            f"mesh.pipeline: {sizes['pipeline']} excludes attention {why}; use mesh.fsdp, or for "
            f"mesh.context one of {legal}"
        )
