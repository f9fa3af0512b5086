"""Writes what is trained as one self-contained HTML page."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from jaxtrain.data.ledger import SetCounts, SourceCounts, format_range
from jaxtrain.data.preview import Sample
from jaxtrain.data.training_data import TrainingData

BARS = 48
WIDTH, HEIGHT = 720, 160
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color: #1b1f24; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } th { border-bottom: 1px solid #888; }
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


def render_page(data: TrainingData, shown: Iterable[Sample], *, title: str, heading: str) -> str:
    ledger = data.ledger
    warnings = [f'<p class="warning">{escape(text)}</p>' for text in ledger.warnings]
    notes = [f"<p>{escape(text)}</p>" for text in ledger.notes]
    lengths = data.train.documents.sequence_lengths[np.unique(data.train.rows.documents)]
    return "\n".join([
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *warnings,
        "<h2>Sources</h2>",
        _render_table(SOURCE_COLUMNS, ledger.sources),
        "<h2>Sets</h2>",
        _render_table(SET_COLUMNS, ledger.sets),
        *notes,
        "<h2>Lengths of the training documents</h2>",
        render_histogram(lengths, data.row_tokens),
        f"<h2>{escape(heading)}</h2>",
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
    "sequences": lambda one: f"{one.rows:,}",
    "tokens per sequence": lambda one: format_range(one.lengths),
    "filled": lambda one: f"{one.fill:.1%}",
    "trained tokens": lambda one: f"{one.trained_tokens:,}",
    "steps": lambda one: f"{one.steps:,}",
}


def _render_table(columns: Mapping[str, Callable[[Any], str]], counted: Sequence[Any]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    cells = [[f"<td>{escape(cell(one))}</td>" for cell in columns.values()] for one in counted]
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def render_histogram(lengths: np.ndarray, row_tokens: int) -> str:
    """Draws document lengths, from 0 to the longest one or to the length of a sequence."""
    longest = max(int(lengths.max()), row_tokens)
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
        f'{" special" if piece.is_special else ""}">{escape(piece.text)}</span>'
        for piece in sample.pieces
    )
    rest = f" … and {sample.left_out:,} more tokens" if sample.left_out else ""
    heading = f"{sample.title}: {sample.tokens:,} tokens, {sample.trained:,} trained"
    return f"<h3>{escape(heading)}</h3><pre>{spans}{rest}</pre>"
