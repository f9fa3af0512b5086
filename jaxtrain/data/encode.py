"""Encodes records as tokens with loss weights: conversations, plain text, and tokens as they are.

The text that a conversation renders to is tokenised once; offsets tell which tokens are trained.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer

from jaxtrain.data.conversation import Conversation, read_conversation
from jaxtrain.data.records import get_column, get_text
from jaxtrain.data.render import Renderer, Rendering, check_characters, find_stop_tokens
from jaxtrain.data.spans import REASONING, Span, says_something
from jaxtrain.recipe.errors import DataError, RecipeError, show

OVERLONG = "longer than max_length"
UNTRAINED = "no assistant text to train on"
CUT_AWAY = "no assistant text left after truncation"
NOTHING = "renders to nothing"
EMPTY_REPLY = "a reply is empty"
CONTROL_TOKENS = "control tokens in text"
THINK_TAGS = ("<think>", "</think>")
EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
HEAD_CHARACTERS_PER_TOKEN = 5
"""A text of this many characters per token of `max_length` is nearly always longer than it."""
IGNORED = -100
"""The label of a token that is not trained."""
SAID = ("content", *REASONING)
"""Fields of a turn that are text."""
NO_GAP = -1
GAP = "\ufdd0"
"""A character that Unicode reserves for use inside a program."""
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
    notes: tuple[str, ...] = ()
    """What the ledger counts the documents of: HIDDEN_SYSTEM, EMPTY_REPLY, …"""
    unread: tuple[str, ...] = ()
    """Fields of turns and arguments of the template that nothing reads."""


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
    split_special_tokens: bool = False

    def __post_init__(self):
        self._text = TextGuard(self.tokenizer, self.split_special_tokens)
        self._backend = self._text.backend
        self._renderer = Renderer(self.tokenizer)
        self._stops = frozenset(find_stop_tokens(self.tokenizer))
        self._markup = frozenset(self.tokenizer.added_tokens_decoder)
        self._added_tokens = compile_added_tokens(self.tokenizer)

    def read(self, record: Mapping[str, Any]) -> Conversation:
        return read_conversation(record)

    def encode(self, conversations: Sequence[Conversation]) -> list[Outcome]:
        conversations = [self._split_specials(one) for one in conversations]
        rendered = [catch_fault(self._renderer.render, one) for one in conversations]
        texts = [one.text for one in rendered if isinstance(one, Rendering)]
        encodings = iter(self._tokenise(texts))
        return [
            one
            if isinstance(one, Fault)
            else catch_fault(self._encode_one, conversation, one, next(encodings))
            for conversation, one in zip(conversations, rendered, strict=True)
        ]

    def _split_specials(self, conversation: Conversation) -> Conversation:
        if not self.split_special_tokens:
            return conversation
        messages = [
            {k: self._text.split(v) if k in SAID else v for k, v in message.items()}
            for message in conversation.messages
        ]
        return conversation._replace(messages=messages)

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
        length = len(encoding) - encoding.ids.count(self._text.gap)
        return length > self.max_length and encoding.ids[-1] in self._markup

    def _encode_one(
        self, conversation: Conversation, rendering: Rendering, encoding: Encoding
    ) -> Outcome:
        text, tokens = rendering.text, np.array(encoding.ids, dtype=np.int32)
        kept = np.flatnonzero(tokens != self._text.gap)
        length = len(kept)
        if not text or length == 0:
            return Dropped(NOTHING, 0)
        if refused := check_length(length, self.max_length, self.overlong):
            return refused
        kept = kept[: self.max_length]
        tokens = tokens[: kept[-1] + 1]
        is_pair, is_empty = conversation.prompt_turns > 0, []
        if self.mask_inputs and (self.completion_only or not is_pair):
            spans = self._find_spans(conversation, text)
            weights, turns, ended = self._weigh_tokens(tokens, encoding, text, spans)
            after = conversation.messages[conversation.prompt_turns :]
            is_empty = [not says_something(m) for m in after if m["role"] in self.loss_roles]
        else:
            weights, turns, ended = np.ones(len(tokens), dtype=np.uint8), 0, 0
        tokens, weights, is_cut = tokens[kept], weights[kept], length > self.max_length
        weights[0] = 0  # nothing stands before it that could predict it
        if not weights.any():
            reason = EMPTY_REPLY if is_empty and all(is_empty) else UNTRAINED
            return Dropped(CUT_AWAY if is_cut else reason, length)
        notes = [*rendering.hidden, *([EMPTY_REPLY] if any(is_empty) else [])]
        said = (str(message.get(key, "")) for message in conversation.messages for key in SAID)
        if any(map(self._text.has_control_token, said)):
            notes.append(CONTROL_TOKENS)
        unread = rendering.unread
        return Encoded(tokens, weights, turns, ended, is_cut, notes=tuple(notes), unread=unread)

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
                ended += int(tokens[last - 1]) in self._stops
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
    split_special_tokens: bool = False

    def __post_init__(self):
        if self.tokenizer.eos_token_id is None:
            raise RecipeError("tokenizer: has no EOS token, which must end every document")
        self._text = TextGuard(self.tokenizer, self.split_special_tokens)

    def read(self, record: Mapping[str, Any]) -> str:
        column = next(iter(record)) if len(record) == 1 else self.column
        text = get_text(record, column)
        check_characters(text)
        return text

    def encode(self, items: Sequence[str]) -> list[Outcome]:
        texts = [self._text.split(item) for item in items]
        if not self.kwargs:
            encodings = self._text.backend.encode_batch_fast(texts, add_special_tokens=False)
            lists = [encoding.ids for encoding in encodings]
        else:
            kwargs = {**self.kwargs, "add_special_tokens": False, "return_attention_mask": False}
            lists = self._text.tokenizer(texts, verbose=False, **kwargs)["input_ids"]
        return [self._encode_one(*pair) for pair in zip(lists, items, strict=True)]

    def _encode_one(self, ids: list[int], text: str) -> Outcome:
        ids = [token for token in ids if token != self._text.gap]
        if not ids:
            return Dropped(NOTHING, 0)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        before = [] if bos is None or ids[0] == bos else [bos]
        after = [] if ids[-1] == eos else [eos]
        tokens = np.array([*before, *ids, *after], dtype=np.int32)
        weights = np.ones(len(tokens), dtype=np.uint8)
        weights[0] = 0  # before it in a sequence is another text
        is_control = self._text.has_control_token(text)
        return Encoded(tokens, weights, notes=(CONTROL_TOKENS,) if is_control else ())


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
        given = [name for name in MASKS if record.get(name) is not None]
        is_trained = np.ones(len(tokens), dtype=bool)
        for name in given:
            is_trained &= _read_mask(record, name, len(tokens))
        if record.get("labels") is not None or (self.with_labels and not given):
            labels = _read_integers(record, "labels", len(tokens))
            wrong = np.flatnonzero((labels != IGNORED) & (labels != tokens))
            if len(wrong):
                raise DataError(
                    f"labels[{wrong[0]}]: must be the token {tokens[wrong[0]]} itself or "
                    f"{IGNORED}, found {labels[wrong[0]]}; labels are not shifted"
                )
            is_trained &= labels != IGNORED
        tokens, weights = tokens.astype(np.int32), is_trained.astype(np.uint8)
        if record.get("attention_mask") is None:
            return tokens, weights
        places = np.flatnonzero(_read_mask(record, "attention_mask", len(tokens)))
        if len(places) and places[-1] - places[0] >= len(places):
            raise DataError("attention_mask: may hide padding at the ends only, found a gap")
        return tokens[places], weights[places]

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


class TextGuard:
    """Knows the special tokens that records write in their text, which the tokenizer takes for
    control tokens; with `is_splitting` it keeps them text.

    A gap, a token of its own in a copy of the tokenizer, then parts their first character from the
    rest; encoders take the gaps out again."""

    def __init__(self, tokenizer: Any, is_splitting: bool):
        added = tokenizer.added_tokens_decoder.values()
        special = [re.escape(t.content) for t in added if t.special and t.content not in THINK_TAGS]
        self._special = re.compile("|".join(sorted(special, reverse=True)) or r"(?!)")
        self._is_splitting = is_splitting
        self.gap = NO_GAP
        if is_splitting:
            tokenizer = deepcopy(tokenizer)
            tokenizer.add_tokens(AddedToken(GAP, normalized=False, special=True))
            self.gap = tokenizer.convert_tokens_to_ids(GAP)
        self.tokenizer = tokenizer
        self.backend = prepare_backend(tokenizer)

    def has_control_token(self, text: str) -> bool:
        return not self._is_splitting and bool(self._special.search(text))

    def split(self, text: str) -> str:
        if not self._is_splitting:
            return text
        return self._special.sub(lambda found: found[0][0] + GAP + found[0][1:], text)


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


MASKS = ("loss_mask", "completion_mask", "assistant_masks")
"""Columns that say with 1 and 0 which tokens are trained."""


def _read_mask(record: Mapping[str, Any], column: str, length: int) -> np.ndarray:
    mask = _read_integers(record, column, length)
    if not np.isin(mask, (0, 1)).all():
        raise DataError(f"{column}: must be 0 and 1, found {mask[(mask != 0) & (mask != 1)][0]}")
    return mask == 1


def _read_integers(record: Mapping[str, Any], column: str, length: int | None = None) -> np.ndarray:
    numbers = get_column(record, column)
    try:
        values = np.asarray(numbers)
    except ValueError:  # lists of different lengths
        values = np.zeros((0, 0))
    if values.ndim != 1 or (len(values) and values.dtype.kind not in "iub"):
        raise DataError(f"{column}: must be a list of whole numbers, found {show(numbers)}")
    if length is not None and len(values) != length:
        raise DataError(f"{column}: must be {length}, as input_ids, found {len(values)}")
    return values.astype(np.int64)
