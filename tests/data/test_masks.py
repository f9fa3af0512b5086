"""What is trained, as text: the expected pieces are read off the templates, not off our output."""

from functools import lru_cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jaxtrain.data.conversation import Conversation, read_conversation
from jaxtrain.data.encode import ConversationEncoder, Dropped, Encoded, Fault
from jaxtrain.data.render import Renderer, find_stop_tokens
from jaxtrain.data.spans import find_by_marks, find_by_prefixes
from jaxtrain.recipe.errors import RecipeError
from tests.tiny import (
    CHATML,
    GENERATION,
    HEADERS,
    INST,
    PLAIN,
    SHUFFLING,
    TEXTS,
    THINK,
    chat,
    tiny_tokenizer,
)


def outcome(template, messages, tools=None, **options):
    """Of messages, or of a conversation that was read."""
    is_read = isinstance(messages, Conversation)
    conversation = messages if is_read else Conversation(messages, tools)
    defaults = {"max_length": 4096, "overlong": "drop"} | options
    (found,) = ConversationEncoder(tiny_tokenizer(template), **defaults).encode([conversation])
    return found


def trained(template, messages, **options):
    """The trained stretches of a conversation, decoded."""
    found = outcome(template, messages, **options)
    assert isinstance(found, Encoded), found
    tokenizer, pieces, run = tiny_tokenizer(template), [], []
    for token, weight in zip([*found.tokens, 0], [*found.weights, 0], strict=True):
        if weight:
            run.append(int(token))
        elif run:
            pieces.append(tokenizer.decode(run))
            run = []
    return pieces


END = "<|im_end|>"
THOUGHT = "<think>\nso\n</think>\n\nfine"
TABLE = {
    "chatml, one turn": (CHATML, chat("hi", "yes"), ["yes<|im_end|>"]),
    "chatml, equal texts": (CHATML, chat("yes", "yes"), ["yes<|im_end|>"]),
    "chatml, three equal replies": (CHATML, chat(*["yes"] * 6), ["yes<|im_end|>"] * 3),
    "chatml, system": (CHATML, chat("a", "b", system="b"), ["b<|im_end|>"]),
    "chatml, empty reply": (CHATML, chat("a", "", "b", "no"), ["no<|im_end|>"]),
    "chatml, spaces kept": (CHATML, chat("a", " \nno \n"), [" \nno \n<|im_end|>"]),
    "chatml, user last": (CHATML, chat("a", "no", "b"), ["no<|im_end|>"]),
    "chatml, assistant first": (
        CHATML,
        chat("a", "no", "b", "yes")[1:],
        ["no<|im_end|>", "yes<|im_end|>"],
    ),
    "chatml, two users": (CHATML, [*chat("a"), *chat("b", "no")], ["no<|im_end|>"]),
    "chatml, two replies": (
        CHATML,
        [*chat("a", "no"), chat("", "yes")[1]],
        ["no<|im_end|>", "yes<|im_end|>"],
    ),
    "chatml, reply quotes the header": (
        CHATML,
        chat("x\nassistant\ny", "x\nassistant\ny"),
        ["x\nassistant\ny<|im_end|>"],
    ),
    "headers, stripped": (
        HEADERS,
        chat(" yes ", "\n yes \n", "b", "no"),
        ["yes<|eot|>", "no<|eot|>"],
    ),
    "headers, many turns": (
        HEADERS,
        chat(*["", "a", "b", "c", "d"] * 2),
        ["a<|eot|>", "c<|eot|>", "b<|eot|>", "d<|eot|>"],
    ),
    "inst": (INST, chat("yes", "yes", "b", "no"), [" yes</s>", " no</s>"]),
    "inst, many turns": (INST, chat(*["yes"] * 8), [" yes</s>"] * 4),
    "plain": (PLAIN, chat("yes", "yes", "b", "no"), [" yes\n", " no\n"]),
    "think, one turn": (THINK, chat("a", THOUGHT), [THOUGHT + END]),
    "think, earlier thoughts are gone": (
        THINK,
        chat("a", THOUGHT, "fine", "fine", "b", THOUGHT),
        ["fine<|im_end|>", "fine<|im_end|>", THOUGHT + END],
    ),
    "think, a block for the last reply": (
        THINK,
        chat("a", "fine", "b", "fine"),
        ["fine<|im_end|>", "<think>\n\n</think>\n\nfine<|im_end|>"],
    ),
    "generation": (GENERATION, chat("yes", "yes", "b", "no"), ["yes", "no"]),
    "an end of text behind all, no generation prompt": (
        CHATML.partition("{% if add")[0] + "</s>",
        chat("a", "yes"),
        ["yes<|im_end|>\n</s>"],
    ),
}


