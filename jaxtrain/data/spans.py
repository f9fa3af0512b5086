"""Where turns stand in a rendered conversation.

A span is what a turn adds to what the model is given before it: it starts after the generation
prompt and ends with the turn. It is found from renderings, never by looking for the reply's text,
which may stand elsewhere too or be changed by the template. Two ways prove it, and agree where both
apply; where neither does, there is no span and no guess.
"""

import hashlib
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtrain.data.conversation import Message
from jaxtrain.recipe.errors import DataError

Render = Callable[[list[Message], bool], str | None]
"""Messages, with the generation prompt or without → text; None where the template refuses."""

TokenPositions = dict[tuple[str, int], int]
"""Kind of a marker and number of its message → where it stands in the text without markers."""

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
            check_shown(messages, turns, [text[start:end] for start, end in spans])
            return spans
    raise DataError(
        "the chat template rewrites turns, and where the trained text stands cannot be proven; "
        "set tokenizer.chat_template to one that keeps turns as they are, or that puts "
        "{% generation %} around them"
    )


def check_shown(messages: list[Message], turns: list[int], trained: list[str]) -> None:
    """A template made for lists of parts writes the turn and leaves its plain text out. `trained`
    are the stretches of each turn, or all of a template that says itself which turns it trains."""
    is_by_turn = len(trained) == len(turns)
    hidden = []
    for place, turn in enumerate(turns):
        reply = _reply(messages[turn])
        where = trained[place : place + 1] if is_by_turn else trained
        words = LONG_WORD if LONG_WORD.search(reply) else WORD
        is_shown = (word[0] in text for word in words.finditer(reply) for text in where)
        if reply.strip() and not any(is_shown):
            hidden.append(turn)
    if hidden and (is_by_turn or len(hidden) == len(turns)):
        raise _hides(hidden[0], "content")


def check_calls(render: Render, messages: list[Message], text: str) -> None:
    """Some templates show the first of several calls, no text beside calls, or a call's id in place
    of its name, which is right where the id holds the name."""
    calling = [index for index, message in enumerate(messages) if "tool_calls" in message]
    if not calling:
        return
    marks = _Marks(text)
    marked = [marks.ended(m, i) if "tool_calls" in m else m for i, m in enumerate(messages)]
    rendered = render(marked, False)
    if rendered is None or marks.removed(rendered)[0] != text:
        return  # by a marker it says something else, so that what it leaves out is not known
    for index in calling:
        message, call = messages[index], messages[index]["tool_calls"][-1]
        has_name = call["function"]["name"] in str(call.get("id"))
        if not has_name and not marks.has(rendered, index, "c"):
            raise _hides(index, "tool_calls")
        if not is_bare_call(message) and not marks.has(rendered, index, "e"):
            raise _hides(index, "content")


