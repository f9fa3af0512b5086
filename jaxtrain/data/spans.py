"""Finds the turns in a rendered conversation.

A span is what a turn adds to what the model sees before it: it starts after the generation prompt
and ends with the turn. It is found from renderings, never by searching for the reply's text, which
may occur elsewhere too or be changed by the template. Two ways prove it, and agree where both
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
"""Messages, and whether to add the generation prompt → text; None where the template refuses."""

MarkPositions = dict[tuple[str, int], int]
"""Kind of a marker and number of its message → its place in the text without markers."""

HIDDEN_SYSTEM = "hidden system"
HIDDEN_THOUGHTS = "hidden thoughts"
"""Of replies to earlier questions, which many templates leave out."""

MAX_PREFIX_TURNS = 2
"""Up to this many turns, two renderings per turn are fewer than marking takes."""


class Span(NamedTuple):
    """Characters [start, end)."""

    start: int
    end: int


def find_turns(render: Render, messages: list[Message], turns: list[int], text: str) -> list[Span]:
    """Finds one span for each of `turns` in `text`, rising; DataError when unproven."""
    ways = (find_by_prefixes, find_by_marks)
    for way in ways if len(turns) <= MAX_PREFIX_TURNS else reversed(ways):
        spans = way(render, messages, turns, text)
        if spans is not None:
            check_shown(messages, turns, [text[start:end] for start, end in spans])
            return spans
    raise DataError(
        "the chat template rewrites turns, so the place of the trained text cannot be proven; "
        "set tokenizer.chat_template to one that keeps turns as they are, or that puts "
        "{% generation %} around them"
    )


def check_shown(messages: list[Message], turns: list[int], trained: list[str]) -> None:
    """Raises DataError for turns whose text is missing, as a template for lists of parts leaves
    plain text out. `trained` is the text of each turn, or all text in {% generation %} blocks."""
    is_by_turn = len(trained) == len(turns)
    hidden = []
    for place, turn in enumerate(turns):
        reply = _strip_thoughts(messages[turn])
        texts = trained[place : place + 1] if is_by_turn else trained
        if reply.strip() and not _has_word_of(reply, texts):
            hidden.append(turn)
    if hidden and (is_by_turn or len(hidden) == len(turns)):
        raise _hidden_field_error(hidden[0], "content")


def _has_word_of(reply: str, texts: Sequence[str]) -> bool:
    words = LONG_WORD if LONG_WORD.search(reply) else WORD
    return any(word[0] in text for word in words.finditer(reply) for text in texts)


def find_hidden(render: Render, messages: list[Message], text: str) -> set[str]:
    """Returns which of HIDDEN_SYSTEM and HIDDEN_THOUGHTS the template leaves out; DataError for
    anything else that the messages say and the rendering does not show.

    Some show only the first of several calls, no text beside calls, no answers of tools, or a
    call's id in place of its name, which is right where the id holds the name."""
    said = [(index, *part) for index, one in enumerate(messages) for part in _list_said(one)]
    place = 0
    for _, kind, _, words in said:
        found = -1 if kind == "c" else text.find(words, place)
        if found < 0:
            break
        place = found + len(words)
    else:  # all of it is there, in the order of the conversation
        return set()
    marks = _Marks(text)
    shown = _find_shown(render, marks, messages, text, range(len(messages)))
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    hidden = set()
    for index, kind, field, words in said:
        if shown is None:  # some marker changes what the template writes
            own = _find_shown(render, marks, messages, text, [index])
            is_shown = (index, kind) in own if own is not None else _has_word_of(words, [text])
        else:
            is_shown = (index, kind) in shown
        if is_shown:
            continue
        if kind == "r" and index < last_user:
            hidden.add(HIDDEN_THOUGHTS)
        elif messages[index]["role"] in ("system", "developer"):
            hidden.add(HIDDEN_SYSTEM)
        else:
            raise _hidden_field_error(index, field)
    return hidden


def _list_said(message: Message) -> list[tuple[str, str, str]]:
    """Returns the parts of what a message says: the kind of their marker, their field, the text."""
    parts, content = [], message["content"]
    for key in REASONING:
        if isinstance(thoughts := message.get(key), str) and thoughts.strip():
            parts.append(("r", key, thoughts.strip()))
    if found := THOUGHT.search(content):
        parts.append(("r", "content", content[found.end() :].rpartition("</think>")[0].strip()))
    if reply := _strip_thoughts(message).strip():
        parts.append(("e", "content", reply))
    if calls := message.get("tool_calls"):
        name = calls[-1]["function"]["name"]
        if name not in str(calls[-1].get("id")):
            parts.append(("c", "tool_calls", name))
    return parts