@pytest.mark.parametrize(("template", "messages", "expected"), TABLE.values(), ids=TABLE)
def test_a1_exactly_the_assistant_is_trained(template, messages, expected):
    """Trap F4 too: but for one, none of these templates says what is trained."""
    assert trained(template, messages) == expected


def test_the_tokens_are_those_of_the_whole_text():
    tokenizer = tiny_tokenizer(HEADERS)
    messages = chat("The river", "was low", "and", "12 boys")
    found = outcome(HEADERS, messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert found.tokens.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.covers("data.mask_inputs")
def test_without_masking_all_but_the_first_token_is_trained():
    found = outcome(CHATML, chat("a", "b"), mask_inputs=False)
    assert found.weights.tolist() == [0] + [1] * (len(found.tokens) - 1)


def test_a_template_that_cannot_be_followed_is_refused_by_name():
    long = "The river was low that summer"
    found = outcome(SHUFFLING, chat(long, long, long, long))
    assert isinstance(found, Fault) and "tokenizer.chat_template" in found.message


def test_what_the_template_raises_is_said():
    found = outcome(INST, chat("a", "b", system="no such role"))
    assert found == Fault(
        "the chat template refuses the conversation: roles must alternate user and assistant"
    )


TOOLS = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>"
    "{% endfor %}",
)


def call(name="river", arguments=None):
    return {"function": {"name": name, "arguments": arguments or {"x": 12}}}


def calling(*calls, content="", **fields):
    return {"role": "assistant", "content": content, "tool_calls": [*calls], **fields}


ANSWERED = [{"role": "tool", "content": "low"}, chat("", "yes")[1]]
FIRST_CALL = TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
CALL_OR_TEXT = TOOLS.replace(
    "{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}"
)
BY_ID = TOOLS.replace("c.function.name", "c.id")
HIDDEN = {
    "every call": (CHATML, [calling(call())], "messages[1].tool_calls"),
    "the second call": (FIRST_CALL, [calling(call(), call())], "messages[1].tool_calls"),
    # As Kimi K2 has it, whose ids hold the names; these say nothing of what is called.
    "a name": (BY_ID, [calling(call() | {"id": "1"})], "messages[1].tool_calls"),
    # A word of it stands in the call too.
    "text beside a call": (
        CALL_OR_TEXT,
        [calling(call(), content="a river")],
        "messages[1].content",
    ),
    "one of two turns": (
        CALL_OR_TEXT,
        [calling(call()), ANSWERED[0], calling(call(), content="so")],
        "messages[3].content",
    ),
}


@pytest.mark.parametrize(("template", "turns", "place"), HIDDEN.values(), ids=HIDDEN)
def test_what_the_template_hides_of_calls_is_refused(template, turns, place):
    found = outcome(template, [*chat("a"), *turns, *ANSWERED])
    assert isinstance(found, Fault)
    assert found.message.startswith(f"{place}: the chat template does not show all of it; set")
    shown = outcome(TOOLS, [*chat("a"), *turns, *ANSWERED])
    assert isinstance(shown, Encoded)


def test_a_name_may_stand_in_the_id_of_its_call():
    turn = calling(call() | {"id": "functions.river:0"})
    found = trained(BY_ID, [*chat("a"), turn, *ANSWERED])
    assert found[0] == "<call>functions.river:0</call><|im_end|>"


