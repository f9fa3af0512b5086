"""What this machine's files and folders refute about a recipe: what a run would refuse in its first
minute, found by the run's own functions. Opens no device; fetches and writes nothing.

Imports of jax and transformers stand inside, for recipes whose model is on the hub.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path

from jaxtrain import registry
from jaxtrain.assets import cache_folder, find_cached, is_asset
from jaxtrain.files import why_unwritable
from jaxtrain.recipe.check import find_batch_sizes, list_files
from jaxtrain.recipe.data import FORMATS, HFDataSourceConfig, LocalDataSourceConfig, file_format
from jaxtrain.recipe.errors import Fault, RecipeError, show
from jaxtrain.recipe.mesh import refuse_uneven
from jaxtrain.recipe.resolve import Resolved
from jaxtrain.recipe.section import expand_user, is_path, path_exists
from jaxtrain.recipe.trainer import TrainerConfig


def find_faults(config: TrainerConfig, devices: int | None = None) -> Iterator[Fault]:
    """Yields every fault of the model, the tokenizer, the data files and the output folders, as far
    as they are on this machine; `devices` is their number, if it is known."""
    named = (config.model.name_or_path, config.tokenizer.name_or_path)
    if config.tokenizer.chat_template or any(is_here(name) for name in named if name):
        yield from find_model_faults(config, devices)
    yield from find_missing_data(config)
    yield from find_unwritable(config)


@contextmanager
def all_faults_at_once(resolved: Resolved, devices: int | None) -> Iterator[None]:
    """Adds to the faults that end a start those that it would have met later, as `check` does."""
    try:
        yield
    except RecipeError as error:
        import jax

        more = [*find_faults(resolved.require_config(), devices or len(jax.devices()))]
        known = {fault.what for fault in more}
        own = [fault for fault in error.faults if fault.what not in known]
        raise resolved.with_faults([*own, *more]).error from None


def is_here(name: str) -> bool:
    """Whether a model or tokenizer can only be on this machine, or is an asset in its cache."""
    return find_cached(name) is not None if is_asset(name) else is_path(name)


def find_model_faults(config: TrainerConfig, devices: int | None) -> list[Fault]:
    """Finds the faults of the model's folder, its weights but for their values, the tokenizer, and
    of the recipe's keys beside them."""
    from jax.sharding import AbstractMesh

    from jaxtrain.data.factory import sequence_limit
    from jaxtrain.data.render import Renderer
    from jaxtrain.model import HFModelFactory, decoder
    from jaxtrain.model.config import ComputeConfig
    from jaxtrain.model.context import refuse_context, refuse_length
    from jaxtrain.model.routing import refuse_idle_experts
    from jaxtrain.parallel.sharding import parameter_shardings
    from jaxtrain.tokenizer.load import check_syntax, load_tokenizer, read_template

    faults: list[Fault] = []

    @contextmanager
    def collecting() -> Iterator[None]:
        try:
            yield
        except RecipeError as error:
            faults.extend(error.faults)

    model, tokenizer, spec = config.model, config.tokenizer, None
    factory = HFModelFactory(model)
    if registry.is_built_in("model", model.type) and is_here(model.name_or_path):
        with collecting():
            spec = factory.describe()
        with collecting():
            if spec is not None:
                factory.with_adapters(spec)
    if registry.is_built_in("tokenizer", tokenizer.type):
        with collecting():
            if tokenizer.name_or_path and is_here(tokenizer.name_or_path):
                made = load_tokenizer(tokenizer, Path(tokenizer.name_or_path))
            elif spec is not None and not tokenizer.name_or_path:
                made = load_tokenizer(tokenizer, spec.path)
            else:
                made = None
                if tokenizer.chat_template:
                    check_syntax(read_template(tokenizer.chat_template))
            if made is not None and needs_template(config):
                Renderer(made)
            if made is not None and spec is not None:
                spec = spec.with_room(1 + max(made.get_vocab().values()), model)
    if spec is not None:
        length = 0
        with collecting():
            length = sequence_limit(config.data, spec.config.max_positions)
            refuse_length(spec.config, length)
        shapes = decoder.abstract(spec.config, ComputeConfig()).shapes
        with collecting():
            sizes = config.mesh.sizes(next(iter(find_batch_sizes(config, devices))))
            with collecting():
                refuse_uneven(length, sizes["context"])
            with collecting():
                refuse_context(spec.config, sizes)
            parameter_shardings(AbstractMesh((*sizes.values(),), (*sizes,)), shapes)
        with collecting():
            refuse_idle_experts(config, spec.config)
        with collecting():
            factory.check_weights(spec)
    return faults


def needs_template(config: TrainerConfig) -> bool:
    """Whether text goes through the chat template."""
    if config.eval_samples is not None:
        return True
    kind = config.data.type
    reads_chats = registry.is_built_in("data", kind) and kind != "causal"
    return reads_chats and any(not source.is_tokenised for _, source in config.data.iter_sources())


def find_missing_data(config: TrainerConfig) -> Iterator[Fault]:
    """Yields sources without a file to read."""
    for place, source in config.data.iter_sources():
        if isinstance(source, LocalDataSourceConfig):
            for written in source.paths:
                if "://" not in written and (why := why_no_data(written)):
                    yield Fault(f"{place}.path", why)
        elif isinstance(source, HFDataSourceConfig):
            name = source.name_or_path
            if is_path(name) and not path_exists(name):
                yield Fault(f"{place}.name_or_path", f"no folder {show(name)}")


def why_no_data(written: str) -> str | None:
    """Why a path, glob or folder has no data file; None where it has one."""
    path = expand_user(written)
    if "\0" not in written and path.is_dir():
        if not any(file_format(file.name) for file in path.rglob("*")):
            return f"folder {path} holds no data file; known are {', '.join(FORMATS)}"
    elif not path_exists(written) and ("\0" in written or not glob(str(path), recursive=True)):
        is_pattern = set("*?[") & set(written)
        return f"no file {'matches' if is_pattern else 'or folder'} {written!r}"
    return None


def find_unwritable(config: TrainerConfig) -> Iterator[Fault]:
    """Yields output files and folders that cannot be made or written to."""
    cache = expand_user(config.data.cache_dir or cache_folder())
    outputs = [*list_files(config), ("data.cache_dir", cache)]
    for i, entry in enumerate(config.checkpoint):
        folder = entry.output_dir.replace("{run_dir}", str(config.output_path(None, "")))
        if entry.enabled and "://" not in folder:
            outputs.append((f"checkpoint.{i}.output_dir", expand_user(folder)))
    refused: set[tuple[str, str]] = set()
    for key, path in outputs:
        if (why := why_unwritable(path)) and (key, why) not in refused:
            refused.add((key, why))
            yield Fault(key, f"{path.absolute()}: {why}")
