"""`jaxtrain data`: prepares a recipe's data and shows it on the terminal or an HTML page: what is
trained, what is masked, every special token. Needs no jax, no weights."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from jaxtrain.data.factory import build_data_factory, prepare_data
from jaxtrain.data.ledger import SetCounts, SourceCounts, format_range
from jaxtrain.data.plan import BatchPlan, BatchShape, TrainingData
from jaxtrain.data.stream import Stream
from jaxtrain.recipe.errors import RecipeError, printable
from jaxtrain.recipe.trainer import TrainerConfig
from jaxtrain.registry import TrainerView

TERMINAL_TOKENS = 400
PAGE_TOKENS = 4000
PAGE_DOCUMENTS = 200

STYLES = {
    (True, False): "bold green",
    (True, True): "bold black on green",
    (False, False): "bright_black",
    (False, True): "white on bright_black",
}
"""(trained, special) → style on a terminal."""
NUM_SAMPLES = 4
BARS = 48
WIDTH, HEIGHT = 720, 160
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color: #1b1f24; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } th { border-bottom: 1px solid #888; }
td, h3 { overflow-wrap: anywhere; }
.warning { background: #fff4ce; border-left: 4px solid #d29922; padding: .4rem .8rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #d0d7de; padding: .8rem;
  border-radius: 6px; font-size: 13px; }
.trained { background: #c6f0cf; color: #05350f; } .masked { color: #6b7280; }
.special { outline: 1px solid currentColor; border-radius: 2px; font-weight: 600; }
rect { fill: #2da44e; } line { stroke: #888; } svg text { font-size: 12px; fill: #444; }
@media (prefers-color-scheme: dark) {
  body { color: #e6edf3; background: #0d1117; } .masked { color: #8b949e; }
  .trained { background: #12401d; color: #b6f2c2; } svg text { fill: #b5bdc6; }
  .warning { background: #3b2e05; } pre { border-color: #30363d; }
}
"""


class Piece(NamedTuple):
    """A run of tokens of one kind."""

    text: str
    is_trained: bool
    is_special: bool


class Sample(NamedTuple):
    """A document of a packed sequence."""

    title: str
    pieces: tuple[Piece, ...]
    tokens: int
    trained: int
    left_out: int
    """Tokens after what is shown."""


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
    here = SimpleNamespace(config=config, tokenizer=tokenizer, global_rank=0, world_size=1)
    factory = here.data_factory = build_data_factory(
        config, tokenizer, max_positions=max_positions, trainer=TrainerView(here)
    )
    data = prepare_data(config, factory, batch_shape(config, devices))
    if isinstance(data.train, Stream):
        if batch is not None:
            raise RecipeError("--batch: of data.streaming only the first block is shown; remove it")
        data = replace(data, train=data.train.first_block.plan)
    console = Console(highlight=False, soft_wrap=True)
    for line in data.ledger.lines():
        console.print(
            Text(printable(line), "yellow" if line.lstrip().startswith("warning:") else "")
        )
    in_colour = console.color_system is not None
    console.print()
    console.print(format_legend(in_colour=in_colour))
    heading, pieces = _choose_pieces(_plan_of(data), batch)
    console.print(Text(heading, "bold"))
    for piece in pieces:
        sample = _build_sample(data, tokenizer, piece, TERMINAL_TOKENS)
        console.print(format_sample(sample, in_colour=in_colour))
    if html is not None:
        shown = (_build_sample(data, tokenizer, n, PAGE_TOKENS) for n in pieces[:PAGE_DOCUMENTS])
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(render_page(data, shown, title="Training data", heading=heading), "utf-8")
        console.print(f"page: {html}")
    return data


def batch_shape(config: TrainerConfig, devices: int | None) -> BatchShape:
    """Returns the shape on so many devices; on as many as the recipe's mesh names when None."""
    shards = config.mesh.shards(devices or math.prod(max(1, size) for _, size in config.mesh))
    sequences = config.micro_batch_size * config.data.SEQUENCES_PER_SAMPLE * shards
    return BatchShape(config.gradient_accumulation_steps, sequences)


def _plan_of(data: TrainingData) -> BatchPlan:
    assert isinstance(data.train, BatchPlan)
    return data.train