def test_tools_that_the_template_hides_are_refused():
    found = outcome(CHATML, chat("a", "b"), [{"name": "f"}])
    assert isinstance(found, Fault)
    assert found.message.startswith("tools: the chat template does not")


@pytest.mark.parametrize("written", ["{{ a }}", "{{ '' + a }}", "{{ a | tojson }}"])
def test_arguments_are_trained_as_json_however_the_template_writes_them(written):
    """Python writes a map with other quotes."""
    template = TOOLS.replace(
        "</call>", " " + written.replace("a", "c.function.arguments", 1) + "</call>"
    )
    messages = [*chat("a"), calling(call(arguments={"x": "no"})), *ANSWERED]
    assert trained(template, messages)[0] == '<call>river {"x": "no"}</call><|im_end|>'


STANDING = {
    "chatml": (CHATML, "<|im_end|>"),
    # The tokenizer's BOS is one that this one does not write.
    "headers": (HEADERS.replace("<|begin|>", ""), "<|eot|>"),
}


@pytest.mark.parametrize(("template", "end"), STANDING.values(), ids=STANDING)
@pytest.mark.parametrize("turns", [1, 4])
def test_a_generation_prompt_that_always_stands_is_no_part_of_the_last_turn(template, end, turns):
    """As the first template of Llama 3 writes it."""
    asking = template.replace("{% if add_generation_prompt %}", "{% if true %}")
    messages = chat(*["no", "yes"] * turns)
    assert trained(asking, messages) == [f"yes{end}"] * turns
    found, expected = outcome(asking, messages), outcome(template, messages)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert trained(asking, [*messages, *chat("a")]) == [f"yes{end}"] * turns


STRICT = (  # a prompt that opens a thought, and turns that have none
    "{% for m in messages %}{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
    "{{ raise_exception('no call') }}{% endif %}<|im_start|>{{ m.role }}\n"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% else %}"
    "{{ m.content }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<thought>{% endif %}"
)
THOUGHTLESS = {
    "": STRICT,
    "answers stand alone": STRICT.replace("raise_exception('no call')", "''"),
    "<text>": STRICT.replace("{{ m.content }}", "<text>{{ m.content }}"),
    "<call-less>": STRICT.replace("{{ m.content }}", "<call-less>{{ m.content }}"),
}


@pytest.mark.parametrize(("begin", "template"), THOUGHTLESS.items())
@pytest.mark.parametrize("turns", [1, 3])
def test_a_call_without_thoughts_is_trained_where_the_prompt_opens_one(begin, template, turns):
    messages = [*chat("a"), calling(call()), *ANSWERED] * turns
    assert trained(template, messages) == ["<call>river</call><|im_end|>", "yes<|im_end|>"] * turns


def needing_a_call(template):
    """The template, which refuses an answer without the call before it."""
    return template.replace(
        "<|im_start|>{{ m.role }}",
        "{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
        "{{ raise_exception('no call') }}{% endif %}<|im_start|>{{ m.role }}",
    )


@pytest.mark.parametrize("template", [TOOLS, needing_a_call(TOOLS)], ids=["", "call before answer"])
def test_a_call_is_trained_and_what_the_tool_says_is_not(template):
    messages = [*chat("a"), calling(call()), *ANSWERED]
    expected = ["<call>river</call><|im_end|>", "yes<|im_end|>"]
    assert trained(template, messages) == expected
    assert trained(template, [*messages, *chat("b", "no", "c", "no")])[:2] == expected


def test_a_missing_template_names_the_key():
    with pytest.raises(RecipeError, match=r"tokenizer\.chat_template: the tokenizer has no chat"):
        Renderer(tiny_tokenizer(None))


def test_nothing_to_train_is_a_counted_drop():
    assert outcome(CHATML, chat("a")).reason == "no assistant text to train on"


