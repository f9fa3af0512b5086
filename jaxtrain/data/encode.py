"""Conversations to tokens with loss weights: one tokenisation of the rendered text, by offsets."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from jaxtrain.data.conversation import Conversation, to_conversation
from jaxtrain.data.documents import NO_SCORES
from jaxtrain.data.render import Renderer
from jaxtrain.data.spans import Span
from jaxtrain.recipe.errors import DataError

OVERLONG = "longer than max_length"
UNTRAINED = "no assistant text to train on"
CUT_AWAY = "no assistant text left after truncation"
NOTHING = "renders to nothing"
EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
HEAD_CHARACTERS = 5
"""So many for each token that a row holds are nearly always more tokens than that."""


class Encoded(NamedTuple):
    """A document."""

    tokens: np.ndarray
    """int32 [n]"""
    weights: np.ndarray
    """uint8 [n]: weight of the prediction of token t; 0 for the first"""
    turns: int
    """Assistant turns that are trained, and those of them whose last token ends a turn."""
    ended: int
    truncated: bool
    border: int | None = None
    """Of a preference: where the rejected reply's sequence begins."""
    scores: tuple[float, float] = NO_SCORES
    hides_system: bool = False
    """Does the template leave the system's text out of this conversation?"""


class Dropped(NamedTuple):
    reason: str
    length: int
    """In tokens; of a text far beyond the limit, only those that were counted."""


class Fault(NamedTuple):
    """What is wrong with a row, as text, since it may come from another process."""

    what: str
    has_place: bool = False
    """Whether the text names the row already."""


Overlong = Literal["drop", "truncate", "error"]
Outcome = Encoded | Dropped | Fault


