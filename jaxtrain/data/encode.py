"""Encodes records as tokens with loss weights: conversations, plain text, and tokens as they are.

The text that a conversation renders to is tokenised once; offsets tell which tokens are trained.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from tokenizers import Encoding, Tokenizer

from jaxtrain.data.conversation import Conversation, read_conversation
from jaxtrain.data.records import get_column, get_text
from jaxtrain.data.render import Renderer, check_characters
from jaxtrain.data.spans import Span
from jaxtrain.recipe.errors import DataError, RecipeError, show

OVERLONG = "longer than max_length"
UNTRAINED = "no assistant text to train on"
CUT_AWAY = "no assistant text left after truncation"
NOTHING = "renders to nothing"
EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
HEAD_CHARACTERS_PER_TOKEN = 5
"""A text of this many characters per token of `max_length` is nearly always longer than it."""
IGNORED = -100
"""The label of a token that is not trained."""
NO_SCORES = (float("nan"), float("nan"))


class Encoded(NamedTuple):
    """The tokens of one document, and what the ledger counts of it."""

    tokens: np.ndarray
    """int32 [n]"""
    weights: np.ndarray
    """uint8 [n]: loss weight of the prediction of token t; 0 for the first"""
    turns: int = 0
    """Trained assistant turns."""
    ended: int = 0
    """Trained turns whose last token ends a turn."""
    truncated: bool = False
    rejected_start: int | None = None
    """First token of the rejected sequence of a preference."""
    scores: tuple[float, float] = NO_SCORES
    hides_system: bool = False
    """Whether the template leaves the system text out of this conversation."""


class Dropped(NamedTuple):
    reason: str
    length: int
    """Tokens, as far as they were counted: a text far beyond the limit is cut first."""


class Fault(NamedTuple):
    """What is wrong with a record, as text, since it may come from another process."""

    message: str
    names_record: bool = False
    """Whether the message names the record already."""


Overlong = Literal["drop", "truncate", "error"]
Outcome = Encoded | Dropped | Fault


class Encoder(Protocol):
    """Turns records of a source into documents; holds all that decides tokens and weights, and can
    be pickled."""

    def read(self, record: Mapping[str, Any], /) -> Any:
        """Takes what it needs from a record; `DataError` names the field at fault."""
        ...

    def encode(self, items: Sequence[Any], /) -> list[Outcome]:
        """Returns one outcome per item that was read, independent of the others."""
        ...


@dataclass
class ConversationEncoder:
    """Encodes conversations."""

    tokenizer: Any
    _: KW_ONLY
    max_length: int
    overlong: Overlong
    mask_inputs: bool = True
    loss_roles: Sequence[str] = ("assistant",)
    completion_only: bool = True
    ignore_empty_think: bool = False

    def __post_init__(self):
        self._backend = prepare_backend(self.tokenizer)
        self._renderer = Renderer(self.tokenizer)
        self._markup = frozenset(self.tokenizer.added_tokens_decoder)
        self._added_tokens = compile_added_tokens(self.tokenizer)

    def read(self, record: Mapping[str, Any]) -> Conversation:
        return read_conversation(record)

    def encode(self, conversations: Sequence[Conversation]) -> list[Outcome]:
        rendered = [catch_fault(self._renderer.render, one) for one in conversations]
        encodings = iter(self._tokenise([text for text in rendered if isinstance(text, str)]))
        return [
            text
            if isinstance(text, Fault)
            else catch_fault(self._encode_one, conversation, text, next(encodings))
            for conversation, text in zip(conversations, rendered, strict=True)
        ]

    def _tokenise(self, texts: list[str]) -> list[Encoding]:
        """Tokenises each text, or a head of it that is longer than `max_length` already."""
        # No special tokens are added: the template has written BOS where it belongs.
        encode = self._backend.encode_batch
        heads = [self._take_head(text) for text in texts]
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

    def _take_head(self, text: str) -> str:
        """Returns a head of the text that is likely longer than `max_length`. It ends at an added
        token, where a tokenizer splits a text first, so that it does not depend on the rest."""
        if self.overlong == "error" or self._added_tokens is None:
            return text
        added_token = self._added_tokens.search(text, HEAD_CHARACTERS_PER_TOKEN * self.max_length)
        return text[: added_token.end()] if added_token else text

    def _is_head(self, encoding: Encoding) -> bool:
        return len(encoding) > self.max_length and encoding.ids[-1] in self._markup

    def _encode_one(self, conversation: Conversation, text: str, encoding: Encoding) -> Outcome:
        length = len(encoding)
        if not text or length == 0:
            return Dropped(NOTHING, 0)
        if refused := check_length(length, self.max_length, self.overlong):
            return refused
        tokens = np.array(encoding.ids[: self.max_length], dtype=np.int32)
        is_pair = conversation.prompt_turns > 0
        if self.mask_inputs and (self.completion_only or not is_pair):
            spans = self._find_spans(conversation, text)
            weights, turns, ended = self._weigh_tokens(tokens, encoding, text, spans)
        else:
            weights, turns, ended = np.ones(len(tokens), dtype=np.uint8), 0, 0
        weights[0] = 0  # nothing stands before it that could predict it
        if not weights.any():
            return Dropped(CUT_AWAY if length > self.max_length else UNTRAINED, length)
        first, is_cut = conversation.messages[0], length > self.max_length
        is_system = first["role"] in ("system", "developer")
        hides_system = is_system and first["content"].strip() not in text
        return Encoded(tokens, weights, turns, ended, is_cut, hides_system=hides_system)

    def _find_spans(self, conversation: Conversation, text: str) -> list[Span]:
        spans = self._renderer.find_spans(conversation, text, self.loss_roles)
        if not self.ignore_empty_think:
            return spans
        thoughts = [EMPTY_THINK.match(text, span.start, span.end) for span in spans]
        pairs = zip(spans, thoughts, strict=True)
        return [span._replace(start=found.end()) if found else span for span, found in pairs]

    def _weigh_tokens(
        self, tokens: np.ndarray, encoding: Encoding, text: str, spans: Sequence[Span]
    ) -> tuple[np.ndarray, int, int]:
        """Returns the weights, uint8 [n], and the numbers of trained and of ended turns."""
        weights = np.zeros(len(tokens), dtype=np.uint8)
        turns = ended = last = 0
        for span in spans:
            first, last = self._find_token_range(tokens, encoding, text, span, last)
            if first < last:
                weights[first:last] = 1
                turns += 1
                ended += int(tokens[last - 1]) in self._markup
        return weights, turns, ended

    def _find_token_range(
        self, tokens: np.ndarray, encoding: Encoding, text: str, span: Span, begin: int
    ) -> tuple[int, int]:
        """Finds the tokens [first, last) of a span, from token `begin` on.

        A token across the edge counts if only white space of it lies outside: many tokenizers bind
        a blank to the next word. White space after the end-of-turn token does not count, since
        generation stops there."""

        def chars(index: int) -> tuple[int, int]:
            place = encoding.token_to_chars(index)
            assert place is not None, "a token without text"
            return place

        starts = lambda index: chars(index)[0]
        ends = lambda index: chars(index)[1]
        places = range(len(tokens))  # a list of all offsets would cost more than a few look-ups
        first = bisect_right(places, span.start, begin, key=ends)
        last = bisect_left(places, span.end, first, key=starts)
        if first < last and text[starts(first) : span.start].strip():
            first += 1
        if first < last and text[span.end : ends(last - 1)].strip():
            last -= 1
        if first >= last or text[ends(len(tokens) - 1) : span.end].strip():  # cut in this span
            return first, last
        end = min(span.end, ends(last - 1))
        closing = (i for i in range(last - 1, first - 1, -1) if int(tokens[i]) in self._markup)
        index = next(closing, None)
        if index is not None and not text[ends(index) : end].strip():
            last = index + 1
        return first, last


@dataclass
class TextEncoder:
    """Puts text between BOS, if there is one, and EOS, and trains every token but the first."""

    tokenizer: Any
    column: str
    kwargs: Mapping[str, Any]

    def __post_init__(self):
        if self.tokenizer.eos_token_id is None:
            raise RecipeError("tokenizer: has no EOS token, which must end every document")
        self._backend = prepare_backend(self.tokenizer)

    def read(self, record: Mapping[str, Any]) -> str:
        column = next(iter(record)) if len(record) == 1 else self.column
        text = get_text(record, column)
        check_characters(text)
        return text

    def encode(self, items: Sequence[str]) -> list[Outcome]:
        if not self.kwargs:
            encodings = self._backend.encode_batch_fast(list(items), add_special_tokens=False)
            return [self._encode_one(encoding.ids) for encoding in encodings]
        kwargs = {**self.kwargs, "add_special_tokens": False, "return_attention_mask": False}
        encoding = self.tokenizer(list(items), verbose=False, **kwargs)
        return [self._encode_one(ids) for ids in encoding["input_ids"]]

    def _encode_one(self, ids: list[int]) -> Outcome:
        if not ids:
            return Dropped(NOTHING, 0)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        before = [] if bos is None else [bos]
        tokens = np.array([*before, *ids, eos], dtype=np.int32)
        weights = np.ones(len(tokens), dtype=np.uint8)
        weights[0] = 0  # before it in a sequence is another text
        return Encoded(tokens, weights)


@dataclass(frozen=True)
class TokenisedEncoder:
    """Checks tokens and takes them as they are, of any length unless `max_length` is given."""

    vocab_size: int
    with_labels: bool
    max_length: int | None = None
    overlong: Overlong = "drop"

    def read(self, record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens, int32 [n], and which of them are trained, uint8 [n]."""
        tokens = _read_integers(record, "input_ids")
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)][0]
            raise DataError(
                f"input_ids: {wrong} is no token; must be from 0 to {self.vocab_size - 1}"
            )
        if not self.with_labels:
            return tokens.astype(np.int32), np.ones(len(tokens), np.uint8)
        labels = _read_integers(record, "labels")
        if len(labels) != len(tokens):
            raise DataError(f"labels: must be {len(tokens)}, as input_ids, found {len(labels)}")
        wrong = np.flatnonzero((labels != IGNORED) & (labels != tokens))
        if len(wrong):
            raise DataError(
                f"labels[{wrong[0]}]: must be the token {tokens[wrong[0]]} itself or {IGNORED}, "
                f"found {labels[wrong[0]]}; labels are not shifted"
            )
        return tokens.astype(np.int32), (labels != IGNORED).astype(np.uint8)

    def encode(self, items: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Outcome]:
        return [self._encode_one(*item) for item in items]

    def _encode_one(self, tokens: np.ndarray, weights: np.ndarray) -> Outcome:
        length = len(tokens)
        if not length:
            return Dropped(NOTHING, 0)
        most = self.max_length or length
        if refused := check_length(length, most, self.overlong):
            return refused
        weights = weights[:most].copy()
        weights[0] = 0  # nothing before it predicts it
        if self.with_labels and not weights.any():
            return Dropped(CUT_AWAY if length > most else UNTRAINED, length)
        return Encoded(tokens[:most], weights, truncated=length > most)


