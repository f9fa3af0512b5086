"""Renders conversations with a tokenizer's chat template."""

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_ulong, py_object, pythonapi
from datetime import datetime
from functools import lru_cache
from threading import Lock, Thread, get_ident
from types import SimpleNamespace
from typing import Any, NamedTuple

import jinja2

from jaxtrain.data.conversation import Conversation, Message, stringify_arguments
from jaxtrain.data.spans import (
    REASONING,
    Render,
    Span,
    check_shown,
    count_shared,
    find_hidden,
    find_turns,
    says_something,
)
from jaxtrain.recipe.errors import DataError, RecipeError, show

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# A template is code that runs on a user's data: this is what it raises on data that do not fit.
TEMPLATE_FAULTS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
    RecursionError, MemoryError,
)  # fmt: skip
TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
DATE = datetime(2024, 7, 26)
"""Replaces today in templates, so that documents stay the same; Llama's default to this day."""

MAX_RENDER_S = 10.0
MAX_CHARACTERS = 100_000_000

_rendering = Lock()
_watched: Any = SimpleNamespace(pid=None, lock=Lock(), thread=None, began=0.0)
"""The thread that renders, and since when."""


class TemplateQuirks(NamedTuple):
    """Peculiarities of a template that rendering corrects."""

    joins_arguments: bool
    """It writes the arguments of calls as they are, so it receives JSON text, not Python's repr."""
    trailing_prompt: str
    """The generation prompt, if written after every conversation: it is removed."""


class Rendering(NamedTuple):
    """A conversation as text, and what of it is not in the text."""

    text: str
    hidden: tuple[str, ...] = ()
    """Of HIDDEN_SYSTEM and HIDDEN_THOUGHTS, what the template leaves out."""
    unread: tuple[str, ...] = ()
    """Fields of turns and arguments that the template does not name."""


READ_FIELDS = {"role", "content", "weight", "tool_calls", *REASONING}
"""Fields of a turn that are used, or refused where the template does not show them."""


class Renderer:
    """Renders conversations; RecipeError when the tokenizer has no template."""

    def __init__(self, tokenizer: Any):
        if not tokenizer.chat_template:
            raise RecipeError(
                "tokenizer.chat_template: the tokenizer has no chat template; write one as Jinja "
                "text or as a file"
            )
        self._tokenizer = tokenizer
        self._special_tokens = tuple(tokenizer.special_tokens_map.items())

    def render(self, conversation: Conversation) -> Rendering:
        """Renders a conversation; DataError when the template refuses it, or hides more of it than
        system texts and the thoughts of replies to earlier questions."""
        messages, tools, _, kwargs = conversation
        try:
            text, _ = self._apply(messages, conversation)
        except TEMPLATE_FAULTS as fault:
            raise DataError(f"the chat template refuses the conversation: {fault}") from None
        check_characters(text)
        if tools and self._make_render(conversation._replace(tools=None))(messages, False) == text:
            raise DataError(
                "tools: the chat template does not show them; set tokenizer.chat_template to one "
                "that does, or remove them"
            )
        hidden = find_hidden(self._make_render(conversation), messages, text)
        names = self._find_names(self._tokenizer.get_chat_template(None, tools))
        fields = {f"messages[].{key}" for m in messages for key in m.keys() - names - READ_FIELDS}
        fields |= {f"chat_template_kwargs.{key}" for key in (kwargs or {}).keys() - names}
        return Rendering(text, tuple(sorted(hidden)), tuple(sorted(fields)))

    @staticmethod
    @lru_cache
    def _find_names(template: str) -> frozenset[str]:
        return frozenset(re.findall(r"\w+", template))

    def find_spans(
        self, conversation: Conversation, text: str, roles: Sequence[str] = ("assistant",)
    ) -> list[Span]:
        """Finds the trained spans of `text`: turns of `roles` that are no part of a prompt, or the
        template's own {% generation %} blocks for the assistant; DataError when unproven."""
        messages, tools, prompt_turns, _ = conversation
        turns = [
            index
            for index, message in enumerate(messages)
            if message["role"] in roles and index >= prompt_turns
            if message.get("weight", 1) and says_something(message)
        ]
        template = self._tokenizer.get_chat_template(None, tools)
        render = self._make_render(conversation)
        if not GENERATION.search(template) or tuple(roles) != ("assistant",):
            return find_turns(render, messages, turns, text)
        rendered, (places,) = self._apply(messages, conversation, return_assistant_tokens_mask=True)
        if rendered != text:
            raise DataError("the chat template renders the same conversation in two ways")
        spans = [Span(int(start), int(end)) for start, end in places]
        check_shown(messages, turns, [text[start:end] for start, end in spans])
        if len(turns) == sum(message["role"] == "assistant" for message in messages):
            return spans
        replies = find_turns(render, messages, turns, text)
        return [span for span in spans if any(r.start <= span.start < r.end for r in replies)]

    def _make_render(self, conversation: Conversation) -> Render:
        def render(messages: list[Message], prompt: bool) -> str | None:
            if not messages:  # templates read the first
                return None
            try:
                return self._apply(messages, conversation, add_generation_prompt=prompt)[0]
            except TEMPLATE_FAULTS:  # it needs whole conversations, or one more turn
                return None

        return render

    def _apply(
        self, messages: list[Message], conversation: Conversation, **options: Any
    ) -> tuple[str, Any]:
        """Returns the text of messages of a conversation, and the places of generation blocks."""
        tools = conversation.tools
        template = _fix_date(self._tokenizer.get_chat_template(None, tools))
        quirks = _detect_quirks(template, self._special_tokens)
        options |= {"tools": tools, "chat_template": template, **dict(self._special_tokens)}
        options = (conversation.template_kwargs or {}) | options
        if quirks.joins_arguments:
            messages = stringify_arguments(messages)
        try:
            text, places = _render_template(messages, options)
        except TEMPLATE_FAULTS:
            with_texts = stringify_arguments(messages)
            if with_texts == messages:
                raise
            text, places = _render_template(with_texts, options)
        if not options.get("add_generation_prompt"):
            text = text.removesuffix(quirks.trailing_prompt)
        return text, places