@pytest.mark.covers("data.overlong")
def test_a47_overlong_conversations():
    messages = chat("The river was low", "that summer, and the boys walked across")
    length = len(outcome(CHATML, messages).tokens)
    assert isinstance(outcome(CHATML, messages, max_length=length), Encoded)
    dropped = outcome(CHATML, messages, max_length=length - 1)
    assert dropped == Dropped("longer than max_length", length)
    cut = outcome(CHATML, messages, max_length=length - 3, overlong="truncate")
    assert cut.truncated and len(cut.tokens) == length - 3 and cut.ended == 0
    gone = outcome(CHATML, messages, max_length=8, overlong="truncate")
    assert gone.reason == "no assistant text left after truncation"
    refused = outcome(CHATML, messages, max_length=length - 1, overlong="error")
    assert refused.message.startswith(
        f"{length} tokens, but max_length is {length - 1}; set data.over"
    )


WORDS = st.text(alphabet="ayes \n.12é", max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=2, max_size=9), st.sampled_from([CHATML, HEADERS, PLAIN]))
def test_both_proofs_agree_where_both_hold(contents, template):
    tokenizer = tiny_tokenizer(template)
    messages = chat(*contents)

    def render(messages, prompt):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    text = render(messages, False)
    turns = list(range(1, len(messages), 2))
    case = (render, messages, turns, text)
    assert find_by_marks(*case) == find_by_prefixes(*case)


@settings(max_examples=40, deadline=None)
@given(st.lists(WORDS, min_size=2, max_size=8))
def test_each_reply_and_its_end_is_trained_and_nothing_else(contents):
    replies = contents[1::2]
    spoken = [reply + END for reply in replies if reply.strip()]
    if spoken:
        assert trained(CHATML, chat(*contents)) == spoken
    else:
        assert outcome(CHATML, chat(*contents)).reason == "a reply is empty"


KINDS = {
    "prefix space": pre_tokenizers.Metaspace(prepend_scheme="always"),
    "prepended": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "normalised": normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")]),
}
"""How SentencePiece's families write blanks, beside the bytes of our other tokenizer."""


@lru_cache
def sentence_pieces(kind, template):
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    where = "normalizer" if isinstance(KINDS[kind], normalizers.Normalizer) else "pre_tokenizer"
    setattr(backend, where, KINDS[kind])
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    special += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, bos_token="<s>", eos_token="</s>"
    )


PIECES = st.lists(
    st.sampled_from(
        ["yes", " ", "  ", "\n", "e\u0301", "é", "ﬁ", "½", "🙂", "\u200b", "\u00a0", "...", "'s",
         "assistant", "한국", "<|im_end|>", "</s>"]
    ),
    max_size=6,
).map("".join)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.lists(PIECES, min_size=2, max_size=6),
    st.sampled_from([*KINDS, "bytes"]),
    st.sampled_from([CHATML, HEADERS, PLAIN]),
)
def test_no_token_is_trained_that_says_something_outside_of_its_turn(contents, kind, template):
    """Tokens that merge across a border, and characters that are several tokens or none alone."""
    plain = kind == "bytes"
    tokenizer = tiny_tokenizer(template) if plain else sentence_pieces(kind, template)
    encoder = ConversationEncoder(tokenizer, max_length=4096, overlong="error")
    conversation = Conversation(chat(*contents))
    (found,) = encoder.encode([conversation])
    if not isinstance(found, Encoded):
        assert isinstance(found, Dropped)
        return
    renderer = Renderer(tokenizer)
    text = renderer.render(conversation).text
    ours = {place for span in renderer.find_spans(conversation, text) for place in range(*span)}
    offsets = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets
    for (start, end), weight in zip(offsets, found.weights, strict=True):
        said = {place for place in range(start, end) if text[place].strip()}
        assert said <= ours if weight else not said or not said <= ours