def prepare_backend(tokenizer: Any) -> Tokenizer:
    """Returns the backend without truncation and padding, which any call may leave on."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def compile_added_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Compiles a pattern of the added tokens that are tokens wherever they are written."""
    added = tokenizer.added_tokens_decoder.values()
    plain = [
        re.escape(token.content)
        for token in added
        if not (token.single_word or token.normalized)
        and sum(token.content in other.content for other in added) == 1
    ]
    return re.compile("|".join(plain)) if plain else None


def check_length(length: int, max_length: int, rule: Overlong) -> Dropped | Fault | None:
    """Returns what becomes of a document of `length` tokens; None keeps it, whole or cut."""
    if length <= max_length or rule == "truncate":
        return None
    if rule == "drop":
        return Dropped(OVERLONG, length)
    return Fault(
        f"{length} tokens, but max_length is {max_length}; set data.overlong to drop or truncate, "
        f"or raise data.max_length"
    )


def catch_fault(function: Callable[..., Any], *arguments: Any) -> Any | Fault:
    try:
        return function(*arguments)
    except DataError as fault:
        return Fault(str(fault))


def _read_integers(record: Mapping[str, Any], column: str) -> np.ndarray:
    numbers = get_column(record, column)
    try:
        values = np.asarray(numbers)
    except ValueError:  # lists of different lengths
        values = np.zeros((0, 0))
    if values.ndim != 1 or (len(values) and values.dtype.kind not in "iu"):
        raise DataError(f"{column}: must be a list of whole numbers, found {show(numbers)}")
    return values.astype(np.int64)
