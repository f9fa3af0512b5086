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
from jaxtrain.recipe.trainer import TrainerConfig

GivenRows = Iterable[dict[str, Any]]
"""Rows as a source gives them."""


def sequence_limit(config: DataConfig, max_positions: int | None) -> int:
    """Tokens of a sequence, of which the model has `max_positions` at most; RecipeError where
    neither names a length, or the recipe a longer one."""
    length = config.max_length or max_positions
    if length is None:
        raise RecipeError("data.max_length: is required, since the model's config names no length")
    if max_positions is not None and length > max_positions:
        raise RecipeError(
            f"data.max_length: {length} is longer than the {max_positions} positions of the "
            "model; write at most that"
        )
    return length


def build_data_factory(
    recipe: TrainerConfig, tokenizer: Any, *, max_positions: int | None, trainer: Any = None
) -> DataFactory:
    """The factory that the `data` section names; see `sequence_limit` for what it refuses."""
    config, max_length = recipe.data, sequence_limit(recipe.data, max_positions)
    factory = registry.find("data", config.type)(config, tokenizer, max_length, trainer=trainer)
    factory.tokenize_kwargs = recipe.tokenizer.tokenize_kwargs
    return factory


def prepare_data(
    recipe: TrainerConfig,
    factory: DataFactory,
    shape: BatchShape,
    *,
    train_data: GivenRows | None = None,
    eval_data: GivenRows | Mapping[str, GivenRows] | None = None,
) -> TrainingData:
    """Rows to batches, for training and for every evaluation set; given rows stand in for the
    recipe's sources, as one set or by the names of several."""
    config = factory.config
    train = _build_sources(config.sources, factory)
    evals = {name: _build_sources(listed, factory) for name, listed in config.eval_sets.items()}
    if train_data is not None:
        train = [GivenSource.from_records(train_data, config.sources[0])]
    if eval_data is not None:
        if config.train_eval_split[1]:
            raise RecipeError("data.train_eval_split: excludes eval_data; remove one")
        named: Any = eval_data if isinstance(eval_data, Mapping) else {"eval": eval_data}
        evals = {name: [GivenSource.from_records(rows)] for name, rows in named.items()}
    return factory.prepare(train, evals, shape).repeated(
        min_updates=recipe.min_iterations, first_only=recipe.overfit_first_batch
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
        sources = _build_sources(parse_eval_sources(rows, factory.config), factory)
    else:
        sources = [GivenSource.from_records(rows)]
    return factory.evaluation(sources, shape, lengths=lengths)


def _build_sources(listed: Iterable[Any], factory: DataFactory) -> list[DataSource]:
    sources = [registry.find("data_source", s.type)(s, factory.trainer) for s in listed]
    for source in sources:
        source.data_factory = factory
    return sources
