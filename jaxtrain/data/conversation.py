"""Reads a record as a conversation: a list of `{role, content}` turns in their order.

Faults are `DataError`s that name the field; the caller puts the place of the record before it.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from jaxtrain.data.records import get_column, get_text, load_json
from jaxtrain.recipe.data import ROLES
from jaxtrain.recipe.errors import DataError, did_you_mean, show

Message = dict[str, Any]
Record = Mapping[str, Any]

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
"""Value of `from` in `conversations` → role."""
CONTENT_KEYS = ("content", "text", "message", "value")
ACCEPTED = (
    "messages; conversations; prompt and response or completion; instruction and output; "
    "user and assistant"
)


RESERVED = (
    "messages", "conversations", "tools", "chat_template", "add_generation_prompt",
    "continue_final_message", "return_assistant_tokens_mask",
)  # fmt: skip
"""Arguments of a template that no record may set, since they are what is rendered."""
LEFT_OUT = "{} (which role_mapping leaves out)"
"""Name of a system column that would otherwise begin the conversation."""


class Conversation(NamedTuple):
    messages: list[Message]
    """Turns as templates read them; a `weight` of 0 says that a turn is not trained."""
    tools: list[Any] | None = None
    """Functions that the template offers, in the data set's own JSON."""
    prompt_turns: int = 0
    """Number of turns that are the prompt, in a record that has a prompt and a reply."""
    template_kwargs: dict[str, Any] | None = None
    """Further arguments of the template."""


class RoleMapper:
    """Reads records by `role_mapping`: columns first, then the turns of each array in order."""

    def __init__(self, mapping: Mapping[str, str], content_key: str | None = None):
        self._columns: list[tuple[str, str]] = []
        self._arrays: dict[tuple[str, str], dict[str, str]] = {}
        self._content_key = content_key
        for role, source in mapping.items():
            parts = source.split(".")
            if len(parts) == 3:
                self._arrays.setdefault((parts[0], parts[1]), {})[parts[2]] = role
            else:
                self._columns.append((role, source))
        # The order of a map in a recipe means nothing; that of a conversation does.
        place = {"system": 0, "developer": 0, "user": 1, "assistant": 3}
        self._columns.sort(key=lambda pair: place.get(pair[0], 2))

    def __call__(self, record: Record) -> dict[str, Any]:
        columns = (_read_column(record, role, column) for role, column in self._columns)
        turns = [turn for turns in columns for turn in turns]
        for (array, field), roles in self._arrays.items():
            turns += self._read_array(record, array, field, roles)
        if not turns:
            raise DataError(f"role_mapping found no turn; columns are {', '.join(record)}")
        used = {column for _, column in self._columns} | {array for array, _ in self._arrays}
        rest = {
            LEFT_OUT.format(column) if column in SYSTEM_COLUMNS else column: value
            for column, value in record.items()
            if column not in used
        }
        return {**rest, "messages": turns}

    def _read_array(
        self, record: Record, array: str, field: str, roles: dict[str, str]
    ) -> list[Message]:
        turns = []
        for index, turn in enumerate(_get_list(record, array)):
            place = f"{array}[{index}]"
            value = _get_field(turn, field, place)
            if value not in roles:
                raise DataError(
                    f"{place}.{field}: {show(value)} has no role in role_mapping; known are "
                    f"{', '.join(roles)}{did_you_mean(str(value), roles)}"
                )
            key = self._content_key or next((k for k in CONTENT_KEYS if turn.get(k)), None)
            key = key or next((k for k in CONTENT_KEYS if k in turn), CONTENT_KEYS[0])
            rest = {k: v for k, v in turn.items() if k not in (field, key, "role")}
            turns.append({"role": roles[value], "content": _get_field(turn, key, place), **rest})
        return turns


def read_conversation(record: Record) -> Conversation:
    """Reads a record in any of the accepted forms; DataError names the field at fault."""
    prompt_turns = 0
    for columns, read in FORMS:
        if all(column in record for column in columns):
            messages = [_check_message(m, f"messages[{i}]") for i, m in enumerate(read(record))]
            if columns[0] == "prompt":
                reply = record[columns[1]]
                prompt_turns = len(messages) - (len(reply) if isinstance(reply, list) else 1)
            break
    else:
        # `problem` is no misspelt `prompt`.
        others = (column for column in record if column not in COLUMNS)
        near = next(filter(None, (did_you_mean(column, COLUMNS, 0.8) for column in others)), "")
        raise DataError(
            f"columns {', '.join(record) or 'none'} hold no conversation; "
            f"accepted are {ACCEPTED}{near}; other columns have their roles in the source's "
            "role_mapping, such as {user: question, assistant: answer}"
        )
    if not messages:
        raise DataError("messages: empty conversation")
    return Conversation(messages, read_tools(record), prompt_turns, read_kwargs(record))


