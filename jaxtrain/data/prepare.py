"""From the `data` section of a recipe to the batches of its run."""

from collections.abc import Mapping
from typing import Any

from jaxtrain import registry
from jaxtrain.data.factory import TrainingData
from jaxtrain.data.plan import BatchShape
from jaxtrain.recipe.data import DataConfig
from jaxtrain.recipe.errors import RecipeError


def prepare_data(
    config: DataConfig,
    tokenizer: Any,
    shape: BatchShape,
    *,
    max_positions: int | None,
    tokenize_kwargs: Mapping[str, Any] | None = None,
    trainer: Any = None,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainingData:
    """Rows to batches, for training and for every evaluation set. `max_positions` are those of the
    model; RecipeError for a `max_length` beyond them, or for none at all."""
    max_length = config.max_length or max_positions
    if max_length is None:
        raise RecipeError("data.max_length: is required, since the model's config names no length")
    if max_positions is not None and max_length > max_positions:
        raise RecipeError(
            f"data.max_length: {max_length} is longer than the {max_positions} positions of the "
            "model; write at most that"
        )

    def sources(listed: Any) -> list[Any]:
        return [registry.find("data_source", s.type)(s, trainer=trainer) for s in listed]

    factory = registry.find("data", config.type)(config, tokenizer, max_length, trainer=trainer)
    factory.tokenize_kwargs = tokenize_kwargs or {}
    return factory.prepare(
        sources(config.sources),
        {name: sources(listed) for name, listed in config.eval_sets.items()},
        shape,
        process_index=process_index,
        process_count=process_count,
    )
