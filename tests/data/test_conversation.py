import json

import pytest

from jaxtrain.data.conversation import RoleMapper, read_conversation
from jaxtrain.data.records import ReadColumns
from jaxtrain.recipe.data import RowsConfig
from jaxtrain.recipe.errors import DataError
from tests.tiny import chat


def turns(row):
    return [(m["role"], m["content"]) for m in read_conversation(row).messages]


SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
FORMS = {
    "messages": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    },
    "conversations": {"conversations": SHARED},
    "response": {"prompt": "a", "response": "b"},
    "completion": {"prompt": "a", "completion": "b"},
    "lists": {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    },
    "instruction": {"instruction": "a", "output": "b", "input": ""},
    "columns": {"user": "a", "assistant": "b"},
    "text parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b"},
        ]
    },
}


@pytest.mark.covers("data.sources.*.columns")
@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_turns(row):
    assert turns(row) == [("user", "a"), ("assistant", "b")]


def test_a_system_column_beside_messages_is_their_first_turn():
    assert turns({"messages": chat("a", "b"), "system": "s"})[0] == ("system", "s")
    own = chat("a", "b", system="own")
    assert turns({"messages": own, "system": "s"})[0] == ("system", "own")
    mapped = RoleMapper({"user": "q", "assistant": "a"})({"q": "a", "a": "b", "system": "s"})
    assert turns(mapped) == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize("name", ["conversations", "response", "instruction"])
def test_a_system_column_comes_first(name):
    assert turns({"system": "s", **FORMS[name]})[0] == ("system", "s")
    assert turns({"system": "", **FORMS[name]})[0] == ("user", "a")


def test_an_input_follows_its_instruction():
    assert turns({"instruction": "a", "input": "c", "output": "b"})[0] == ("user", "a\nc")


def test_calls_and_tools_keep_their_structure():
    row = {
        "conversations": [
            *SHARED[:1],
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "1"},
        ],
        "tools": '[{"name": "f"}]',
    }
    conversation = read_conversation(row)
    assert [m["role"] for m in conversation.messages] == ["user", "assistant", "tool"]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert conversation.messages[1]["tool_calls"] == [call]
    assert conversation.tools == [{"name": "f"}]


