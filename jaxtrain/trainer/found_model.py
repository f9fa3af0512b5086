"""What is known of a model before its mesh and its batches are."""

from typing import Any, NamedTuple

from jaxtrain import registry
from jaxtrain.model import ModelFactory, ModelSpec
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.trainer import TrainerConfig
from jaxtrain.trainer.given import Given


class FoundModel(NamedTuple):
    factory: ModelFactory
    spec: ModelSpec
    """with room for the tokenizer"""
    tokenizer: Any
    """with its chat template"""


def find_model(
    config: TrainerConfig, given: Given, view: Any, *, reads_weights: bool
) -> FoundModel:
    """Read the model's config and the tokenizer; `view` is the trainer as factories see it. Weights
    that are read later are looked at now, before data is prepared, which takes long."""
    factory = registry.find("model", config.model.type)(config.model, trainer=view)
    spec = factory.create_config()
    ready = (given.get("tokenizer"), given.get("processing_class"))
    tokenizer = next((one for one in ready if one is not None), None)
    if tokenizer is None:
        cls = registry.find("tokenizer", config.tokenizer.type)
        tokenizer = cls(config.tokenizer, spec.path, trainer=view).create_tokenizer()
    if config.eval_samples is not None and not tokenizer.chat_template:
        raise RecipeError("eval_samples: needs tokenizer.chat_template, which the tokenizer lacks")
    num_tokens = 1 + max(tokenizer.get_vocab().values())
    spec = spec.with_room(num_tokens, config.model)
    if reads_weights and given.get("model") is None:
        factory.check_weights(spec)
    return FoundModel(factory, spec, tokenizer)