WORDS_AND_MARKUP = st.lists(
    st.sampled_from(["a", "yes", " ", "\n", "é", "🙂", "12", "<|im_end|>", "<|eot|>", "river"]),
    max_size=12,
).map("".join)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(WORDS_AND_MARKUP, min_size=2, max_size=9),
    st.integers(4, 60),
    st.sampled_from([CHATML, HEADERS, PLAIN, THINK]),
)
@example(["a", "aa<|im_end|> "], 22, CHATML)  # cut behind a blank that an end of turn precedes
def test_a47_a_cut_row_is_the_start_of_the_whole_one(contents, max_length, template):
    """Text behind the limit is not even tokenised: nothing before it may depend on it."""
    whole = outcome(template, chat(*contents), overlong="error")
    cut = outcome(template, chat(*contents), max_length=max_length, overlong="truncate")
    dropped = outcome(template, chat(*contents), max_length=max_length)
    if not isinstance(whole, Encoded):
        assert cut.__class__ is whole.__class__
    elif len(whole.tokens) <= max_length:
        assert cut.tokens.tolist() == whole.tokens.tolist() and not cut.truncated
        assert cut.weights.tolist() == whole.weights.tolist()
    else:
        assert dropped.reason == "longer than max_length" and dropped.length > max_length
        expected = whole.weights[:max_length]
        if expected.any():
            assert cut.tokens.tolist() == whole.tokens[:max_length].tolist()
            assert cut.weights.tolist() == expected.tolist() and cut.truncated
        else:
            assert cut.reason == "no assistant text left after truncation"


def test_a_text_is_read_up_to_the_token_behind_its_limit_and_again_where_that_was_too_little():
    encoder = ConversationEncoder(tiny_tokenizer(), max_length=8, overlong="truncate")
    texts = ["<|im_start|>" + "a b c d " * 9 + "<|im_end|>" + "yes " * 50,  # over after 40
             "<|im_start|>" * 2 + "The river was low" * 2 + "<|im_end|>" + "yes " * 50]  # fmt: skip
    whole = encoder._backend.encode_batch(texts, add_special_tokens=False)
    heads = encoder._tokenise(texts)
    assert [len(h.ids) < len(w.ids) for h, w in zip(heads, whole, strict=True)] == [True, True]
    assert all(h.ids == w.ids[: len(h)] for h, w in zip(heads, whole, strict=True))
    roomy = ConversationEncoder(tiny_tokenizer(), max_length=60, overlong="truncate")
    few = ["The river was low that summer, and the boys walked across it without wet knees." * 4
           + "<|im_end|>" + "yes " * 50]  # fmt: skip
    assert len(roomy._tokenise(few)[0].ids) > 60


END_OF_ALL = CHATML.replace(
    "{% if add", "{% if not add_generation_prompt %}</s>{% endif %}{% if add"
)


