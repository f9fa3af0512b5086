"""Conversations as the chat template writes them, and where in that text the assistant speaks.

A span is what a turn adds to what the model is given before it: it starts after the generation
prompt and ends with the turn. It is found from renderings, never by looking for the reply's text,
which may stand elsewhere too or be changed by the template.
"""

import hashlib
import re
from typing import Any, NamedTuple

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from jaxtrain.data.conversation import Conversation, Message
from jaxtrain.recipe.errors import DataError, RecipeError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)
UNPROVEN = (
    "the chat template rewrites earlier turns, and where turn {turn} stands cannot be proven; set "
    "tokenizer.chat_template to one that keeps turns as they are, or that puts "
    "{{% generation %}} around them"
)


class Span(NamedTuple):
    """Characters [start, end) of a rendered conversation."""

    start: int
    end: int


class Renderer:
    """Renders with one tokenizer's template; RecipeError when it has none."""

    def __init__(self, tokenizer: Any):
        if not tokenizer.chat_template:
            raise RecipeError(
                "tokenizer.chat_template: the tokenizer has no chat template; give one as Jinja "
                "text or as a file"
            )
        self._tokenizer = tokenizer

    def text(self, conversation: Conversation) -> str:
        """The whole conversation; DataError when the template refuses it or hides its tools."""
        try:
            text = self._render(conversation.messages, conversation.tools)
        except TEMPLATE_FAULTS as fault:
            raise DataError(f"the chat template refuses the conversation: {fault}") from None
        for field, without in _without_tools(conversation):
            if self._render(without.messages, without.tools) == text:
                raise DataError(
                    f"{field}: the chat template does not show them; set tokenizer.chat_template "
                    f"to one that does, or remove them"
                )
        return text

    def assistant_spans(self, conversation: Conversation, text: str) -> list[Span]:
        """Where the assistant's turns stand in `text`; DataError when that cannot be proven."""
        messages, tools = conversation
        template = self._tokenizer.get_chat_template(None, tools)
        if GENERATION.search(template):
            return self._spans_of_template(conversation, template, text)
        spans = []
        for turn in _assistant_turns(messages):
            span = self._span_of_prefixes(messages, tools, turn, text)
            if span is None:
                return self._spans_of_marks(conversation, text)
            spans.append(span)
        return spans

    def _render(
        self, messages: list[Message], tools: list[Any] | None, *, prompt: bool = False
    ) -> str:
        return self._tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompt
        )

    def _spans_of_template(
        self, conversation: Conversation, template: str, text: str
    ) -> list[Span]:
        (rendered,), (spans,) = render_jinja_template(
            [conversation.messages],
            tools=conversation.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        if rendered != text:
            raise DataError("the chat template renders the same conversation in two ways")
        return [Span(start, end) for start, end in spans]

    def _span_of_prefixes(
        self, messages: list[Message], tools: list[Any] | None, turn: int, text: str
    ) -> Span | None:
        """The turn's span if what comes before it, and what comes up to its end, begin `text`."""
        try:
            before = self._render(messages[:turn], tools, prompt=True)
            through = text
            if turn + 1 < len(messages):
                through = self._render(messages[: turn + 1], tools)
        except TEMPLATE_FAULTS:  # the template wants whole conversations, or one more turn
            return None
        if not (through.startswith(before) and text.startswith(through)):
            return None
        return Span(len(before), len(through))

    def _spans_of_marks(self, conversation: Conversation, text: str) -> list[Span]:
        """For templates that write a turn differently once others follow it.

        A marker at the end of each content shows where it went. Two things are proven for every
        span: without its markers the marked text is `text`, so that they changed nothing; and
        what opens and closes the turn stands literally beside a marker."""
        messages, tools = conversation
        marks = _Marks(text)
        turns = _assistant_turns(messages)
        anchors = {*turns, *(turn - 1 for turn in turns if turn)}
        ended = [marks.ended(m, i) if i in anchors else m for i, m in enumerate(messages)]
        opened = [marks.opened(m, i) if i in turns else m for i, m in enumerate(messages)]
        ends = self._places(ended, tools, marks, text) or {}
        starts = self._places(opened, tools, marks, text) or {}
        spans: list[Span] = []
        for turn in turns:
            if turn not in ends:
                raise DataError(UNPROVEN.format(turn=turn))
            start = self._opening(ended, tools, marks, turn, ends, text)
            start = starts.get(turn) if start is None else start
            previous = spans[-1].end if spans else 0
            if start is None or not previous <= start <= ends[turn]:
                raise DataError(UNPROVEN.format(turn=turn))
            close = self._closing(ended, tools, marks, turn)
            is_there = text.startswith(close, ends[turn])
            spans.append(Span(start, ends[turn] + (len(close) if is_there else 0)))
        return spans

    def _places(
        self, marked: list[Message], tools: list[Any] | None, marks: "_Marks", text: str
    ) -> dict[int, int] | None:
        try:
            plain, places = marks.removed(self._render(marked, tools))
        except TEMPLATE_FAULTS:
            return None
        return places if plain == text else None

    def _opening(
        self,
        ended: list[Message],
        tools: list[Any] | None,
        marks: "_Marks",
        turn: int,
        ends: dict[int, int],
        text: str,
    ) -> int | None:
        """Where the generation prompt ends that follows the content of the turn before."""
        if turn - 1 not in ends:
            return None
        try:
            prompt, places = marks.removed(self._render(ended[:turn], tools, prompt=True))
        except TEMPLATE_FAULTS:
            return None
        if turn - 1 not in places:
            return None
        opening = prompt[places[turn - 1] :]
        start = ends[turn - 1] + len(opening)
        return start if text.startswith(opening, ends[turn - 1]) and start <= ends[turn] else None

    def _closing(
        self, ended: list[Message], tools: list[Any] | None, marks: "_Marks", turn: int
    ) -> str:
        """What the template writes after the turn's content when nothing follows."""
        try:
            rendered, places = marks.removed(self._render(ended[: turn + 1], tools))
        except TEMPLATE_FAULTS:
            return ""
        return rendered[places[turn] :] if turn in places else ""


class _Marks:
    """Markers that look like a word, so that no template strips, escapes or splits them."""

    def __init__(self, text: str):
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        self._stem = f"Mark{digest}n"
        self._pattern = re.compile(rf"{self._stem}(\d+)e")

    def ended(self, message: Message, number: int) -> Message:
        """Inside of trailing white space, which templates may strip."""
        content = message["content"]
        body = content.rstrip()
        return {**message, "content": f"{body}{self._stem}{number}e{content[len(body) :]}"}

    def opened(self, message: Message, number: int) -> Message:
        content = message["content"]
        body = content.lstrip()
        blank = content[: len(content) - len(body)]
        return {**message, "content": f"{blank}{self._stem}{number}e{body}"}

    def removed(self, rendered: str) -> tuple[str, dict[int, int]]:
        """The text without markers, and where those stood that occur once."""
        places: dict[int, int] = {}
        repeated: set[int] = set()
        pieces, cut, length = [], 0, 0
        for match in self._pattern.finditer(rendered):
            pieces.append(rendered[cut : match.start()])
            length += len(pieces[-1])
            cut = match.end()
            number = int(match[1])
            if number in places:
                repeated.add(number)
            places[number] = length
        pieces.append(rendered[cut:])
        return "".join(pieces), {n: at for n, at in places.items() if n not in repeated}


def _assistant_turns(messages: list[Message]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _without_tools(conversation: Conversation) -> list[tuple[str, Conversation]]:
    """The conversation without what only some templates show, under the name of its field."""
    variants = []
    if conversation.tools:
        variants.append(("tools", conversation._replace(tools=None)))
    if any("tool_calls" in message for message in conversation.messages):
        bare = [{k: v for k, v in m.items() if k != "tool_calls"} for m in conversation.messages]
        variants.append(("tool_calls", conversation._replace(messages=bare)))
    return variants
