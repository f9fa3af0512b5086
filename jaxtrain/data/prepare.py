"""From the `data` section of a recipe to the batches of its run."""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxtrain import registry
from jaxtrain.data.factory import DataFactory
from jaxtrain.data.given import GivenSource
from jaxtrain.data.plan import BatchPlan, BatchShape
from jaxtrain.data.source import DataSource
from jaxtrain.data.training_data import TrainingData
from jaxtrain.recipe.data import DataConfig
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.resolve import parse_eval_sources

GivenRows = Iterable[dict[str, Any]]
"""Rows as a source gives them."""


def data_factory(
    config: DataConfig,
    tokenizer: Any,
    *,
    max_positions: int | None,
    tokenize_kwargs: Mapping[str, Any],
    trainer: Any = None,
) -> DataFactory:
    """`max_positions` are those of the model; RecipeError for a `max_length` beyond them, or for
    none at all."""
    max_length = config.max_length or max_positions
    if max_length is None:
        raise RecipeError("data.max_length: is required, since the model's config names no length")
    if max_positions is not None and max_length > max_positions:
        raise RecipeError(
            f"data.max_length: {max_length} is longer than the {max_positions} positions of the "
            "model; write at most that"
        )
    factory = registry.find("data", config.type)(config, tokenizer, max_length, trainer=trainer)
    factory.tokenize_kwargs = tokenize_kwargs
    return factory


def prepare_data(
    factory: DataFactory,
    shape: BatchShape,
    *,
    train_data: GivenRows | None = None,
    eval_data: GivenRows | Mapping[str, GivenRows] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainingData:
    """Rows to batches, for training and for every evaluation set; given rows stand in for the
    recipe's sources, as one set or by the names of several."""
    config, trainer = factory.config, factory.trainer
    train = _made(config.sources, trainer)
    evals = {name: _made(listed, trainer) for name, listed in config.eval_sets.items()}
    if train_data is not None:
        train = [GivenSource.of(train_data, config.sources[0])]
    if eval_data is not None:
        if config.train_eval_split[1]:
            raise RecipeError("data.train_eval_split: excludes eval_data; remove one")
        named: Any = eval_data if isinstance(eval_data, Mapping) else {"eval": eval_data}
        evals = {name: [GivenSource.of(rows)] for name, rows in named.items()}
    return factory.prepare(
        train, evals, shape, process_index=process_index, process_count=process_count
    )


def prepare_evaluation(
    factory: DataFactory, dataset: Any, shape: BatchShape, *, lengths: tuple[int, ...]
) -> BatchPlan:
    """The batches of a data set that is none of the recipe's: rows, or what a recipe may write
    under `data.eval_sources`, maps with their `type`."""
    rows: list[Any] = [dataset] if isinstance(dataset, str) else list(dataset)
    first = rows[0] if rows else None
    kind = first.get("type") if isinstance(first, Mapping) else None
    if isinstance(first, str) or kind in registry.names("data_source"):
        sources = _made(parse_eval_sources(rows, factory.config), factory.trainer)
    else:
        sources = [GivenSource.of(rows)]
    return factory.evaluation(sources, shape, lengths=lengths)


def _made(listed: Iterable[Any], trainer: Any) -> list[DataSource]:
    return [registry.find("data_source", s.type)(s, trainer=trainer) for s in listed]