def read_turns(record: Record, column: str, role: str = "assistant") -> list[Message]:
    """Reads and checks the turns of a column: text said by `role`, one turn, or a list of turns."""
    value = get_column(record, column)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list):
        raise DataError(f"{column}: must be text or a list of turns, found {show(value)}")
    checked = []
    for index, turn in enumerate(turns):
        place = f"{column}[{index}]"
        if isinstance(turn, Mapping) and "from" in turn:
            turn = _read_shared_turn(turn, place)
        checked.append(_check_message(turn, place))
    return checked


def _read_messages(record: Record) -> list[Message]:
    """Reads `messages`, after the `system` column unless they have a system turn of their own."""
    turns = _get_list(record, "messages")
    has_own = any(isinstance(turn, Mapping) and turn.get("role") == "system" for turn in turns[:1])
    return turns if has_own else [*read_system(record), *turns]


def _read_shared(record: Record) -> list[Message]:
    """Reads ShareGPT's form: `conversations` of `{from, value}`, or of `{role, content}`."""
    shared = enumerate(_get_list(record, "conversations"))
    turns = [_read_shared_turn(turn, f"conversations[{i}]") for i, turn in shared]
    return [*read_system(record), *turns]


def _read_shared_turn(turn: Any, place: str) -> Message:
    if isinstance(turn, Mapping) and "role" in turn and "from" not in turn:
        return dict(turn)
    sender = _get_field(turn, "from", place)
    role = SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
    if role is None:
        raise DataError(
            f"{place}.from: unknown role {show(sender)}; known are {', '.join(SHAREGPT_ROLES)}"
            f"{did_you_mean(str(sender), SHAREGPT_ROLES)}"
        )
    value = _get_field(turn, "value", place)
    rest = {k: v for k, v in turn.items() if k not in ("from", "value", "role", "content")}
    if sender == "function_call":
        calls = _read_calls(value, f"{place}.value")
        return {**rest, "role": role, "content": "", "tool_calls": calls}
    return {**rest, "role": role, "content": value}


def _read_calls(value: Any, place: str) -> list[Any]:
    """Returns calls as most templates want them, with maps as arguments: templates that write JSON
    themselves would escape text."""
    calls = _parse_json(value, place)
    wrapped = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else call
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{place}: a call must have a name and arguments, found {show(call)}")
        if isinstance(arguments := function.get("arguments"), str):
            with suppress(json.JSONDecodeError):
                parsed = load_json(arguments)
                arguments = parsed if isinstance(parsed, dict) else arguments
            function = {**function, "arguments": arguments}
        rest = call if "function" in call else {}
        wrapped.append({"type": "function", **rest, "function": function})
    return wrapped


def stringify_arguments(messages: list[Message]) -> list[Message]:
    """Returns messages with the arguments of calls as JSON, for templates that insert text."""
    changed = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if isinstance(function.get("arguments"), Mapping):
                text = json.dumps(function["arguments"], ensure_ascii=False)
                function = {**function, "arguments": text}
            calls.append({**call, "function": function})
        changed.append({**message, "tool_calls": calls} if calls else message)
    return changed


def _read_pair(record: Record, reply: str) -> list[Message]:
    """Reads `prompt` and `reply`, each of which is text or a list of turns."""
    prompt, replies = read_turns(record, "prompt", "user"), read_turns(record, reply)
    return [*read_system(record), *_read_history(record), *prompt, *replies]


def _read_instruction(record: Record) -> list[Message]:
    (turn,) = _read_column(record, "user", "instruction")
    if record.get("input"):
        turn["content"] += f"\n{get_text(record, 'input')}"
    before = [*read_system(record), *_read_history(record)]
    return [*before, turn, *_read_column(record, "assistant", "output")]


def _read_two_columns(record: Record) -> list[Message]:
    reply = _read_column(record, "assistant", "assistant")
    user = _read_column(record, "user", "user")
    return [*read_system(record), *_read_history(record), *user, *reply]


SYSTEM_COLUMNS = ("system", "system_prompt")


def read_system(record: Record) -> list[Message]:
    column = next((name for name in SYSTEM_COLUMNS if record.get(name)), None)
    return _read_column(record, "system", column) if column else []


def _read_history(record: Record) -> list[Message]:
    """Reads the earlier rounds of a record of one prompt: a list of pairs of text."""
    history = record.get("history") or []
    turns = []
    for index, pair in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
            raise DataError(f"history[{index}]: must be a prompt and a reply, found {show(pair)}")
        turns += [
            {"role": r, "content": t} for r, t in zip(("user", "assistant"), pair, strict=True)
        ]
    return turns


