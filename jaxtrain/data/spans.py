"""Where turns stand in a rendered conversation.

A span is what a turn adds to what the model is given before it: it starts after the generation
prompt and ends with the turn. It is found from renderings, never by looking for the reply's text,
which may stand elsewhere too or be changed by the template. Two ways prove it, and agree where both
apply; where neither does, there is no span and no guess.
"""

import hashlib
import re
from collections.abc import Callable
from typing import NamedTuple

from jaxtrain.data.conversation import Message
from jaxtrain.recipe.errors import DataError

Render = Callable[[list[Message], bool], str | None]
"""Messages, with the generation prompt or without → text; None where the template refuses."""

FEW_TURNS = 2
"""Up to this many, two renderings a turn are fewer than marking takes."""


class Span(NamedTuple):
    """Characters [start, end)."""

    start: int
    end: int


def turn_spans(render: Render, messages: list[Message], turns: list[int], text: str) -> list[Span]:
    """One span for each of `turns` in `text`, rising; DataError when they cannot be proven."""
    ways = (by_prefixes, by_marks) if len(turns) <= FEW_TURNS else (by_marks, by_prefixes)
    for way in ways:
        spans = way(render, messages, turns, text)
        if spans is not None:
            _check_shown(messages, turns, text, spans)
            return spans
    raise DataError(
        "the chat template rewrites turns, and where the trained text stands cannot be proven; "
        "set tokenizer.chat_template to one that keeps turns as they are, or that puts "
        "{% generation %} around them"
    )


def _check_shown(messages: list[Message], turns: list[int], text: str, spans: list[Span]) -> None:
    """A template made for lists of parts writes the turn and leaves its plain text out."""
    for turn, span in zip(turns, spans, strict=True):
        words = messages[turn]["content"].split("</think>")[-1].split()
        if words and not any(word in text[span.start : span.end] for word in words):
            raise DataError(
                f"messages[{turn}].content: the chat template does not show it; set "
                f"tokenizer.chat_template to one for plain text"
            )


def by_prefixes(
    render: Render, messages: list[Message], turns: list[int], text: str
) -> list[Span] | None:
    """For templates that only append: what comes before a turn, and what comes up to its end, each
    begin `text`."""
    spans = []
    for turn in turns:
        before = render(messages[:turn], True)
        through = text if turn + 1 == len(messages) else render(messages[: turn + 1], False)
        if before is None or through is None:
            return None
        if not (through.startswith(before) and text.startswith(through)):
            return None
        spans.append(Span(len(before), len(through)))
    return spans


def by_marks(
    render: Render, messages: list[Message], turns: list[int], text: str
) -> list[Span] | None:
    """For templates that write a turn differently once others follow it, and for many turns.

    Markers at the borders of the contents show where these went. Proven for every span: without
    its markers the marked text is `text`, so that they changed nothing; and what opens and closes
    the turn stands literally beside a marker."""
    search = _MarkedSearch(render, messages, turns, text)
    if not search.is_proven:
        return None
    spans: list[Span] = []
    for turn in turns:
        start, end = search.start_of(turn), search.end_of(turn)
        previous = spans[-1].end if spans else 0
        if start is None or end is None or not previous <= start <= end:
            return None
        spans.append(Span(start, end))
    return spans


