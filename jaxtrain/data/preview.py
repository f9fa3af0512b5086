"""Shows documents and batches to a person: what is trained, what is masked, every special token."""

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
NUM_SAMPLES = 4


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


def pick_samples(data: TrainingData, tokenizer: Any, *, max_tokens: int) -> list[Sample]:
    """Picks some documents of the training set, from every source and every part of the set."""
    plan = data.train
    sources = plan.documents.index["source"][plan.rows.documents]
    firsts = np.unique(sources, return_index=True)[1].tolist()
    spread = np.linspace(0, len(sources) - 1, NUM_SAMPLES).astype(int).tolist()
    spread = [*firsts, *spread[: max(0, NUM_SAMPLES - len(firsts))]]
    whole = range(plan.together)
    chosen = sorted({piece - piece % plan.together + i for piece in spread for i in whole})
    return [_build_sample(data, tokenizer, piece, max_tokens) for piece in chosen]


def iter_batch_samples(
    data: TrainingData, tokenizer: Any, step: int, *, max_tokens: int
) -> Iterator[Sample]:
    """Yields every document that step `step`, counted from 1, trains on, over all processes."""
    sequences = data.train.row_numbers(step - 1).ravel()
    for sequence in sequences[sequences >= 0].tolist():
        for piece in data.train.pieces(sequence):
            yield _build_sample(data, tokenizer, piece, max_tokens)


def _build_sample(data: TrainingData, tokenizer: Any, piece: int, max_tokens: int) -> Sample:
    plan = data.train
    sequence = int(np.searchsorted(plan.rows.offsets, piece, side="right")) - 1
    pieces = plan.pieces(sequence)
    place = piece - pieces.start
    ends = np.cumsum(plan.rows.lengths[pieces])
    part = slice(int(ends[place] - plan.rows.lengths[piece]), int(ends[place]))
    batch = plan.filled(np.array([sequence]), plan.row_tokens)
    tokens, weights = batch.tokens[0, part], batch.loss_weights[0, part]
    origin = plan.origins(sequence)[place]
    title = f"{data.ledger.sources[origin.source].label}, record {origin.row}"
    if plan.together == 1 and (first := int(plan.rows.starts[piece])):
        title += f" from token {first}"
    scores = plan.documents.index["scores"][plan.rows.documents[piece]]
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
    line = Text(f"── {sample.title}: {sample.tokens} tokens, {sample.trained} trained\n", "cyan")
    was_trained = False
    for piece in sample.pieces:
        if not in_colour and piece.is_trained != was_trained:
            line.append("⟦" if piece.is_trained else "⟧")
            was_trained = piece.is_trained
        text = piece.text.replace("\n", "⏎\n")
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
