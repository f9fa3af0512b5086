"""`jaxtrain data`: prepares a recipe's data and shows what is trained; needs no jax, no weights."""

import math
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.text import Text

from jaxtrain.data.factory import build_data_factory, prepare_data
from jaxtrain.data.plan import BatchShape, TrainingData
from jaxtrain.data.preview import (
    format_legend,
    format_sample,
    iter_batch_samples,
    pick_samples,
    render_page,
)
from jaxtrain.recipe.trainer import TrainerConfig
from jaxtrain.registry import TrainerView

TERMINAL_TOKENS = 400
PAGE_TOKENS = 4000
PAGE_DOCUMENTS = 200


def show_data(
    config: TrainerConfig,
    tokenizer: Any,
    *,
    max_positions: int | None,
    batch: int | None = None,
    html: Path | None = None,
    devices: int | None = None,
) -> TrainingData:
    """Prints the ledger and some documents, or all that step `batch` trains on; writes a page of
    the same when `html` names one."""
    shape = batch_shape(config, devices)
    here = SimpleNamespace(config=config, tokenizer=tokenizer, global_rank=0, world_size=1)
    factory = here.data_factory = build_data_factory(
        config, tokenizer, max_positions=max_positions, trainer=TrainerView(here)
    )
    data = prepare_data(config, factory, shape)
    console = Console(highlight=False, soft_wrap=True)
    for line in data.ledger.lines():
        console.print(Text(line, "yellow" if line.lstrip().startswith("warning:") else ""))
    in_colour = console.color_system is not None
    console.print()
    console.print(format_legend(in_colour=in_colour))
    heading, shown = _choose_samples(data, tokenizer, shape, batch, max_tokens=TERMINAL_TOKENS)
    console.print(Text(heading, "bold"))
    for sample in shown:
        console.print(format_sample(sample, in_colour=in_colour))
    if html is not None:
        heading, shown = _choose_samples(data, tokenizer, shape, batch, max_tokens=PAGE_TOKENS)
        documents = islice(shown, PAGE_DOCUMENTS)
        html.parent.mkdir(parents=True, exist_ok=True)
        page = render_page(data, documents, title="Training data", heading=heading)
        html.write_text(page, "utf-8")
        console.print(f"page: {html}")
    return data


def _choose_samples(
    data: TrainingData, tokenizer: Any, shape: BatchShape, step: int | None, *, max_tokens: int
) -> tuple[str, Any]:
    if step is None:
        return "Some documents", pick_samples(data, tokenizer, max_tokens=max_tokens)
    epoch, place = divmod(step - 1, data.steps_per_epoch)
    heading = (
        f"Step {step}: {place + 1} of {data.steps_per_epoch} of epoch {epoch + 1}, "
        f"{shape.step_sequences} sequences"
    )
    return heading, iter_batch_samples(data, tokenizer, step, max_tokens=max_tokens)


def batch_shape(config: TrainerConfig, devices: int | None) -> BatchShape:
    """Sequences of a step on so many devices; on as many as the recipe's mesh names when None."""
    shards = config.mesh.shards(devices or math.prod(max(1, size) for _, size in config.mesh))
    sequences = config.micro_batch_size * config.data.ROWS_PER_SAMPLE * shards
    return BatchShape(config.gradient_accumulation_steps, sequences)