class ConversationEncoder:
    """Holds all that decides a document's tokens and weights, and nothing else; can be pickled."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        overlong: Overlong,
        mask_inputs: bool = True,
        loss_roles: Sequence[str] = ("assistant",),
        completion_only: bool = True,
        ignore_empty_think: bool = False,
    ):
        self._backend = plain_backend(tokenizer)
        self._renderer = Renderer(tokenizer)
        self._max_length = max_length
        self._overlong: Overlong = overlong
        self._mask_inputs = mask_inputs
        self._loss_roles = tuple(loss_roles)
        self._completion_only = completion_only
        self._ignore_empty_think = ignore_empty_think
        self._markup = frozenset(tokenizer.added_tokens_decoder)
        self._borders = borders(tokenizer)

    def read(self, row: Mapping[str, Any]) -> Conversation:
        return to_conversation(row)

    def encode(self, conversations: Sequence[Conversation]) -> list[Outcome]:
        """One outcome a conversation, in order; no outcome depends on the others."""
        outcomes: list[Outcome] = [Dropped(NOTHING, 0)] * len(conversations)
        texts: dict[int, str] = {}
        for index, conversation in enumerate(conversations):
            try:
                texts[index] = self._renderer.text(conversation)
            except DataError as fault:
                outcomes[index] = Fault(str(fault))
        texts = {index: text for index, text in texts.items() if text}
        encodings = self._encodings(list(texts.values()))
        for (index, text), encoding in zip(texts.items(), encodings, strict=True):
            try:
                outcomes[index] = self._outcome(conversations[index], text, encoding)
            except DataError as fault:
                outcomes[index] = Fault(str(fault))
        return outcomes

    def _encodings(self, texts: list[str]) -> list[Encoding]:
        """Of each text, or of so much of it that is longer than a row."""
        # The template has written BOS already where it belongs.
        encode = self._backend.encode_batch
        heads = [self._head(text) for text in texts]
        encodings = encode(heads, add_special_tokens=False)
        short = [
            index
            for index, encoding in enumerate(encodings)
            if heads[index] != texts[index] and not self._is_head(encoding)
        ]
        whole = encode([texts[index] for index in short], add_special_tokens=False)
        for index, encoding in zip(short, whole, strict=True):
            encodings[index] = encoding
        return encodings

    def _head(self, text: str) -> str:
        """What stands behind a row's length is cut or dropped anyway. A tokenizer splits a text at
        added tokens before all else, so that what precedes one does not depend on what follows."""
        if self._overlong == "error" or self._borders is None:
            return text
        border = self._borders.search(text, HEAD_CHARACTERS * self._max_length)
        return text[: border.end()] if border else text

    def _is_head(self, encoding: Encoding) -> bool:
        return len(encoding) > self._max_length and encoding.ids[-1] in self._markup

    def _outcome(self, conversation: Conversation, text: str, encoding: Encoding) -> Outcome:
        length = len(encoding)
        if length == 0:
            return Dropped(NOTHING, 0)
        if refused := beyond_limit(length, self._max_length, self._overlong):
            return refused
        tokens = np.array(encoding.ids[: self._max_length], dtype=np.int32)
        is_pair = conversation.prompt_turns > 0
        if self._mask_inputs and (self._completion_only or not is_pair):
            spans = self._spans(conversation, text)
            weights, turns, ended = self._weights(tokens, encoding, text, spans)
        else:
            weights, turns, ended = np.ones(len(tokens), dtype=np.uint8), 0, 0
        weights[0] = 0  # nothing stands before it that could predict it
        if not weights.any():
            return Dropped(CUT_AWAY if length > self._max_length else UNTRAINED, length)
        first = conversation.messages[0]
        hides_system = (
            first["role"] in ("system", "developer") and first["content"].strip() not in text
        )
        return Encoded(
            tokens, weights, turns, ended, length > self._max_length, hides_system=hides_system
        )

    def _spans(self, conversation: Conversation, text: str) -> list[Span]:
        spans = self._renderer.spans(conversation, text, self._loss_roles)
        if not self._ignore_empty_think:
            return spans
        return [
            span._replace(start=found.end())
            if (found := EMPTY_THINK.match(text, span.start, span.end))
            else span
            for span in spans
        ]

    def _weights(
        self, tokens: np.ndarray, encoding: Encoding, text: str, spans: Sequence[Span]
    ) -> tuple[np.ndarray, int, int]:
        """uint8 [n], the number of trained turns, and how many of them end in an end-of-turn."""
        weights = np.zeros(len(tokens), dtype=np.uint8)
        turns = ended = last = 0
        for span in spans:
            first, last = self._token_range(tokens, encoding, text, span, last)
            if first < last:
                weights[first:last] = 1
                turns += 1
                ended += int(tokens[last - 1]) in self._markup
        return weights, turns, ended

    def _token_range(
        self, tokens: np.ndarray, encoding: Encoding, text: str, span: Span, begin: int
    ) -> tuple[int, int]:
        """The tokens [first, last) of a span, from token `begin` on.

        A token over the edge counts if only white space of it lies outside: many tokenizers bind
        a blank to the word behind it. White space after the end-of-turn token does not count: the
        model is stopped there."""

        def chars(index: int) -> tuple[int, int]:
            place = encoding.token_to_chars(index)
            assert place is not None, "a token that is of no text"
            return place

        def starts(index: int) -> int:
            return chars(index)[0]

        def ends(index: int) -> int:
            return chars(index)[1]

        places = range(len(tokens))  # a list of all offsets would cost more than a few look-ups
        first = bisect_right(places, span.start, begin, key=ends)
        last = bisect_left(places, span.end, first, key=starts)
        if first < last and text[starts(first) : span.start].strip():
            first += 1
        if first < last and text[span.end : ends(last - 1)].strip():
            last -= 1
        if first >= last or text[ends(len(tokens) - 1) : span.end].strip():  # the row is cut here
            return first, last
        end = min(span.end, ends(last - 1))
        closing = (i for i in range(last - 1, first - 1, -1) if int(tokens[i]) in self._markup)
        index = next(closing, None)
        if index is not None and not text[ends(index) : end].strip():
            last = index + 1
        return first, last


def plain_backend(tokenizer: Any) -> Tokenizer:
    """What tokenises whole texts. Truncation and padding are states that any call may leave."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def borders(tokenizer: Any) -> re.Pattern[str] | None:
    """Finds added tokens that stand for themselves wherever they are written."""
    added = tokenizer.added_tokens_decoder.values()
    plain = [
        re.escape(token.content)
        for token in added
        if not (token.single_word or token.normalized)
        and sum(token.content in other.content for other in added) == 1
    ]
    return re.compile("|".join(plain)) if plain else None


def beyond_limit(length: int, max_length: int, rule: Overlong) -> Dropped | Fault | None:
    """What becomes of a row of so many tokens; None for one that is taken, cut or whole."""
    if length <= max_length or rule == "truncate":
        return None
    if rule == "drop":
        return Dropped(OVERLONG, length)
    return Fault(
        f"{length} tokens, but max_length is {max_length}; set data.overlong to drop or truncate, "
        f"or raise data.max_length"
    )