def test_what_stands_behind_the_last_turn_alone_does_not_hide_the_ends_of_others():
    # Three turns and more are found by marks, two by prefixes, which this template breaks.
    for count in (2, 4, 8):
        found = trained(END_OF_ALL, chat(*["a ", " yes "] * (count // 2)))
        assert found == [" yes <|im_end|>"] * (count // 2 - 1) + [" yes <|im_end|>\n</s>"]


def test_a_turn_of_calls_alone_keeps_its_form():
    # As Qwen3 writes it: a line break before the call only where there is content.
    template = TOOLS.replace("<call>", "{% if m.content %}\n{% endif %}<call>").replace(
        "<|im_start|>{{ m.role }}\n",
        "<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}(last){% endif %}",
    )
    messages = [*chat("a"), calling(call()), *ANSWERED]
    assert trained(template, messages) == ["<call>river</call><|im_end|>", "(last)yes<|im_end|>"]


INLINE = TOOLS.replace(  # as gemma 4 writes it: the answers stand in the turn that called
    "<|im_start|>{{ m.role }}\n{{ m.content }}",
    "{% if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{% if m.tool_calls and loop.nextitem %}"
    "{{ loop.nextitem.content }} {% endif %}{{ m.content }}",
).replace("<|im_end|>\n{% endfor %}{% if add", "<|im_end|>\n{% endif %}{% endfor %}{% if add")


def test_what_a_tool_answers_is_not_trained_where_it_stands_in_the_turn_that_called():
    for more in ([], chat("", "yes")[1:], [*chat("", "yes")[1:], *chat("b", "no")]):
        messages = [*chat("a"), calling(call(), content="so"), ANSWERED[0], *more]
        found = outcome(INLINE, messages)
        assert isinstance(found, Fault) and "rewrites turns" in found.message


def test_a_thought_that_stands_behind_the_answer_is_not_left_out_in_silence():
    thought = "<think>\nso\n</think>\n\n"
    behind = INLINE.replace(
        "{% if m.tool_calls and loop.nextitem %}{{ loop.nextitem.content }} {% endif %}{{ m.content }}",
        "",
    ).replace(
        "<|im_end|>",
        "{% if m.tool_calls and loop.nextitem %} {{ loop.nextitem.content }} {% endif %}"
        "{{ m.content }}<|im_end|>",
    )
    for count in (1, 3):
        messages = [*chat("a"), calling(call(), content=thought), *ANSWERED] * count
        found = outcome(behind, messages)
        assert isinstance(found, Fault) and "rewrites turns" in found.message
        bare = trained(behind, [*chat("a"), calling(call()), *ANSWERED] * count)
        assert bare == ["<call>river</call>", "yes<|im_end|>"] * count


def test_thoughts_in_front_of_the_end_of_the_prompt_are_not_left_out_in_silence():
    # A prompt that ends behind an empty block, and a turn with a full one.
    template = CHATML.replace(
        "{{ m.content }}",
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}",
    ).replace("assistant\n{% endif %}", "assistant\n<think></think>{% endif %}")
    turn = {"role": "assistant", "content": "yes", "reasoning_content": "was low"}
    for count in (1, 3):
        found = outcome(template, [*chat("a"), turn] * count)
        assert isinstance(found, Fault) and "rewrites turns" in found.message
    open_prompt = template.replace("assistant\n<think></think>", "assistant\n")
    whole = "<think>was low</think>yes<|im_end|>"
    assert trained(open_prompt, [*chat("a"), turn] * 3) == [whole] * 3


def test_a_call_behind_thoughts_is_trained_to_its_end():
    # The last turn keeps what earlier ones lose: the two forms share less than the call.
    template = THINK.replace(
        "{{ content }}<|im_end|>",
        "{{ content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
        "{{ c.function.arguments.x }}</call>{% endfor %}<|im_end|>",
        1,
    )
    turn = calling(call(), content="<think>\nso\n</think>\n\n")
    messages = [*chat("a"), turn, ANSWERED[0], *chat("", "fine", "b", "no")[1:]]
    found = trained(template, messages)
    assert found == [
        "<call>river 12</call><|im_end|>",
        "fine<|im_end|>",
        "<think>\n\n</think>\n\nno<|im_end|>",
    ]


def test_half_a_character_is_refused():
    found = outcome(CHATML, chat("a \ud83d", "yes"))
    told = "U+D83D is half of a character, found after '<|im_start|>user\\na '; remove it"
    assert found == Fault(told)


def test_a_template_that_hides_the_reply_is_refused():
    hiding = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    found = outcome(hiding, chat("a", "yes"))
    assert isinstance(found, Fault)
    told = "messages[0].content: the chat template does not show all of it"
    assert found.message.startswith(told)
    marked = GENERATION.replace(
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>",
        "{% generation %}{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>"
        "{% endgeneration %}{% else %}<|im_end|>{% endif %}",
    )
    assert outcome(marked, chat("a", "yes", "b", "no")) == found


@pytest.mark.covers("data.loss_roles")
def test_other_roles_are_trained_where_the_recipe_says_so():
    messages = chat("a river", "yes", "b", "no", system="be dry")
    for roles, expected in {
        ("assistant",): ["yes<|im_end|>", "no<|im_end|>"],
        ("user",): ["a river<|im_end|>", "b<|im_end|>"],
        ("system",): ["be dry<|im_end|>"],
        ("user", "assistant"): [f"{text}<|im_end|>" for text in ("a river", "yes", "b", "no")],
    }.items():
        assert trained(CHATML, messages, loss_roles=roles) == expected


def pair(prompt, reply):
    return read_conversation({"prompt": prompt, "completion": reply})


@pytest.mark.covers("data.completion_only")
@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_of_a_pair_the_reply_alone_is_trained_even_if_the_prompt_has_replies(template):
    end = "" if template == GENERATION else END
    conversation = pair(chat("a", "no", "b"), chat("", "yes")[1:])
    assert trained(template, conversation) == [f"yes{end}"]
    assert trained(template, pair("a", "yes")) == [f"yes{end}"]
    whole = trained(template, conversation, completion_only=False)
    assert len(whole) == 1 and "no<|im_end|>\n<|im_start|>user\nb" in whole[0]
    # Rows that are no pairs are trained as ever.
    messages = Conversation(chat("a", "no", "b", "yes"))
    assert trained(template, messages, completion_only=False) == [f"no{end}", f"yes{end}"]


@pytest.mark.covers("data.ignore_empty_think")
@pytest.mark.parametrize("turns", [1, 4])
def test_an_empty_think_block_is_left_out_if_asked(turns):
    messages = chat(*["a", "fine"] * turns)
    assert trained(THINK, messages)[-1] == "<think>\n\n</think>\n\nfine<|im_end|>"
    assert trained(THINK, messages, ignore_empty_think=True)[-1] == "fine<|im_end|>"
    thought = chat("a", THOUGHT)
    assert trained(THINK, thought, ignore_empty_think=True) == [THOUGHT + END]


@pytest.mark.parametrize("turns", [1, 3])
def test_a_turn_behind_a_message_that_is_left_out_starts_where_the_prompt_ends(turns):
    # As gpt-oss has it: a channel before what is said, and system messages that are not shown.
    template = CHATML.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}<final>{% endif %}{{ m.content }}"
    ).replace("in messages", "in messages if m.role != 'system'")
    messages = [*chat("a"), *chat(system="dry"), chat("", "yes")[1]] * turns
    assert trained(template, messages) == ["<final>yes<|im_end|>"] * turns


REASONING_SHOWN = CHATML.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}",
)
ONLY_ANSWERS = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
NO_TOOLS = CHATML.replace("in messages", "in messages if m.role != 'tool'")
FIRST_SYSTEM = CHATML.replace(
    "in messages", "in messages if m.role != 'system' or m == messages[0]"
)
ASKED = [{"role": "user", "content": "a"}]
REASONED = {"role": "assistant", "content": "yes", "reasoning_content": "was low"}
LEAVES_OUT = {
    "reasoning of the reply": (CHATML, [*ASKED, REASONED], "messages[1].reasoning_content"),
    "reasoning that is shown": (REASONING_SHOWN, [*ASKED, REASONED], ()),
    "old reasoning": (CHATML, [*ASKED, REASONED, *chat("b", "no")], ("hidden thoughts",)),
    "thoughts of the reply": (ONLY_ANSWERS, chat("a", THOUGHT), "messages[1].content"),
    "old thoughts": (ONLY_ANSWERS, chat("a", THOUGHT, "b", "no"), ("hidden thoughts",)),
    "an answer of a tool": (NO_TOOLS, [*ASKED, *ANSWERED], "messages[1].content"),
    # Its text stands in the reply that follows.
    "a short answer of a tool": (
        NO_TOOLS,
        [*ASKED, {"role": "tool", "content": "7"}, *chat("", "It is 7.")[1:]],
        "messages[1].content",
    ),
    "a later system turn": (
        FIRST_SYSTEM,
        [*chat("a", "no"), *chat("b", "yes", system="be dry")],
        ("hidden system",),
    ),
    "a text that is changed": (
        CHATML.replace("{{ m.content }}", "{{ m.content | replace(' ', '_') }}"),
        chat("a river", "yes and no"),
        (),
    ),
}


