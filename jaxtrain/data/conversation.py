"""From a row of columns to a conversation: a list of `{role, content}` turns in their order.

Faults are `DataError`s that name the field; whoever knows the row puts its place in front.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from jaxtrain.data.rows import missing_column
from jaxtrain.recipe.data import ROLES
from jaxtrain.recipe.errors import DataError, did_you_mean, show

Message = dict[str, Any]
Row = Mapping[str, Any]

SHARED_NAMES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
"""Value of `from` in a `conversations` row → role."""
CONTENT_KEYS = ("content", "text", "message", "value")
ACCEPTED = (
    "messages; conversations; prompt and response or completion; instruction and output; "
    "user and assistant"
)


class Conversation(NamedTuple):
    messages: list[Message]
    tools: list[Any] | None = None
    """What the template shows as callable, in the data set's own JSON."""
    prompt_turns: int = 0
    """So many turns come from the prompt of a row that has a prompt and a reply."""


class MappedRoles:
    """A row read by `role_mapping`: columns first, then the turns of each array as they stand."""

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
        # A map in a recipe has no order that a person means; a conversation has.
        place = {"system": 0, "developer": 0, "user": 1, "assistant": 3}
        self._columns.sort(key=lambda pair: place.get(pair[0], 2))

    def __call__(self, row: Row) -> dict[str, Any]:
        turns = [turn for role, column in self._columns for turn in _column(row, role, column)]
        for (array, field), roles in self._arrays.items():
            turns += self._turns(row, array, field, roles)
        if not turns:
            raise DataError(f"role_mapping found no turn; columns are {', '.join(row)}")
        return {**row, "system": None, "messages": turns}  # what is mapped is all that is said

    def _turns(self, row: Row, array: str, field: str, roles: dict[str, str]) -> list[Message]:
        turns = []
        for index, turn in enumerate(_list(row, array)):
            place = f"{array}[{index}]"
            value = _field(turn, field, place)
            if value not in roles:
                raise DataError(
                    f"{place}.{field}: {show(value)} has no role in role_mapping, which knows "
                    f"{', '.join(roles)}{did_you_mean(str(value), roles)}"
                )
            key = self._content_key or next((k for k in CONTENT_KEYS if turn.get(k)), None)
            key = key or next((k for k in CONTENT_KEYS if k in turn), CONTENT_KEYS[0])
            rest = {k: v for k, v in turn.items() if k not in (field, key, "role")}
            turns.append({"role": roles[value], "content": _field(turn, key, place), **rest})
        return turns


def to_conversation(row: Row) -> Conversation:
    """The turns of a row in any of the accepted forms; DataError names the field at fault."""
    prompt_turns = 0
    for columns, read in FORMS:
        if all(column in row for column in columns):
            messages = [_checked(m, f"messages[{i}]") for i, m in enumerate(read(row))]
            if columns[0] == "prompt":
                reply = row[columns[1]]
                prompt_turns = len(messages) - (len(reply) if isinstance(reply, list) else 1)
            break
    else:
        near = next(filter(None, (did_you_mean(column, COLUMNS) for column in row)), "")
        raise DataError(
            f"columns {', '.join(row) or 'none'} hold no conversation; one of: {ACCEPTED}{near}"
        )
    if not messages:
        raise DataError("messages: empty conversation")
    return Conversation(messages, tools_of(row), prompt_turns)


def turns_of(row: Row, column: str, role: str = "assistant") -> list[Message]:
    """The checked turns of a column: text, which `role` says; one turn; or a list of turns."""
    if column not in row:
        raise missing_column(column, row)
    value = row[column]
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list):
        raise DataError(f"{column}: must be text or a list of turns, found {show(value)}")
    checked = []
    for index, turn in enumerate(turns):
        place = f"{column}[{index}]"
        is_shared = isinstance(turn, Mapping) and "from" in turn
        checked.append(_checked(_shared_turn(turn, place) if is_shared else turn, place))
    return checked


def _messages(row: Row) -> list[Message]:
    """A system column is their first turn, unless they have their own."""
    turns = _list(row, "messages")
    has_own = any(isinstance(turn, Mapping) and turn.get("role") == "system" for turn in turns[:1])
    return turns if has_own else [*system_turns(row), *turns]


def _shared(row: Row) -> list[Message]:
    """ShareGPT's form: `conversations` of `{from, value}`, or of `{role, content}`."""
    turns = enumerate(_list(row, "conversations"))
    return system_turns(row) + [_shared_turn(turn, f"conversations[{i}]") for i, turn in turns]