def _render_template(messages: list[Message], arguments: dict[str, Any]) -> tuple[str, Any]:
    """Renders one at a time: transformers notes generation blocks in the template's only
    environment, and would mix in those of another thread."""
    from transformers.utils.chat_template_utils import render_jinja_template

    with _rendering, _limit_time():
        (text,), places = render_jinja_template([messages], **arguments)
    if len(text) > MAX_CHARACTERS:
        raise jinja2.TemplateError(f"renders {len(text):,} characters")
    return text, places


class _EndlessTemplate(jinja2.TemplateError):
    def __init__(self) -> None:
        super().__init__(f"renders for more than {MAX_RENDER_S:g} s")


@contextmanager
def _limit_time() -> Iterator[None]:
    """Raises `_EndlessTemplate` in this thread while what is inside takes too long: Jinja has no
    bound, and a signal would need the main thread."""
    if _watched.pid != os.getpid():  # threads do not survive a fork
        _watched.pid = os.getpid()
        Thread(target=_watch, daemon=True, name="template watchdog").start()
    with _watched.lock:
        _watched.thread, _watched.began = get_ident(), time.monotonic()
    try:
        yield
    finally:
        with _watched.lock:
            _watched.thread = None


def _watch() -> None:
    seen, cpu_began = 0.0, 0.0
    while True:
        time.sleep(1)
        with _watched.lock:
            if _watched.began != seen:
                seen, cpu_began = _watched.began, time.process_time()
            # Time of the processor too: a machine that stands still is no fault of the template.
            spent = min(time.monotonic() - seen, time.process_time() - cpu_began)
            if _watched.thread is not None and spent > MAX_RENDER_S:
                thread, _watched.thread = c_ulong(_watched.thread), None
                pythonapi.PyThreadState_SetAsyncExc(thread, py_object(_EndlessTemplate))


