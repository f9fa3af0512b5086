"""Conversations as one tokenizer's chat template writes them."""

import re
from collections.abc import Sequence
from threading import Lock
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from jaxtrain.data.conversation import Conversation, Message
from jaxtrain.data.spans import Render, Span, turn_spans
from jaxtrain.recipe.errors import DataError, RecipeError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# A template is code that works on a person's data: this is what it raises on data it does not fit.
TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)

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
            spans = self._spans_of_template(conversation, template, text)
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
        ((text,), _) = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=self._tokenizer.get_chat_template(None, tools),
            add_generation_prompt=prompt,
            **self._special_tokens,
        )
        return text

    def _spans_of_template(
        self, conversation: Conversation, template: str, text: str
    ) -> list[Span]:
        with _tracking:
            (rendered,), (spans,) = render_jinja_template(
                [conversation.messages],
                tools=conversation.tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self._special_tokens,
            )
        if rendered != text:
            raise DataError("the chat template renders the same conversation in two ways")
        return [Span(int(start), int(end)) for start, end in spans]


def _without_tools(conversation: Conversation) -> list[tuple[str, Conversation]]:
    """The conversation without what only some templates show, under the name of its field."""
    variants = []
    if conversation.tools:
        variants.append(("tools", conversation._replace(tools=None)))
    if any("tool_calls" in message for message in conversation.messages):
        bare = [{k: v for k, v in m.items() if k != "tool_calls"} for m in conversation.messages]
        variants.append(("tool_calls", conversation._replace(messages=bare)))
    return variants