def _choose_pieces(plan: BatchPlan, step: int | None) -> tuple[str, list[int]]:
    """Chooses the pieces of the training set to show: all that `step`, counted from 1, trains on
    over all processes, or some from every source and every part of the set."""
    if step is not None:
        sequences = plan.sequence_numbers(plan.advance(0, step - 1)).ravel()
        chosen = [piece for s in sequences[sequences >= 0].tolist() for piece in plan.pieces(s)]
        epoch, place = divmod(step - 1, plan.steps_per_epoch)
        heading = (
            f"Step {step}: {place + 1} of {plan.steps_per_epoch} of epoch {epoch + 1}, "
            f"{len(sequences)} sequences"
        )
        return heading, chosen
    sources = plan.documents.index["source"][plan.packing.documents]
    firsts = np.unique(sources, return_index=True)[1].tolist()
    spread = np.linspace(0, len(sources) - 1, NUM_SAMPLES).astype(int).tolist()
    spread = [*firsts, *spread[: max(0, NUM_SAMPLES - len(firsts))]]
    whole = range(plan.together)
    chosen = {piece - piece % plan.together + i for piece in spread for i in whole}
    return "Some documents", sorted(chosen)


def _build_sample(data: TrainingData, tokenizer: Any, piece: int, max_tokens: int) -> Sample:
    plan = _plan_of(data)
    _, starts, lengths, offsets = plan.packing
    sequence = int(np.searchsorted(offsets, piece, side="right")) - 1
    pieces = plan.pieces(sequence)
    place, begin = piece - pieces.start, int(lengths[pieces.start : piece].sum())
    part = slice(begin, begin + int(lengths[piece]))
    batch = plan.fill_batch(np.array([sequence]), data.sequence_tokens)
    tokens, weights = batch.tokens[0, part], batch.loss_weights[0, part]
    origin = plan.origins(sequence)[place]
    title = f"{data.ledger.sources[origin.source].label}, record {origin.record}"
    if plan.together == 1 and (first := int(starts[piece])):
        title += f" from token {first}"
    scores = plan.documents.index["scores"][plan.packing.documents[piece]]
    title += _describe_preference(plan, sequence, scores)
    return Sample(
        title=f"{title} (packed sequence {sequence}, document {place + 1} of {len(pieces)})",
        pieces=tuple(decode_pieces(tokenizer, tokens[:max_tokens], weights[:max_tokens])),
        tokens=len(tokens),
        trained=int(np.count_nonzero(weights)),
        left_out=max(0, len(tokens) - max_tokens),
    )


def _describe_preference(plan: BatchPlan, sequence: int, scores: np.ndarray) -> str:
    """Describes the preference that a sequence belongs to; empty if it is none."""
    side = sequence % plan.together
    score = float(scores[side])
    if plan.together == 1:
        return "" if np.isnan(score) else f", label {str(bool(score)).lower()}"
    reference = "" if np.isnan(score) else f", reference score {score:g}"
    return f", {('chosen', 'rejected')[side]}{reference}"


def decode_pieces(tokenizer: Any, tokens: np.ndarray, weights: np.ndarray) -> Iterator[Piece]:
    """Decodes runs of one kind together, since a character may be several tokens."""
    markup = tokenizer.added_tokens_decoder
    kinds = [
        (bool(weight), int(token) in markup, int(token))
        for token, weight in zip(tokens, weights, strict=True)
    ]
    for (is_trained, is_special), run in groupby(kinds, key=lambda kind: kind[:2]):
        text = tokenizer.decode([token for *_, token in run], skip_special_tokens=False)
        yield Piece(text, is_trained, is_special)


def format_sample(sample: Sample, *, in_colour: bool) -> Text:
    """Formats a sample for the terminal, with ⟦ and ⟧ around trained text if without colours."""
    line = Text(
        f"── {printable(sample.title)}: {sample.tokens} tokens, {sample.trained} trained\n", "cyan"
    )
    was_trained = False
    for piece in sample.pieces:
        if not in_colour and piece.is_trained != was_trained:
            line.append("⟦" if piece.is_trained else "⟧")
            was_trained = piece.is_trained
        text = printable(piece.text).replace("\n", "⏎\n")
        line.append(text, STYLES[piece.is_trained, piece.is_special])
    if was_trained:
        line.append("⟧")
    if sample.left_out:
        line.append(f" … and {sample.left_out} more tokens", "cyan")
    return line


def format_legend(*, in_colour: bool) -> Text:
    if not in_colour:
        return Text("trained text is between ⟦ and ⟧, all other text is masked; ⏎ ends a line")
    parts: Sequence[Any] = (
        ("trained", STYLES[True, False]), " ", ("trained special", STYLES[True, True]), " ",
        ("masked", STYLES[False, False]), " ", ("masked special", STYLES[False, True]),
        " ⏎ ends a line",
    )  # fmt: skip
    return Text.assemble(*parts)


