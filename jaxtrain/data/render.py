"""Conversations as one tokenizer's chat template writes them."""

import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from threading import Lock
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from jaxtrain.data.conversation import Conversation, Message, with_text_arguments
from jaxtrain.data.spans import Render, Span, check_shown, turn_spans
from jaxtrain.recipe.errors import DataError, RecipeError, shown

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# A template is code that works on a person's data: this is what it raises on data it does not fit.
TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)
TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
DATE = datetime(2024, 7, 26)
"""Stands for today in templates that write it, so that rows are the same tomorrow; Llama's fall
back on this day."""

_tracking = Lock()
"""transformers notes generation blocks in the template's one environment."""


class Renderer:
    """RecipeError when the tokenizer has no template."""

    def __init__(self, tokenizer: Any):
        if not tokenizer.chat_template:
            raise RecipeError(
                "tokenizer.chat_template: the tokenizer has no chat template; give one as Jinja "
                "text or as a file"
            )
        self._tokenizer = tokenizer
        self._special_tokens = tokenizer.special_tokens_map

    def text(self, conversation: Conversation) -> str:
        """The whole conversation; DataError when the template refuses it or hides its tools."""
        try:
            text = self._render(conversation.messages, conversation.tools)
        except TEMPLATE_FAULTS as fault:
            raise DataError(f"the chat template refuses the conversation: {fault}") from None
        check_characters(text)
        for field, without in _without_tools(conversation):
            # A template that refuses a reply of a tool without its call does look at calls.
            if self._render_or_none(without.tools)(without.messages, False) == text:
                raise DataError(
                    f"{field}: the chat template does not show them; set "
                    f"tokenizer.chat_template to one that does, or remove them"
                )
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
        return self._filled(messages, tools, add_generation_prompt=prompt)[0][0]

    def _spans_of_template(self, conversation: Conversation, text: str) -> list[Span]:
        with _tracking:
            (rendered,), (places,) = self._filled(
                conversation.messages, conversation.tools, return_assistant_tokens_mask=True
            )
        if rendered != text:
            raise DataError("the chat template renders the same conversation in two ways")
        return [Span(int(start), int(end)) for start, end in places]

    def _filled(self, messages: list[Message], tools: list[Any] | None, **options: Any) -> Any:
        """What transformers makes of the template: texts, and the places of generation blocks."""
        given = {
            "tools": tools,
            "chat_template": _dated(self._tokenizer.get_chat_template(None, tools)),
            **self._special_tokens,
            **options,
        }
        try:
            return render_jinja_template([messages], **given)
        except TEMPLATE_FAULTS:
            with_texts = with_text_arguments(messages)
            if with_texts == messages:
                raise
        return render_jinja_template([with_texts], **given)


def check_characters(text: str) -> None:
    """DataError for text that no tokenizer takes, which JSON can write."""
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        half = ord(text[fault.start])
        raise DataError(
            f"U+{half:04X} is half of a character, found behind "
            f"{shown(text[max(0, fault.start - 20) : fault.start])}; remove it"
        ) from None


@lru_cache
def _dated(template: str) -> str:
    return TODAY.sub(lambda found: repr(DATE.strftime(found[2])), template)


def _without_tools(conversation: Conversation) -> list[tuple[str, Conversation]]:
    """The conversation without what only some templates show, under the name of its field."""
    variants = []
    if conversation.tools:
        variants.append(("tools", conversation._replace(tools=None)))
    if any("tool_calls" in message for message in conversation.messages):
        bare = [{k: v for k, v in m.items() if k != "tool_calls"} for m in conversation.messages]
        variants.append(("tool_calls", conversation._replace(messages=bare)))
    return variants