def _hides(index: int, field: str) -> DataError:
    return DataError(
        f"messages[{index}].{field}: the chat template does not show all of it; set "
        f"tokenizer.chat_template to one that does, or remove it"
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
    its markers the marked text is `text`, so that they changed nothing; what opens and closes the
    turn stands literally beside a marker; and the span holds what its turn says, all of it, and
    nothing that another one says."""
    search = _MarkedSearch(render, messages, turns, text)
    spans: list[Span] = []
    for turn in turns:
        start, end = search.start_of(turn), search.end_of(turn)
        previous = spans[-1].end if spans else 0
        if start is None or end is None or not previous <= start <= end:
            return None
        spans.append(Span(start, end))
    return spans if search.are_apart(turns, spans) else None


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
            self._marks.ended(message, index)
            # Many templates leave a turn out that says nothing.
            if index in anchors or message["content"].strip() or message.get("tool_calls")
            else message
            for index, message in enumerate(messages)
        ]
        both = [
            self._marks.opened(message, index) if index in turns else message
            for index, message in enumerate(self._ended)
        ]
        # A marker in front may hide what a template looks for there, such as <think>.
        self._places = self._places_in_text(both) or self._places_in_text(self._ended) or {}
        self._ends = self._ends_in(self._places)

    @staticmethod
    def _ends_in(places: TokenPositions) -> dict[int, int]:
        """Message → behind the last that it says: its content, or its calls."""
        found: dict[int, int] = {}
        for (kind, index), place in places.items():
            if kind in "ec":
                found[index] = max(place, found.get(index, 0))
        return found

    def are_apart(self, turns: list[int], spans: list[Span]) -> bool:
        """Some templates write what a tool answers into the turn that called it, or thoughts in
        front of where the turn is told to begin."""
        own = dict(zip(turns, spans, strict=True))
        starts = [span.start for span in spans]
        for (kind, index), place in self._places.items():
            if kind != "s" and index in own and not own[index].start <= place <= own[index].end:
                return False  # but the prompt may open thoughts with which a content starts
            before = bisect_left(starts, place) - 1  # the last span that starts in front of it
            if before >= 0 and turns[before] != index and place < spans[before].end:
                return False
        return True

    def start_of(self, turn: int) -> int | None:
        """Behind the generation prompt, or else where the content begins."""
        written = self._places.get(("s", turn))
        # Some templates leave out a message here and there.
        last = next((index for index in range(turn - 1, -1, -1) if index in self._ends), None)
        if last is None:
            return written
        before = self._ends[last]
        if written is None:
            written = self._start_of_plain_reply(turn, last, before)
        role = self._messages[last]["role"]
        known = self._openings.get(role)
        if known is None or not self._is_directly_before(known, before, written):
            known = self._opening(turn, last)
            if known is None or not self._text.startswith(known, before):
                return written
            if self._is_directly_before(known, before, written):
                self._openings[role] = known
        start = before + len(known)
        end = self._ends.get(turn)
        return start if end is not None and start <= end else written

    def _start_of_plain_reply(self, turn: int, last: int, before: int) -> int | None:
        """Behind the header that the template writes here for a reply without thoughts, which hide
        a marker in front of them; thoughts that it keeps stand behind the header. Of the header
        of a text, so much as a call has too."""
        message = self._messages[turn]
        plain = self._marks.opened({"role": message["role"], "content": ""}, turn)
        # Some templates refuse an answer without its call.
        for after in (self._ended[turn + 1 :], []):
            probe, places = self._unmarked([*self._ended[:turn], plain, *after], False)
            end, start = self._ends_in(places).get(last), places.get(("s", turn))
            if end is None or start is None:
                continue
            header = probe[end:start]
            if not (message["content"].strip() or message.keys() & set(REASONING)):
                shared = header[: shared_start(header, self._text[before:])]
                header = header if shared == header else CUT_TOKEN.sub("", shared)
            if header.strip() and self._text.startswith(header, before):
                return before + len(header)
        return None

    def _is_directly_before(self, opening: str, before: int, written: int | None) -> bool:
        """Whether `opening` fills the text from the last content to this one, blanks aside; then
        it is that of this turn too, and needs no rendering of its own."""
        if written is None or not self._text.startswith(opening, before):
            return False
        start = before + len(opening)
        return start <= written and not self._text[start:written].strip()

    def _opening(self, turn: int, last: int) -> str | None:
        """From the end of the last content before the turn to that of the generation prompt."""
        prompt, places = self._unmarked(self._ended[:turn], True)
        place = self._ends_in(places).get(last)
        return None if place is None else prompt[place:]

    def end_of(self, turn: int) -> int | None:
        """Behind what closes the turn, if the template writes that here too."""
        end = self._ends.get(turn)
        if end is None:
            return None
        if turn + 1 == len(self._messages):
            return len(self._text)
        message = self._messages[turn]
        is_plain = message.keys() == {"role", "content"} and not message["content"][-1:].isspace()
        known = self._closings.get(message["role"]) if is_plain else None
        if known is not None and self._text.startswith(known, end):
            return end + len(known)
        rendered, places = self._unmarked(self._ended[: turn + 1], False)
        place = self._ends_in(places).get(turn)
        if place is None:
            return None
        # Some templates write more behind a turn that is the last one, such as EOS behind the end
        # of turn; a token that is cut here is not of the turn.
        closing = rendered[place:]
        closing = closing[: shared_start(closing, self._text[end:])]
        if is_plain and len(closing) == len(rendered) - place:
            self._closings.setdefault(message["role"], closing)
        return end + len(closing)

    def _places_in_text(self, marked: list[Message]) -> TokenPositions | None:
        plain, places = self._unmarked(marked, False)
        return places if plain == self._text else None

    def _unmarked(self, marked: list[Message], prompt: bool) -> tuple[str, TokenPositions]:
        rendered = self._render(marked, prompt)
        return ("", {}) if rendered is None else self._marks.removed(rendered)


def shared_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """So much of both is equal from the front on."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def is_bare_call(message: Message) -> bool:
    """Thoughts aside, which templates take off the content."""
    return bool(message.get("tool_calls")) and not _reply(message).strip()


def _reply(message: Message) -> str:
    return message["content"].rpartition("</think>")[2]


MARK = re.compile(r"(Mark[0-9a-f]{16}n)(\d+)([serc])")
"""Where a content starts and ends, where reasoning starts, and behind the name of the last call."""
THOUGHT = re.compile(r"<think>\s*(?=\S)(?!</think>)")
"""What opens the reasoning in a content."""
LONG_WORD, WORD = re.compile(r"\w{4,}"), re.compile(r"\S+")
"""Short words stand in the markup too."""
CUT_TOKEN = re.compile(r"<[^<>]*$")
"""What two tokens share, at the end of what two texts share."""
REASONING = ("reasoning_content", "reasoning", "thinking")


class _Marks:
    """Markers that look like a word, so that no template strips, escapes or splits them."""

    def __init__(self, text: str):
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        self._stem = f"Mark{digest}n"

    def ended(self, message: Message, number: int) -> Message:
        """Inside of trailing white space, which templates may strip; a turn that is nothing but
        calls stays without content, since templates ask whether there is some."""
        marked = dict(message)
        if message.get("tool_calls"):
            *calls, last = message["tool_calls"]
            function = last.get("function", last)
            named = {**function, "name": f"{function['name']}{self._stem}{number}c"}
            last = {**last, "function": named} if "function" in last else named
            marked["tool_calls"] = [*calls, last]
        if found := THOUGHT.search(message["content"]):
            marked["content"] = (
                f"{found.string[: found.end()]}{self._stem}{number}r{found.string[found.end() :]}"
            )
        if not is_bare_call(message):
            body = marked["content"].rstrip()
            blank = marked["content"][len(body) :]
            marked["content"] = f"{body}{self._stem}{number}e{blank}"
        for key in REASONING:
            if isinstance(thoughts := message.get(key), str) and thoughts.strip():
                marked[key] = self._before(thoughts, number, "r")
        return marked

    def opened(self, message: Message, number: int) -> Message:
        if is_bare_call(message):
            return message
        return {**message, "content": self._before(message["content"], number, "s")}

    def _before(self, text: str, number: int, kind: str) -> str:
        body = text.lstrip()
        return f"{text[: len(text) - len(body)]}{self._stem}{number}{kind}{body}"

    def has(self, rendered: str, number: int, kind: str) -> bool:
        return f"{self._stem}{number}{kind}" in rendered

    def removed(self, rendered: str) -> tuple[str, TokenPositions]:
        """The text without markers, and where those stood in it that occur once; where those of
        calls first did, whose names templates write beside the answers too."""
        places: TokenPositions = {}
        repeated: set[tuple[str, int]] = set()
        pieces, cut, length = [], 0, 0
        for match in MARK.finditer(rendered):
            if match[1] != self._stem:  # the conversation speaks of markers
                continue
            pieces.append(rendered[cut : match.start()])
            length += len(pieces[-1])
            cut = match.end()
            mark = (match[3], int(match[2]))
            if mark in places and mark[0] != "c":
                repeated.add(mark)
            places.setdefault(mark, length)
        pieces.append(rendered[cut:])
        return "".join(pieces), {m: at for m, at in places.items() if m not in repeated}