@pytest.mark.parametrize(("template", "messages", "told"), LEAVES_OUT.values(), ids=LEAVES_OUT)
def test_what_is_said_is_shown_or_refused_or_counted(template, messages, told):
    found = outcome(template, messages)
    if isinstance(told, str):
        assert isinstance(found, Fault)
        assert found.message.startswith(f"{told}: the chat template does not show all of it")
    else:
        assert isinstance(found, Encoded) and found.notes == told


def test_a_turn_of_weight_0_is_not_trained():
    messages = chat("a", "no", "b", "yes")
    messages[1]["weight"] = 0
    for template, end in ((CHATML, END), (GENERATION, "")):
        assert trained(template, messages) == [f"yes{end}"]
    messages[3]["weight"] = False
    assert outcome(CHATML, messages).reason == "no assistant text to train on"


def test_arguments_of_the_template_and_fields_that_it_does_not_name():
    template = CHATML.replace("{{ m.content }}", "{{ style }}{{ m.content }}")
    messages = [{**chat("a")[0], "mood": "low"}, chat("", "yes")[1]]
    conversation = Conversation(messages, template_kwargs={"style": "dry ", "depth": 2})
    assert trained(template, conversation) == ["dry yes<|im_end|>"]
    encoder = ConversationEncoder(tiny_tokenizer(template), max_length=99, overlong="drop")
    (found,) = encoder.encode([conversation])
    assert found.unread == ("chat_template_kwargs.depth", "messages[].mood")


CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.arguments.x }}</call>{% endfor %}END\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL_TURNS = "{{ '<|eot|>' if m.tool_calls else '<|im_end|>' }}"
STOPS = {
    "chatml": (CHATML, ["</s>", "<|im_end|>"]),
    "headers": (HEADERS, ["</s>", "<|eot|>"]),
    "plain": (PLAIN, ["</s>"]),
    "a call's own end": (CALLS.replace("END", ""), ["</s>"]),
    "calls in a turn": (CALLS.replace("END", "<|im_end|>"), ["</s>", "<|im_end|>"]),
    "turns of calls": (CALLS.replace("END", CALL_TURNS), ["</s>", "<|im_end|>", "<|eot|>"]),
}


@pytest.mark.parametrize(("template", "expected"), STOPS.values(), ids=STOPS)
def test_stop_tokens_are_what_ends_turns(template, expected):
    tokenizer = tiny_tokenizer(template)
    tokenizer.eos_token = "</s>"
    tokenizer.add_tokens(["<call>", "</call>"], special_tokens=True)
    assert find_stop_tokens(tokenizer) == tokenizer.convert_tokens_to_ids(expected)
    encoder = ConversationEncoder(tokenizer, max_length=4096, overlong="drop")
    turn = {"id": "f0", "function": {"name": "f", "arguments": {"x": "1"}}}
    calls = [*chat("a"), calling(turn), {"role": "tool", "content": "7"}]
    if "call" in template:
        (found,) = encoder.encode([Conversation(calls)])
        assert found.turns == 1 and found.ended == (len(expected) > 1)


@pytest.mark.covers("data.split_special_tokens")
@pytest.mark.parametrize("kind", ["bytes", *KINDS])
def test_special_tokens_in_a_text_are_counted_or_stay_text(kind):
    template = CHATML
    tokenizer = tiny_tokenizer(template) if kind == "bytes" else sentence_pieces(kind, template)
    messages = chat("stop <|im_end|>\n<|im_start|>system\nnow", "</s> <think>no")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for is_text, count in ((False, 3), (True, 2)):
        encoder = ConversationEncoder(
            tokenizer, max_length=4096, overlong="drop", split_special_tokens=is_text
        )
        (found,) = encoder.encode([Conversation(messages)])
        assert found.notes == (() if is_text else ("control tokens in text",))
        assert found.tokens.tolist().count(end) == count
        assert found.tokens.max() < len(tokenizer)
        if kind == "bytes":
            expected = tokenizer.apply_chat_template(messages, tokenize=False)
            assert tokenizer.decode(found.tokens) == expected
        if is_text:
            length = len(found.tokens)
            exact = ConversationEncoder(
                tokenizer, max_length=length - 2, overlong="truncate", split_special_tokens=True
            )
            (cut,) = exact.encode([Conversation(messages)])
            assert cut.tokens.tolist() == found.tokens[:-2].tolist()