CALL = {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    "turn",
    [
        {"tool_calls": [{"type": "function", "function": CALL}]},
        {"tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([CALL])},
        {"function_call": {"name": "f", "arguments": '{"x": 1}'}},
    ],
)
def test_every_form_of_a_call_is_one(turn):
    messages = [*chat("a"), {"role": "assistant", "content": None, **turn}]
    wrapped = [{"type": "function", "function": CALL}]
    assert read_conversation({"messages": messages}).messages[1] == {
        "role": "assistant", "content": "", "tool_calls": wrapped,
    }  # fmt: skip


def test_nulls_of_a_typed_table_are_no_fields():
    row = {"messages": [{"role": "user", "content": "a", "tool_calls": None, "name": None}]}
    assert read_conversation(row).messages == [{"role": "user", "content": "a"}]


def test_mapped_columns_have_the_order_of_a_conversation():
    mapping = {"assistant": "y", "user": "x", "system": "s"}
    assert turns(RoleMapper(mapping)({"x": "a", "y": "b", "s": "c"})) == [
        ("system", "c"),
        ("user", "a"),
        ("assistant", "b"),
    ]


def test_a2_mapped_turns_keep_their_order_and_none_is_cut():
    names = {"user": "human", "assistant": "gpt", "system": "system", "tool": "tool"}
    said = ["system", "user", "user", "assistant", "tool", "assistant", "user"]
    row = {"c": [{"from": names[role], "value": str(n)} for n, role in enumerate(said)]}
    mapper = RoleMapper({role: f"c.from.{name}" for role, name in names.items()})
    assert turns(mapper(row)) == [(role, str(n)) for n, role in enumerate(said)]


@pytest.mark.covers("data.sources.*.content_key")
def test_a41_the_content_key_is_found_or_said():
    row = {"c": [{"role": "p", "message": "m", "text": "t"}]}
    assert turns(RoleMapper({"user": "c.role.p"})(row)) == [("user", "t")]
    assert turns(RoleMapper({"user": "c.role.p"}, "message")(row)) == [("user", "m")]
    with pytest.raises(ValueError, match="move content_key beside it"):
        RowsConfig(role_mapping={"user": "a", "content_key": "b"})


HISTORY = [["x", "y"], ("z", "w")]
EARLIER = [("user", "x"), ("assistant", "y"), ("user", "z"), ("assistant", "w")]


@pytest.mark.parametrize("name", ["response", "completion", "instruction", "columns"])
def test_earlier_rounds_and_a_system_prompt_come_first(name):
    row = {"system_prompt": "s", "history": HISTORY, **FORMS[name]}
    assert turns(row) == [("system", "s"), *EARLIER, ("user", "a"), ("assistant", "b")]
    assert read_conversation(row).prompt_turns in (0, 6)


def test_fields_of_a_shared_turn_are_kept():
    shared = [SHARED[0], {**SHARED[1], "weight": 0, "mood": None}]
    assert read_conversation({"conversations": shared}).messages[1] == {
        "role": "assistant", "content": "b", "weight": 0,
    }  # fmt: skip


def test_functions_are_tools_and_arguments_go_to_the_template():
    row = {
        **FORMS["response"],
        "functions": json.dumps([{"name": "f"}]),
        "chat_template_kwargs": {"enable_thinking": False, "other": None},
        "documents": [{"text": "t"}],
    }
    found = read_conversation(row)
    assert found.tools == [{"type": "function", "function": {"name": "f"}}]
    assert found.template_kwargs == {"enable_thinking": False, "documents": [{"text": "t"}]}


UNREAD = {
    "messages": ({"messages": chat("a", "b", system="own"), "system": "s", "id": 3}, "system id"),
    "conversations": ({"conversations": SHARED, "source": "x", "empty": None}, "source"),
    "instruction": ({**FORMS["instruction"], "history": HISTORY, "text": "t"}, "text"),
    "functions beside tools": ({**FORMS["columns"], "tools": [1], "functions": [2]}, "functions"),
}


@pytest.mark.parametrize(("row", "unread"), UNREAD.values(), ids=UNREAD)
def test_columns_that_nothing_reads_are_known(row, unread):
    record = ReadColumns(row)
    read_conversation(record)
    assert record.find_unread() == unread.split()
    assert ReadColumns({"a": 1}).find_unread() == ["a"]
    for read_all in (dict, lambda one: {**one}, lambda one: [*one.items()], json.dumps):
        record = ReadColumns({"a": 1, "b": 2})
        read_all(record)
        assert record.find_unread() == []


def test_a_mapping_reads_its_columns_and_names_the_rest():
    row = {"q": "a", "a": "b", "system": "s", "n": 1, "tools": [1]}
    record = ReadColumns(RoleMapper({"user": "q", "assistant": "a"})(row))
    read_conversation(record)
    assert record.find_unread() == ["system (which role_mapping leaves out)", "n"]


BAD = {
    "history": (
        {**FORMS["instruction"], "history": [["x"]]},
        "history[0]: must be a prompt and a reply, found ['x']",
    ),
    "weight": (
        {"messages": [{"role": "user", "content": "a", "weight": 0.5}]},
        "messages[0].weight: must be 0 or 1, found 0.5",
    ),
    "arguments": (
        {**FORMS["response"], "chat_template_kwargs": {"messages": []}},
        "chat_template_kwargs.messages: is what is rendered; remove it",
    ),
    "no arguments": (
        {**FORMS["response"], "chat_template_kwargs": "[]"},
        "chat_template_kwargs: must be a map, found []",
    ),
    "no form": (
        {"text": "x"},
        "columns text hold no conversation; accepted are messages; conversations; prompt and response "
        "or completion; instruction and output; user and assistant",
    ),
    "a column misspelt": (
        {"mesages": []},
        "columns mesages hold no conversation; accepted are messages; conversations; prompt and response "
        "or completion; instruction and output; user and assistant; did you mean `messages`?",
    ),
    "half a form": (
        {"completion": "b", "problem": "a"},
        "columns completion, problem hold no conversation; accepted are messages; conversations; prompt "
        "and response or completion; instruction and output; user and assistant; other columns have",
    ),
    "no columns": ({}, "columns none hold no conversation"),
    "empty": ({"messages": []}, "messages: empty conversation"),
    "no list": ({"messages": "x"}, "messages: must be a list of turns, found 'x'"),
    "no map": ({"messages": ["x"]}, "messages[0]: must be a map, found 'x'"),
    "no role": (
        {"messages": [{"rol": "user", "content": "a"}]},
        "messages[0]: no field 'role', found rol, content",
    ),
    "role": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content": "a"}]},
        "messages[1].role: unknown role 'asistant'; known are system, developer, user, assistant, "
        "tool, function, ipython; did you mean `assistant`?",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0]: no field 'content', found role"),
    "null": (
        {"messages": [{"role": "user", "content": None}]},
        "messages[0].content: must be text, found null",
    ),
    "number": (
        {"messages": [{"role": "user", "content": 5}]},
        "messages[0].content: must be text, found 5",
    ),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "messages[0].content[0]: must be a text part, found {'type': 'image'}",
    ),
    "from": (
        {"conversations": [{"from": "humon", "value": "a"}]},
        "conversations[0].from: unknown role 'humon'; known are human, ",
    ),
    "value": (
        {"conversations": [{"from": "human"}]},
        "conversations[0]: no field 'value', found from",
    ),
    "prompt": ({"prompt": 3, "response": "b"}, "prompt: must be text or a list of turns, found 3"),
    "output": ({"instruction": "a", "output": None}, "output: must be text, found null"),
    "calls": (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": 3}]}]},
        "messages[0].tool_calls: a call must have a name and arguments, found {'id': 3}",
    ),
    "call": (
        {"conversations": [{"from": "function_call", "value": "{"}]},
        "conversations[0].value: must be JSON",
    ),
    "deep tools": (
        {"prompt": "a", "response": "b", "tools": "[" * 9000},
        "tools: must be JSON (nested too deeply), found '[[[",
    ),
    "digits": (
        {"conversations": [{"from": "function_call", "value": "9" * 9000}]},
        "conversations[0].value: must be JSON (a number of too many digits), found '999",
    ),
    "tools": (
        {"messages": [{"role": "user", "content": "a"}], "tools": "{}"},
        "tools: must be a list, found {}",
    ),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_a_bad_record_names_its_field(row, message):
    with pytest.raises(DataError) as error:
        read_conversation(row)
    assert str(error.value).startswith(message)


def test_a_value_without_a_role_names_the_turn():
    row = {"c": [{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}]}
    with pytest.raises(DataError) as error:
        RoleMapper({"user": "c.from.human"})(row)
    assert str(error.value) == ("c[1].from: 'bot' has no role in role_mapping; known are human")
