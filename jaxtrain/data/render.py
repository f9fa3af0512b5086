"""Conversations as one tokenizer's chat template writes them."""

import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from jaxtrain.data.conversation import Conversation, Message, with_text_arguments
from jaxtrain.data.spans import Render, Span, check_calls, check_shown, shared_start, turn_spans
from jaxtrain.recipe.errors import DataError, RecipeError, show

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# A template is code that works on a person's data: this is what it raises on data it does not fit.
TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)
TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
DATE = datetime(2024, 7, 26)
"""Stands for today in templates that write it, so that rows are the same tomorrow; Llama's fall
back on this day."""

_rendering = Lock()


class Habits(NamedTuple):
    """What a template does otherwise than the others, and how it is put right."""

    joins_arguments: bool
    """It writes the arguments of calls as they are: they are given as JSON, since a map would stand
    there in Python's way of writing."""
    standing_prompt: str
    """The generation prompt, where it is written behind every conversation: it is taken off."""


class Renderer:
    """RecipeError when the tokenizer has no template."""

    def __init__(self, tokenizer: Any):
        if not tokenizer.chat_template:
            raise RecipeError(
                "tokenizer.chat_template: the tokenizer has no chat template; give one as Jinja "
                "text or as a file"
            )
        self._tokenizer = tokenizer
        self._special_tokens = tuple(tokenizer.special_tokens_map.items())

    def text(self, conversation: Conversation) -> str:
        """The whole conversation; DataError when the template refuses it or hides its tools."""
        try:
            text = self._render(conversation.messages, conversation.tools)
        except TEMPLATE_FAULTS as fault:
            raise DataError(f"the chat template refuses the conversation: {fault}") from None
        check_characters(text)
        messages, tools, _ = conversation
        if tools and self._render_or_none(None)(messages, False) == text:
            raise DataError(
                "tools: the chat template does not show them; set tokenizer.chat_template to one "
                "that does, or remove them"
            )
        check_calls(self._render_or_none(tools), messages, text)
        return text

    def spans(
        self, conversation: Conversation, text: str, roles: Sequence[str] = ("assistant",)
    ) -> list[Span]:
        """What is trained of `text`: the turns of `roles` that are no part of a prompt; DataError
        when their places cannot be proven. The template's own {% generation %} blocks go first,
        where they are all that is asked for."""
        messages, tools, prompt_turns = conversation
        turns = [i for i, m in enumerate(messages) if m["role"] in roles and i >= prompt_turns]
        template = self._tokenizer.get_chat_template(None, tools)
        if GENERATION.search(template) and tuple(roles) == ("assistant",):
            spans = self._spans_of_template(conversation, text)
            check_shown(messages, turns, [text[start:end] for start, end in spans])
            if len(turns) == sum(message["role"] == "assistant" for message in messages):
                return spans
            replies = turn_spans(self._render_or_none(tools), messages, turns, text)
            return [span for span in spans if any(r.start <= span.start < r.end for r in replies)]
        return turn_spans(self._render_or_none(tools), messages, turns, text)

    def _render_or_none(self, tools: list[Any] | None) -> Render:

        def render(messages: list[Message], prompt: bool) -> str | None:
            if not messages:  # templates look at the first
                return None
            try:
                return self._render(messages, tools, prompt=prompt)
            except TEMPLATE_FAULTS:  # it wants whole conversations, or one more turn
                return None

        return render

    def _render(
        self, messages: list[Message], tools: list[Any] | None, *, prompt: bool = False
    ) -> str:
        return self._filled(messages, tools, add_generation_prompt=prompt)[0]

    def _spans_of_template(self, conversation: Conversation, text: str) -> list[Span]:
        messages, tools, _ = conversation
        rendered, (places,) = self._filled(messages, tools, return_assistant_tokens_mask=True)
        if rendered != text:
            raise DataError("the chat template renders the same conversation in two ways")
        return [Span(int(start), int(end)) for start, end in places]

    def _filled(
        self, messages: list[Message], tools: list[Any] | None, **options: bool
    ) -> tuple[str, Any]:
        """The text, and the places of generation blocks."""
        template = _dated(self._tokenizer.get_chat_template(None, tools))
        habits = _habits(template, self._special_tokens)
        given = {"tools": tools, "chat_template": template, **dict(self._special_tokens), **options}
        if habits.joins_arguments:
            messages = with_text_arguments(messages)
        try:
            text, places = _rendered(messages, given)
        except TEMPLATE_FAULTS:
            with_texts = with_text_arguments(messages)
            if with_texts == messages:
                raise
            text, places = _rendered(with_texts, given)
        if not options.get("add_generation_prompt"):
            text = text.removesuffix(habits.standing_prompt)
        return text, places


def _rendered(messages: list[Message], given: dict[str, Any]) -> tuple[str, Any]:
    """One at a time: transformers notes generation blocks in the template's one environment, and
    would note those that another thread renders meanwhile."""
    with _rendering:
        (text,), places = render_jinja_template([messages], **given)
    return text, places


@lru_cache
def _habits(template: str, special: tuple[tuple[str, Any], ...]) -> Habits:
    """Learned from conversations made for it."""

    def render(*messages: Message, prompt: bool = False) -> str:
        given = {"chat_template": template, "add_generation_prompt": prompt, **dict(special)}
        try:
            return _rendered(list(messages), given)[0]
        except TEMPLATE_FAULTS:
            return ""

    user, reply = {"role": "user", "content": "Probe0"}, {"role": "assistant", "content": "Probe1"}
    function = {"name": "f", "arguments": {"x": "y"}}
    call = {"type": "function", "id": "Probe2345", "function": function}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    answer = {"role": "tool", "name": "f", "tool_call_id": "Probe2345", "content": "Probe6"}
    joins_arguments = "{'x': 'y'}" in render(user, called, answer, reply)

    text, asked, more = render(user, reply), render(user, prompt=True), render(user, reply, user)
    _, is_shown, tail = text.rpartition("Probe1")
    prompt = ""
    if is_shown and "Probe1" in more and text == render(user, reply, prompt=True):
        shared = tail[: shared_start(tail, more.rpartition("Probe1")[2])]
        # What closes a turn is followed by what opens one, as the first is opened.
        firsts = (text.removeprefix(dict(special).get("bos_token", "")), text)
        cuts = (n for first in firsts for n in range(len(shared)) if first.startswith(shared[n:]))
        closing = next(cuts, len(shared))
        opened = shared_start(asked, text) - len(asked) + len(tail)
        if opened > len(shared) and asked.endswith(tail[closing:]):
            prompt = tail[closing:]
    return Habits(joins_arguments, prompt)


def check_characters(text: str) -> None:
    """DataError for text that no tokenizer takes, which JSON can write."""
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        half = ord(text[fault.start])
        raise DataError(
            f"U+{half:04X} is half of a character, found behind "
            f"{show(text[max(0, fault.start - 20) : fault.start])}; remove it"
        ) from None


@lru_cache
def _dated(template: str) -> str:
    return TODAY.sub(lambda found: repr(DATE.strftime(found[2])), template)
