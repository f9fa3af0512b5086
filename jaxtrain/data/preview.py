"""Documents and batches as a person reads them: what is trained, what is masked, every special
token visible."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from rich.text import Text

from jaxtrain.data.plan import BatchPlan
from jaxtrain.data.training_data import TrainingData

STYLES = {
    (True, False): "bold green",
    (True, True): "bold black on green",
    (False, False): "bright_black",
    (False, True): "white on bright_black",
}
"""(trained, special) → style on a terminal."""
SHOWN_DOCUMENTS = 4


class Piece(NamedTuple):
    """Neighbouring tokens of one kind."""

    text: str
    is_trained: bool
    is_special: bool


class Sample(NamedTuple):
    """A document as it stands in a row."""

    title: str
    pieces: tuple[Piece, ...]
    tokens: int
    trained: int
    left_out: int
    """Tokens behind what is shown."""


def samples(data: TrainingData, tokenizer: Any, *, most_tokens: int) -> list[Sample]:
    """Some documents of the training set, from every source and every part of it."""
    plan = data.train
    sources = plan.documents.index["source"][plan.rows.documents]
    firsts = np.unique(sources, return_index=True)[1].tolist()
    spread = np.linspace(0, len(sources) - 1, SHOWN_DOCUMENTS).astype(int).tolist()
    spread = [*firsts, *spread[: max(0, SHOWN_DOCUMENTS - len(firsts))]]
    whole = range(plan.together)
    chosen = sorted({piece - piece % plan.together + i for piece in spread for i in whole})
    return [_sample(data, tokenizer, piece, most_tokens) for piece in chosen]


def batch_samples(
    data: TrainingData, tokenizer: Any, step: int, *, most_tokens: int
) -> Iterator[Sample]:
    """Every document that update `step`, counted from 1, trains on, over all processes."""
    rows = data.train.row_numbers(step - 1).ravel()
    for row in rows[rows >= 0].tolist():
        for piece in data.train.pieces(row):
            yield _sample(data, tokenizer, piece, most_tokens)


def _sample(data: TrainingData, tokenizer: Any, piece: int, most_tokens: int) -> Sample:
    plan = data.train
    row = int(np.searchsorted(plan.rows.offsets, piece, side="right")) - 1
    pieces = plan.pieces(row)
    place = piece - pieces.start
    ends = np.cumsum(plan.rows.lengths[pieces])
    part = slice(int(ends[place] - plan.rows.lengths[piece]), int(ends[place]))
    batch = plan.filled(np.array([row]), plan.row_tokens)
    tokens, weights = batch.tokens[0, part], batch.loss_weights[0, part]
    origin = plan.origins(row)[place]
    title = f"{data.ledger.sources[origin.source].label}, row {origin.row}"
    if plan.together == 1 and (first := int(plan.rows.starts[piece])):
        title += f" from token {first}"
    title += _preference(plan, row, plan.documents.index["scores"][plan.rows.documents[piece]])
    return Sample(
        title=f"{title} (packed row {row}, document {place + 1} of {len(pieces)})",
        pieces=tuple(pieces_of(tokenizer, tokens[:most_tokens], weights[:most_tokens])),
        tokens=len(tokens),
        trained=int(np.count_nonzero(weights)),
        left_out=max(0, len(tokens) - most_tokens),
    )


def _preference(plan: BatchPlan, row: int, scores: np.ndarray) -> str:
    """What the data set says of a sequence; nothing where it is no preference."""
    side = row % plan.together
    score = float(scores[side])
    if plan.together == 1:
        return "" if np.isnan(score) else f", label {str(bool(score)).lower()}"
    reference = "" if np.isnan(score) else f", reference score {score:g}"
    return f", {('chosen', 'rejected')[side]}{reference}"


def pieces_of(tokenizer: Any, tokens: np.ndarray, weights: np.ndarray) -> Iterator[Piece]:
    """Runs of one kind are decoded together, since a character may be several tokens."""
    markup = tokenizer.added_tokens_decoder
    kinds = [
        (bool(weight), int(token) in markup, int(token))
        for token, weight in zip(tokens, weights, strict=True)
    ]
    for (is_trained, is_special), run in groupby(kinds, key=lambda kind: kind[:2]):
        text = tokenizer.decode([token for *_, token in run], skip_special_tokens=False)
        yield Piece(text, is_trained, is_special)


def as_text(sample: Sample, *, in_colour: bool) -> Text:
    """For the terminal. Without colours, what is trained stands between ⟦ and ⟧."""
    shown = Text(f"── {sample.title}: {sample.tokens} tokens, {sample.trained} trained\n", "cyan")
    was_trained = False
    for piece in sample.pieces:
        if not in_colour and piece.is_trained != was_trained:
            shown.append("⟦" if piece.is_trained else "⟧")
            was_trained = piece.is_trained
        text = piece.text.replace("\n", "⏎\n")
        shown.append(text, STYLES[piece.is_trained, piece.is_special])
    if was_trained:
        shown.append("⟧")
    if sample.left_out:
        shown.append(f" … and {sample.left_out} tokens more", "cyan")
    return shown


def legend(*, in_colour: bool) -> Text:
    if not in_colour:
        return Text("trained text stands between ⟦ and ⟧, all other text is masked; ⏎ ends a line")
    parts: Sequence[Any] = (
        ("trained", STYLES[True, False]), " ", ("trained special", STYLES[True, True]), " ",
        ("masked", STYLES[False, False]), " ", ("masked special", STYLES[False, True]),
        " ⏎ ends a line",
    )  # fmt: skip
    return Text.assemble(*parts)