def render_page(data: TrainingData, shown: Iterable[Sample], *, title: str, heading: str) -> str:
    ledger = data.ledger
    warnings = [f'<p class="warning">{_escape(text)}</p>' for text in ledger.warnings]
    notes = [f"<p>{_escape(text)}</p>" for text in ledger.notes]
    plan = _plan_of(data)
    lengths = plan.documents.sequence_lengths[np.unique(plan.packing.documents)]
    return "\n".join([
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{_escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{_escape(title)}</h1>",
        *warnings,
        "<h2>Sources</h2>",
        _render_table(SOURCE_COLUMNS, ledger.sources),
        "<h2>Sets</h2>",
        _render_table(SET_COLUMNS, ledger.sets),
        *notes,
        "<h2>Lengths of the training documents</h2>",
        render_histogram(lengths, data.sequence_tokens),
        f"<h2>{_escape(heading)}</h2>",
        '<p><span class="trained">trained</span> <span class="masked">masked</span> '
        '<span class="special">special token</span></p>',
        *(_render_sample(sample) for sample in shown),
        "</body></html>",
    ])  # fmt: skip


SOURCE_COLUMNS: dict[str, Callable[[SourceCounts], str]] = {
    "source": lambda one: one.label,
    "records": lambda one: f"{one.rows:,}",
    "dropped": lambda one: "; ".join(f"{n} {why}" for why, n in one.dropped.most_common()) or "0",
    "truncated": lambda one: f"{one.truncated:,}",
    "documents": lambda one: f"{one.documents:,}",
    "tokens": lambda one: f"{one.tokens:,}",
    "trained": lambda one: f"{one.trained_tokens / max(one.tokens, 1):.1%}",
    "end of turn": lambda one: f"{one.ended_turns / one.turns:.1%}" if one.turns else "",
}
SET_COLUMNS: dict[str, Callable[[SetCounts], str]] = {
    "set": lambda one: one.label,
    "documents": lambda one: f"{one.documents:,}",
    "sequences": lambda one: f"{one.sequences:,}",
    "tokens per sequence": lambda one: format_range(one.lengths),
    "filled": lambda one: f"{one.fill:.1%}",
    "trained tokens": lambda one: f"{one.trained_tokens:,}",
    "steps": lambda one: f"{one.steps:,}",
}


def _render_table(columns: Mapping[str, Callable[[Any], str]], counted: Sequence[Any]) -> str:
    head = "".join(f"<th>{_escape(name)}</th>" for name in columns)
    cells = [[f"<td>{_escape(cell(one))}</td>" for cell in columns.values()] for one in counted]
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def render_histogram(lengths: np.ndarray, max_tokens: int) -> str:
    """Draws document lengths, from 0 to the longest one or to the length of a sequence."""
    longest = max(int(lengths.max()), max_tokens)
    counts, edges = np.histogram(lengths, bins=min(BARS, longest), range=(0, longest))
    width, tallest, bars = WIDTH / len(counts), int(counts.max()), []
    for i in np.flatnonzero(counts).tolist():
        height = max(1.0, HEIGHT * int(counts[i]) / tallest)
        title = f"{edges[i]:.0f} to {edges[i + 1]:.0f} tokens: {counts[i]:,} documents"
        bars.append(
            f'<rect x="{i * width:.1f}" y="{HEIGHT - height:.1f}" width="{width - 1:.1f}" '
            f'height="{height:.1f}"><title>{title}</title></rect>'
        )
    return (
        f'<svg id="lengths" viewBox="0 0 {WIDTH} {HEIGHT + 24}" width="{WIDTH}" role="img" '
        f'aria-label="document lengths">{"".join(bars)}'
        f'<line x1="0" x2="{WIDTH}" y1="{HEIGHT}" y2="{HEIGHT}"/>'
        f'<text x="0" y="{HEIGHT + 18}">0</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 18}" text-anchor="end">{longest:,} tokens</text></svg>'
    )


def _render_sample(sample: Sample) -> str:
    spans = "".join(
        f'<span class="{"trained" if piece.is_trained else "masked"}'
        f'{" special" if piece.is_special else ""}">{_escape(piece.text)}</span>'
        for piece in sample.pieces
    )
    rest = f" … and {sample.left_out:,} more tokens" if sample.left_out else ""
    heading = f"{sample.title}: {sample.tokens:,} tokens, {sample.trained:,} trained"
    return f"<h3>{_escape(heading)}</h3><pre>{spans}{rest}</pre>"


def _escape(text: str) -> str:
    """Text that a browser shows as it is, control characters too."""
    return escape(printable(text))