def _find_shown(
    render: Render, marks: "_Marks", messages: list[Message], text: str, chosen: Sequence[int]
) -> set[tuple[int, str]] | None:
    """Returns index and kind of the markers of the chosen messages that the template shows; None
    where a marker changes what it writes, so that what it leaves out is unknown."""
    marked = [marks.mark_end(m, i) if i in chosen else m for i, m in enumerate(messages)]
    rendered = render(marked, False)
    if rendered is None or marks.strip(rendered)[0] != text:
        return None
    return {(i, kind) for i in chosen for kind in "erc" if marks.has_mark(rendered, i, kind)}


def _hidden_field_error(index: int, field: str) -> DataError:
    return DataError(
        f"messages[{index}].{field}: the chat template does not show all of it; set "
        f"tokenizer.chat_template to one that does, or remove it"
    )


def find_by_prefixes(
    render: Render, messages: list[Message], turns: list[int], text: str
) -> list[Span] | None:
    """Finds spans in templates that only append: the rendering before a turn and that up to its end
    are both prefixes of `text`."""
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


def find_by_marks(
    render: Render, messages: list[Message], turns: list[int], text: str
) -> list[Span] | None:
    """Finds spans in templates that write a turn differently once others follow, or of many turns.

    Markers at both ends of the contents show where these went. Proven for every span: without its
    markers the marked text is `text`, so that they changed nothing; what opens and closes the turn
    is literally next to a marker; and the span holds all that its turn says, and nothing that
    another one says."""
    search = _MarkedSearch(render, messages, turns, text)
    spans: list[Span] = []
    for turn in turns:
        start, end = search.find_start(turn), search.find_end(turn)
        previous = spans[-1].end if spans else 0
        if start is None or end is None or not previous <= start <= end:
            return None
        spans.append(Span(start, end))
    return spans if search.has_disjoint_spans(turns, spans) else None


class _MarkedSearch:
    """Finds the contents of one conversation, and learns the text between them."""

    def __init__(self, render: Render, messages: list[Message], turns: list[int], text: str):
        self._render = render
        self._messages = messages
        self._text = text
        self._marks = _Marks(text)
        self._openings: dict[str, str] = {}
        self._closings: dict[str, str] = {}  # by role, as the openings of what follows one
        anchors = {*turns, *(turn - 1 for turn in turns if turn)}
        self._ended = [
            self._marks.mark_end(message, index)
            # Many templates leave out a turn that says nothing.
            if index in anchors or message["content"].strip() or message.get("tool_calls")
            else message
            for index, message in enumerate(messages)
        ]
        both = [
            self._marks.mark_start(message, index) if index in turns else message
            for index, message in enumerate(self._ended)
        ]
        # A marker at the start may hide what a template looks for there, such as <think>.
        self._places = self._find_places(both) or self._find_places(self._ended) or {}
        self._ends = self._find_ends(self._places)

    @staticmethod
    def _find_ends(places: MarkPositions) -> dict[int, int]:
        """Returns the end of what each message says, its content or its calls."""
        found: dict[int, int] = {}
        for (kind, index), place in places.items():
            if kind in "ec":
                found[index] = max(place, found.get(index, 0))
        return found

    def has_disjoint_spans(self, turns: list[int], spans: list[Span]) -> bool:
        """Whether every content is in its own span only: some templates write what a tool answers
        into the turn that called it, or thoughts before the generation prompt's end."""
        own = dict(zip(turns, spans, strict=True))
        starts = [span.start for span in spans]
        for (kind, index), place in self._places.items():
            if kind != "s" and index in own and not own[index].start <= place <= own[index].end:
                return False  # the start may differ: the prompt may open the thoughts of a content
            before = bisect_left(starts, place) - 1  # the last span that starts before it
            if before >= 0 and turns[before] != index and place < spans[before].end:
                return False
        return True

    def find_start(self, turn: int) -> int | None:
        """Finds the end of the generation prompt, or else the start of the content."""
        written = self._places.get(("s", turn))
        # Some templates leave out a message here and there.
        last = next((index for index in range(turn - 1, -1, -1) if index in self._ends), None)
        if last is None:
            return written
        before = self._ends[last]
        if written is None:
            written = self._find_start_of_plain_reply(turn, last, before)
        role = self._messages[last]["role"]
        known = self._openings.get(role)
        if known is None or not self._is_directly_before(known, before, written):
            known = self._render_opening(turn, last)
            if known is None or not self._text.startswith(known, before):
                return written
            if self._is_directly_before(known, before, written):
                self._openings[role] = known
        start = before + len(known)
        end = self._ends.get(turn)
        return start if end is not None and start <= end else written

    def _find_start_of_plain_reply(self, turn: int, last: int, before: int) -> int | None:
        """Finds the end of the header that the template writes here for a reply without thoughts.

        Thoughts hide a marker before them, and follow the header where the template keeps them.
        A call shares only a part of the header of a text."""
        message = self._messages[turn]
        plain = self._marks.mark_start({"role": message["role"], "content": ""}, turn)
        # Some templates refuse an answer without its call.
        for after in (self._ended[turn + 1 :], []):
            probe, places = self._render_unmarked([*self._ended[:turn], plain, *after], False)
            end, start = self._find_ends(places).get(last), places.get(("s", turn))
            if end is None or start is None:
                continue
            header = probe[end:start]
            if not (message["content"].strip() or message.keys() & set(REASONING)):
                shared = header[: count_shared(header, self._text[before:])]
                header = header if shared == header else CUT_TOKEN.sub("", shared)
            if header.strip() and self._text.startswith(header, before):
                return before + len(header)
        return None

    def _is_directly_before(self, opening: str, before: int, written: int | None) -> bool:
        """Whether `opening` fills the text from the last content to this one, blanks aside; it then
        opens this turn too, which needs no rendering of its own."""
        if written is None or not self._text.startswith(opening, before):
            return False
        start = before + len(opening)
        return start <= written and not self._text[start:written].strip()

    def _render_opening(self, turn: int, last: int) -> str | None:
        """Renders what is between the last content before the turn and the end of the prompt."""
        prompt, places = self._render_unmarked(self._ended[:turn], True)
        place = self._find_ends(places).get(last)
        return None if place is None else prompt[place:]

    def find_end(self, turn: int) -> int | None:
        """Finds the end of what closes the turn, if the template writes that here too."""
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
        rendered, places = self._render_unmarked(self._ended[: turn + 1], False)
        place = self._find_ends(places).get(turn)
        if place is None:
            return None
        # Some templates write more after a last turn, such as EOS after the end of turn; a token
        # that is cut here does not belong to the turn.
        closing = rendered[place:]
        closing = closing[: count_shared(closing, self._text[end:])]
        if is_plain and len(closing) == len(rendered) - place:
            self._closings.setdefault(message["role"], closing)
        return end + len(closing)

    def _find_places(self, marked: list[Message]) -> MarkPositions | None:
        plain, places = self._render_unmarked(marked, False)
        return places if plain == self._text else None

    def _render_unmarked(self, marked: list[Message], prompt: bool) -> tuple[str, MarkPositions]:
        rendered = self._render(marked, prompt)
        return ("", {}) if rendered is None else self._marks.strip(rendered)