class _MarkedSearch:
    """Places of the contents of one conversation, and what is known of the text between them."""

    def __init__(self, render: Render, messages: list[Message], turns: list[int], text: str):
        self._render = render
        self._messages = messages
        self._text = text
        self._marks = _Marks(text)
        self._openings: dict[str, str] = {}
        self._closings: dict[str, str] = {}  # by role, as the openings of what follows one
        anchors = {*turns, *(turn - 1 for turn in turns if turn)}
        self._ended = [
            self._marks.ended(message, index) if index in anchors else message
            for index, message in enumerate(messages)
        ]
        both = [
            self._marks.opened(message, index) if index in turns else message
            for index, message in enumerate(self._ended)
        ]
        # A marker in front may hide what a template looks for there, such as <think>.
        places = self._places_in_text(both) or self._places_in_text(self._ended) or {}
        self._starts = {index: at for (kind, index), at in places.items() if kind == "s"}
        self._ends = {index: at for (kind, index), at in places.items() if kind == "e"}
        self.is_proven = all(turn in self._ends for turn in turns)

    def start_of(self, turn: int) -> int | None:
        """Behind the generation prompt, or else where the content begins."""
        before, written = self._ends.get(turn - 1), self._starts.get(turn)
        if before is None:
            return written
        if written is None:
            written = self._start_of_plain_reply(turn, before)
        role = self._messages[turn - 1]["role"]
        known = self._openings.get(role)
        if known is None or not self._is_directly_before(known, before, written):
            known = self._opening(turn)
            if known is None or not self._text.startswith(known, before):
                return written
            if self._is_directly_before(known, before, written):
                self._openings[role] = known
        start = before + len(known)
        return start if start <= self._ends[turn] else written

    def _start_of_plain_reply(self, turn: int, before: int) -> int | None:
        """Behind the header that the template writes here for a reply without thoughts, which hide
        a marker in front of them; thoughts that it keeps stand behind the header."""
        plain = self._marks.opened({"role": self._messages[turn]["role"], "content": ""}, turn)
        probe, places = self._unmarked(
            [*self._ended[:turn], plain, *self._ended[turn + 1 :]], False
        )
        end, start = places.get(("e", turn - 1)), places.get(("s", turn))
        if end is None or start is None or not self._text.startswith(probe[end:start], before):
            return None
        return before + start - end

    def _is_directly_before(self, opening: str, before: int, written: int | None) -> bool:
        """Whether `opening` fills the text from the last content to this one, blanks aside; then
        it is that of this turn too, and needs no rendering of its own."""
        if written is None or not self._text.startswith(opening, before):
            return False
        start = before + len(opening)
        return start <= written and not self._text[start:written].strip()

    def _opening(self, turn: int) -> str | None:
        """From the end of the content before the turn to the end of the generation prompt."""
        prompt, places = self._unmarked(self._ended[:turn], True)
        place = places.get(("e", turn - 1))
        return None if place is None else prompt[place:]

    def end_of(self, turn: int) -> int | None:
        """Behind what closes the turn, if the template writes that here too."""
        end = self._ends[turn]
        if turn + 1 == len(self._messages):
            return len(self._text)
        message = self._messages[turn]
        is_plain = message.keys() == {"role", "content"} and not message["content"][-1:].isspace()
        known = self._closings.get(message["role"]) if is_plain else None
        if known is not None and self._text.startswith(known, end):
            return end + len(known)
        rendered, places = self._unmarked(self._ended[: turn + 1], False)
        place = places.get(("e", turn))
        if place is None:
            return None
        # Some templates write more behind a turn that is the last one, such as EOS behind the end
        # of turn; a token that is cut here is not of the turn.
        closing = _shared_start(rendered[place:], self._text[end:])
        if is_plain and len(closing) == len(rendered) - place:
            self._closings.setdefault(message["role"], closing)
        return end + len(closing)

    def _places_in_text(self, marked: list[Message]) -> dict[tuple[str, int], int] | None:
        plain, places = self._unmarked(marked, False)
        return places if plain == self._text else None

    def _unmarked(
        self, marked: list[Message], prompt: bool
    ) -> tuple[str, dict[tuple[str, int], int]]:
        rendered = self._render(marked, prompt)
        return ("", {}) if rendered is None else self._marks.removed(rendered)


def _shared_start(one: str, other: str) -> str:
    pairs = zip(one, other, strict=False)
    length = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    return one[:length]


def is_bare_call(message: Message) -> bool:
    return bool(message.get("tool_calls")) and not message["content"].strip()


MARK = re.compile(r"(Mark[0-9a-f]{16}n)(\d+)([se])")


class _Marks:
    """Markers that look like a word, so that no template strips, escapes or splits them."""

    def __init__(self, text: str):
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        self._stem = f"Mark{digest}n"

    def ended(self, message: Message, number: int) -> Message:
        """Inside of trailing white space, which templates may strip; in a turn that is nothing but
        calls behind the last name, since templates ask whether there is content."""
        content = message["content"]
        if is_bare_call(message):
            *calls, last = message["tool_calls"]
            function = last.get("function", last)
            named = {**function, "name": f"{function['name']}{self._stem}{number}e"}
            last = {**last, "function": named} if "function" in last else named
            return {**message, "tool_calls": [*calls, last]}
        body = content.rstrip()
        return {**message, "content": f"{body}{self._stem}{number}e{content[len(body) :]}"}

    def opened(self, message: Message, number: int) -> Message:
        content = message["content"]
        if is_bare_call(message):
            return message
        body = content.lstrip()
        blank = content[: len(content) - len(body)]
        return {**message, "content": f"{blank}{self._stem}{number}s{body}"}

    def removed(self, rendered: str) -> tuple[str, dict[tuple[str, int], int]]:
        """The text without markers, and where those stood in it that occur once."""
        places: dict[tuple[str, int], int] = {}
        repeated: set[tuple[str, int]] = set()
        pieces, cut, length = [], 0, 0
        for match in MARK.finditer(rendered):
            if match[1] != self._stem:  # the conversation speaks of markers
                continue
            pieces.append(rendered[cut : match.start()])
            length += len(pieces[-1])
            cut = match.end()
            mark = (match[3], int(match[2]))
            if mark in places:
                repeated.add(mark)
            places[mark] = length
        pieces.append(rendered[cut:])
        return "".join(pieces), {m: at for m, at in places.items() if m not in repeated}