FORMS: tuple[tuple[tuple[str, ...], Callable[[Record], list[Message]]], ...] = (
    (("messages",), _read_messages),
    (("conversations",), _read_shared),
    (("prompt", "response"), partial(_read_pair, reply="response")),
    (("prompt", "completion"), partial(_read_pair, reply="completion")),
    (("instruction", "output"), _read_instruction),
    (("user", "assistant"), _read_two_columns),
)
"""Columns of a form → its reader; a record is read by the first form whose columns it has."""
COLUMNS = tuple(dict.fromkeys(column for columns, _ in FORMS for column in columns))


def _read_column(record: Record, role: str, column: str) -> list[Message]:
    """Reads a column as one turn, or none for a system column that is empty."""
    if role == "system" and not get_column(record, column):
        return []
    return [{"role": role, "content": get_text(record, column)}]


def _get_list(record: Record, column: str) -> list[Any]:
    if not isinstance(turns := get_column(record, column), list):
        raise DataError(f"{column}: must be a list of turns, found {show(turns)}")
    return turns


def _get_field(turn: Any, field: str, place: str) -> Any:
    if not isinstance(turn, Mapping):
        raise DataError(f"{place}: must be a map, found {show(turn)}")
    if field not in turn:
        raise DataError(f"{place}: no field {show(field)}, found {', '.join(turn) or 'none'}")
    return turn[field]


def _map_role(role: Any, place: str) -> str:
    """What to write for a role that has another name in other forms of records."""
    ours = SHAREGPT_ROLES.get(role) if isinstance(role, str) else None
    column = place.partition("[")[0]
    return f"; write role_mapping: {{{ours}: {column}.role.{role}, …}}" if ours else ""


def _check_message(message: Any, place: str) -> Message:
    """Returns a turn as templates want it: a known role, text content and no null fields."""
    role = _get_field(message, "role", place)
    if role not in ROLES:
        raise DataError(
            f"{place}.role: unknown role {show(role)}; known are {', '.join(ROLES)}"
            f"{did_you_mean(str(role), ROLES)}{_map_role(role, place)}"
        )
    # A typed table fills a field that one turn has with null in all others.
    turn = {key: value for key, value in message.items() if value is not None}
    calls = turn.pop("tool_calls", None) or turn.pop("function_call", None)
    if calls:
        turn["tool_calls"] = _read_calls(calls, f"{place}.tool_calls")
        turn.setdefault("content", "")
    if turn.get("weight", 1) not in (0, 1):
        raise DataError(f"{place}.weight: must be 0 or 1, found {show(turn['weight'])}")
    content = turn["content"] if "content" in turn else _get_field(message, "content", place)
    turn["content"] = _join_text(content, f"{place}.content")
    return turn


def _join_text(content: Any, place: str) -> str:
    """Returns the content, joined if it is a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{place}: must be text, found {show(content)}")
    parts = []
    for index, part in enumerate(content):
        text = part.get("text", part.get("value")) if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            raise DataError(f"{place}[{index}]: must be a text part, found {show(part)}")
        parts.append(text)
    return "".join(parts)


def read_tools(record: Record) -> list[Any] | None:
    """Reads `tools` as they are, or else `functions`, the older form of the same, as tools."""
    column = next((name for name in ("tools", "functions") if record.get(name)), None)
    if column is None:
        return None
    tools = _parse_json(record[column], column)
    if not isinstance(tools, list):
        raise DataError(f"{column}: must be a list, found {show(tools)}")
    if column == "functions":
        tools = [
            tool
            if not isinstance(tool, Mapping) or "function" in tool
            else {"type": "function", "function": tool}
            for tool in tools
        ]
    return tools or None


def read_kwargs(record: Record) -> dict[str, Any] | None:
    """Reads `chat_template_kwargs`, and `documents`, which is an argument of templates too."""
    kwargs = _parse_json(record.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    if not isinstance(kwargs, Mapping):
        raise DataError(f"chat_template_kwargs: must be a map, found {show(kwargs)}")
    if reserved := [name for name in kwargs if name in RESERVED]:
        raise DataError(f"chat_template_kwargs.{reserved[0]}: is what is rendered; remove it")
    documents = {"documents": record["documents"]} if record.get("documents") else {}
    # A typed table gives every record the arguments of all others.
    return {k: v for k, v in {**kwargs, **documents}.items() if v is not None} or None


def _parse_json(value: Any, place: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return load_json(value)
    except json.JSONDecodeError as fault:
        raise DataError(f"{place}: must be JSON ({fault.msg}), found {show(value)}") from None