def count_shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Returns the length of the longest common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls") or _list_said(message))


def is_bare_call(message: Message) -> bool:
    """Whether a message is only calls and thoughts, which templates take off the content."""
    return bool(message.get("tool_calls")) and not _strip_thoughts(message).strip()


def _strip_thoughts(message: Message) -> str:
    return message["content"].rpartition("</think>")[2]


MARK = re.compile(r"(Mark[0-9a-f]{16}n)(\d+)([serc])")
"""Marks of the start and the end of a content, the start of reasoning, and the last call's name."""
THOUGHT = re.compile(r"<think>\s*(?=\S)(?!</think>)")
"""The opening of the reasoning in a content."""
LONG_WORD, WORD = re.compile(r"\w{4,}"), re.compile(r"\S+")
"""Long words are searched first, since the markup may contain short ones."""
CUT_TOKEN = re.compile(r"<[^<>]*$")
"""The common prefix of two different tokens, at the end of a common prefix of texts."""
REASONING = ("reasoning_content", "reasoning", "thinking")


class _Marks:
    """Markers that look like a word, so that no template strips, escapes or splits them."""

    def __init__(self, text: str):
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        self._stem = f"Mark{digest}n"

    def mark_end(self, message: Message, number: int) -> Message:
        """Marks the end of the content before trailing white space, which templates may strip; a
        turn of calls alone stays without content, since templates test for it."""
        marked = dict(message)
        if message.get("tool_calls"):
            *calls, last = message["tool_calls"]
            name = f"{last['function']['name']}{self._stem}{number}c"
            last = {**last, "function": {**last["function"], "name": name}}
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
                marked[key] = self._insert_mark(thoughts, number, "r")
        return marked

    def mark_start(self, message: Message, number: int) -> Message:
        if is_bare_call(message):
            return message
        return {**message, "content": self._insert_mark(message["content"], number, "s")}

    def _insert_mark(self, text: str, number: int, kind: str) -> str:
        body = text.lstrip()
        return f"{text[: len(text) - len(body)]}{self._stem}{number}{kind}{body}"

    def has_mark(self, rendered: str, number: int, kind: str) -> bool:
        return f"{self._stem}{number}{kind}" in rendered

    def strip(self, rendered: str) -> tuple[str, MarkPositions]:
        """Returns the text without markers, and the places of those that occur once; for calls that
        of the first, since templates repeat the names of calls beside the answers."""
        places: MarkPositions = {}
        repeated: set[tuple[str, int]] = set()
        pieces, cut, length = [], 0, 0
        for match in MARK.finditer(rendered):
            if match[1] != self._stem:  # a marker in the conversation itself
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