def _shared_turn(turn: Any, place: str) -> Message:
    if isinstance(turn, Mapping) and "role" in turn and "from" not in turn:
        return dict(turn)
    sender = _field(turn, "from", place)
    role = SHARED_NAMES.get(sender) if isinstance(sender, str) else None
    if role is None:
        raise DataError(
            f"{place}.from: unknown role {show(sender)}; known are {', '.join(SHARED_NAMES)}"
            f"{did_you_mean(str(sender), SHARED_NAMES)}"
        )
    value = _field(turn, "value", place)
    if sender == "function_call":
        return {"role": role, "content": "", "tool_calls": _calls(value, f"{place}.value")}
    return {"role": role, "content": value}


def _calls(value: Any, place: str) -> list[Any]:
    """Calls as most templates want them, with maps as arguments: text would be escaped by those
    that write JSON themselves."""
    calls = _json(value, place)
    wrapped = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else call
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{place}: a call has a name and arguments, found {show(call)}")
        if isinstance(arguments := function.get("arguments"), str):
            with suppress(json.JSONDecodeError):
                parsed = json.loads(arguments)
                arguments = parsed if isinstance(parsed, dict) else arguments
            function = {**function, "arguments": arguments}
        rest = call if "function" in call else {}
        wrapped.append({"type": "function", **rest, "function": function})
    return wrapped


def with_text_arguments(messages: list[Message]) -> list[Message]:
    """For the templates that join the arguments of calls to other text."""
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


def _prompt(reply: str) -> Callable[[Row], list[Message]]:
    """Both sides are text, or lists of turns."""

    def read(row: Row) -> list[Message]:
        return [*system_turns(row), *turns_of(row, "prompt", "user"), *turns_of(row, reply)]

    return read


def _instruction(row: Row) -> list[Message]:
    (turn,) = _column(row, "user", "instruction")
    if given := row.get("input"):
        if not isinstance(given, str):
            raise DataError(f"input: must be text, found {show(given)}")
        turn["content"] += f"\n{given}"
    return [*system_turns(row), turn, *_column(row, "assistant", "output")]


def _two_columns(row: Row) -> list[Message]:
    return MappedRoles({"user": "user", "assistant": "assistant"})(row)["messages"]


def system_turns(row: Row) -> list[Message]:
    return _column(row, "system", "system") if row.get("system") else []


FORMS: tuple[tuple[tuple[str, ...], Callable[[Row], list[Message]]], ...] = (
    (("messages",), _messages),
    (("conversations",), _shared),
    (("prompt", "response"), _prompt("response")),
    (("prompt", "completion"), _prompt("completion")),
    (("instruction", "output"), _instruction),
    (("user", "assistant"), _two_columns),
)
"""Columns that a form needs → its reader; the first that a row has all columns of counts."""
COLUMNS = tuple(dict.fromkeys(column for columns, _ in FORMS for column in columns))


def _column(row: Row, role: str, column: str) -> list[Message]:
    """One turn; none for a system column that this row leaves empty."""
    if column not in row:
        raise missing_column(column, row)
    value = row[column]
    if role == "system" and not value:
        return []
    if not isinstance(value, str):
        raise DataError(f"{column}: must be text, found {show(value)}")
    return [{"role": role, "content": value}]


def _list(row: Row, column: str) -> list[Any]:
    if column not in row:
        raise missing_column(column, row)
    if not isinstance(row[column], list):
        raise DataError(f"{column}: must be a list of turns, found {show(row[column])}")
    return row[column]


def _field(turn: Any, field: str, place: str) -> Any:
    if not isinstance(turn, Mapping):
        raise DataError(f"{place}: must be a map, found {show(turn)}")
    if field not in turn:
        raise DataError(f"{place}: no field {show(field)}, found {', '.join(turn) or 'none'}")
    return turn[field]


def _checked(message: Any, place: str) -> Message:
    """A turn as templates want it: a known role, text content, no fields that are null."""
    role = _field(message, "role", place)
    if role not in ROLES:
        raise DataError(
            f"{place}.role: unknown role {show(role)}; known are {', '.join(ROLES)}"
            f"{did_you_mean(str(role), ROLES)}"
        )
    # A typed table fills a field that one turn has with null in all others.
    kept = {key: value for key, value in message.items() if value is not None}
    calls = kept.pop("tool_calls", None) or kept.pop("function_call", None)
    if calls:
        kept["tool_calls"] = _calls(calls, f"{place}.tool_calls")
        kept.setdefault("content", "")
    content = kept["content"] if "content" in kept else _field(message, "content", place)
    kept["content"] = _text(content, f"{place}.content")
    return kept


def _text(content: Any, place: str) -> str:
    """Content written as a list of text parts is their text joined."""
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


def tools_of(row: Row) -> list[Any] | None:
    tools = row.get("tools")
    if not tools:
        return None
    tools = _json(tools, "tools")
    if not isinstance(tools, list):
        raise DataError(f"tools: must be a list, found {show(tools)}")
    return tools or None


def _json(value: Any, place: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as fault:
        raise DataError(f"{place}: must be JSON ({fault.msg}), found {show(value)}") from None