@lru_cache
def _detect_quirks(template: str, special: tuple[tuple[str, Any], ...]) -> TemplateQuirks:
    """Detects the quirks of a template from conversations made for this purpose."""

    def render(*messages: Message, prompt: bool = False) -> str:
        arguments = {"chat_template": template, "add_generation_prompt": prompt, **dict(special)}
        try:
            return _render_template(list(messages), arguments)[0]
        except TEMPLATE_FAULTS:
            return ""

    user, reply = {"role": "user", "content": "Probe0"}, {"role": "assistant", "content": "Probe1"}
    function = {"name": "f", "arguments": {"x": "y"}}
    call = {"type": "function", "id": "Probe2345", "function": function}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    answer = {"role": "tool", "name": "f", "tool_call_id": "Probe2345", "content": "Probe6"}
    joins_arguments = "{'x': 'y'}" in render(user, called, answer, reply)

    text, prompted, more = render(user, reply), render(user, prompt=True), render(user, reply, user)
    _, is_shown, tail = text.rpartition("Probe1")
    prompt = ""
    if is_shown and "Probe1" in more and text == render(user, reply, prompt=True):
        shared = tail[: count_shared(tail, more.rpartition("Probe1")[2])]
        # What closes a turn is followed by what opens the next, as the first is opened.
        firsts = (text.removeprefix(dict(special).get("bos_token", "")), text)
        cuts = (n for first in firsts for n in range(len(shared)) if first.startswith(shared[n:]))
        closing = next(cuts, len(shared))
        opened = count_shared(prompted, text) - len(prompted) + len(tail)
        if opened > len(shared) and prompted.endswith(tail[closing:]):
            prompt = tail[closing:]
    return TemplateQuirks(joins_arguments, prompt)


def encode_prompt(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] | None = None
) -> list[int]:
    """Returns the tokens of a conversation up to where a reply begins; RecipeError without a chat
    template, DataError when it refuses the conversation."""
    if not tokenizer.chat_template:
        raise RecipeError(
            "tokenizer.chat_template: the tokenizer has no chat template, which says how a "
            "question is asked"
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=tools, add_generation_prompt=True, return_dict=True
        )["input_ids"]
    except TEMPLATE_FAULTS as fault:
        raise DataError(f"the chat template refuses the conversation: {fault}") from None


def find_stop_tokens(tokenizer: Any) -> list[int]:
    """Returns the tokens that end a turn: EOS, and what the chat template writes after a reply or
    after the calls of one, as the closing of each single call does not."""
    stops = {tokenizer.eos_token: None}
    if tokenizer.chat_template:
        special = tuple(tokenizer.special_tokens_map.items())
        template = _fix_date(tokenizer.get_chat_template(None, None))
        stops |= dict.fromkeys(_find_closings(template, special, _list_added(tokenizer)))
    stops.pop(None, None)
    return [tokenizer.convert_tokens_to_ids(token) for token in stops]


def _list_added(tokenizer: Any) -> tuple[str, ...]:
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    return tuple(sorted(added, key=len, reverse=True))


@lru_cache
def _find_closings(
    template: str, special: tuple[tuple[str, Any], ...], added: tuple[str, ...]
) -> list[str]:
    """Returns the added tokens that end a reply of text, and the one that ends a reply of calls."""
    trailing = _detect_quirks(template, special).trailing_prompt
    if not added:
        return []
    find = re.compile("|".join(map(re.escape, added))).findall
    user, reply = {"role": "user", "content": "Probe0"}, {"role": "assistant", "content": "Probe1"}

    def call(*values: str) -> Message:
        calls = [
            {"type": "function", "id": f"Id{v}0", "function": {"name": "f", "arguments": {"x": v}}}
            for v in values
        ]
        return {"role": "assistant", "content": "", "tool_calls": calls}

    def render(*messages: Message) -> str:
        arguments = {"chat_template": template, "add_generation_prompt": False, **dict(special)}
        for converted in (list(messages), stringify_arguments(list(messages))):
            try:
                return _render_template(converted, arguments)[0].removesuffix(trailing)
            except TEMPLATE_FAULTS:
                continue
        return ""

    found = find(render(user, reply).rpartition("Probe1")[2])
    _, is_called, tail = render(user, call("Probe2")).rpartition("Probe2")
    between = render(user, call("Probe2", "Probe3")).rpartition("Probe3")[0].rpartition("Probe2")[2]
    closings = [token for token in find(tail) if token not in find(between)] if is_called else []
    return [*found, *closings[-1:]]


def check_characters(text: str) -> None:
    """Raises DataError for half characters, which JSON can write and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        half = ord(text[fault.start])
        raise DataError(
            f"U+{half:04X} is half of a character, found after "
            f"{show(text[max(0, fault.start - 20) : fault.start])}; remove it"
        ) from None


@lru_cache
def _fix_date(template: str) -> str:
    return TODAY.sub(lambda found: repr(DATE.strftime(found[2])), template)
