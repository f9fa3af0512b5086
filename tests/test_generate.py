"""`jaxtrain generate` and `jaxtrain chat` on a run, a checkpoint and an export of a short training."""

import json
import re
import shutil

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain import get_config
from jaxtrain.cli import cli
from jaxtrain.generate import Reply, converse, load_speaker, read_prompts, stream_reply
from jaxtrain.recipe.errors import CheckpointError, DataError, RecipeError, printable
from tests.runs import recipe, trainer
from tests.tiny import tiny_tokenizer

ASKED = "May the boys walk?"
NEW = 12


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run, its checkpoint and its export; weights so large that replies differ."""
    folder = tmp_path_factory.mktemp("trained")
    entries = [
        {"output_dir": str(folder / "state"), "save_every_n_steps": 8},
        {"type": "huggingface", "output_dir": str(folder / "out"), "save_every_n_steps": 8},
    ]
    model = {"hf_config_kwargs": {"initializer_range": 0.4}}
    trainer(recipe(folder, train_iters=8, model=model, checkpoint=entries), devices=1).train()
    return folder


@pytest.fixture(scope="module")
def speaker(trained):
    return load_speaker(str(trained / "out" / "global_step_8"))


def run_cli(*words):
    cli([str(word) for word in words], standalone_mode=False)


def greedy(speaker, asked, **how):
    prompt = speaker.encode(asked if isinstance(asked, list) else [turn("user", asked)])
    options = speaker.choose_options(**{"max_new_tokens": NEW} | how)
    return "".join(stream_reply(speaker, prompt, options))


def turn(role, content):
    return {"role": role, "content": content}


def test_a_run_its_checkpoint_and_its_export_reply_alike_and_as_transformers(
    trained, capsys, speaker
):
    out = trained / "out" / "global_step_8"
    said = []
    for source in (trained / "run", trained / "state" / "global_step_8", out):
        run_cli("generate", source, "--prompt", ASKED, "--max-new-tokens", NEW)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] == printable(greedy(speaker, ASKED)) + "\n"
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    prompt = speaker.encode([turn("user", ASKED)])
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
    text = speaker.tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True)
    assert text == greedy(speaker, ASKED)


def test_a_file_of_prompts_becomes_one_that_a_recipe_reads(trained, tmp_path, speaker):
    records = [
        {"prompt": ASKED, "system": "Be brief.", "id": 7},
        {"messages": [turn("user", "a"), turn("assistant", "b"), turn("user", ASKED)]},
        {"prompt": "yes and no"},
    ]
    file, out = tmp_path / "prompts.jsonl", tmp_path / "replies.jsonl"
    file.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    words = ("--file", file, "--out", out, "--max-new-tokens", NEW, "--batch-size", 2)
    run_cli("generate", trained / "out" / "global_step_8", *words)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    asked = [
        [turn("system", "Be brief."), turn("user", ASKED)],
        records[1]["messages"],
        [turn("user", records[2]["prompt"])],
    ]
    replies = [turn("assistant", greedy(speaker, messages)) for messages in asked]
    assert found[0] == {"id": 7, "messages": [*asked[0], replies[0]]}
    assert [one["messages"] for one in found[1:]] == [
        [*messages, reply] for messages, reply in zip(asked[1:], replies[1:], strict=True)
    ]
    written = recipe(trained, train_iters=1)
    written["data"]["sources"] = [str(out)]
    run = trainer(written | {"run_dir": str(tmp_path / "run")})
    assert "3 records read, 3 documents" in "\n".join(run.data.ledger.lines())


def test_a_text_is_continued_as_it_is(trained, tmp_path, capsys, speaker):
    out = trained / "out" / "global_step_8"
    run_cli("generate", out, "--raw", "--prompt", "The river", "--max-new-tokens", NEW)
    said = capsys.readouterr().out
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"text": "The river", "n": 1}) + "\n")
    run_cli("generate", out, "--raw", "--file", file, "--max-new-tokens", NEW)
    record = json.loads(capsys.readouterr().out)
    text = record.pop("text")
    assert record == {"n": 1} and printable(text) + "\n" == "The river" + said
    assert said != printable(greedy(speaker, "The river")) + "\n"


FAULTS = {
    "{": "not JSON",
    "\udcff": "not JSON: 'utf-8' codec can't decode",
    "[1]": "must be a map, found \\[1\\]",
    '{"question": "x"}': "has no `messages` or `prompt`, found question",
    '{"prompt": ""}': "prompt: must be text or turns, found ''",
    '{"messages": []}': "messages: must be text or turns",
    '{"messages": ["x"]}': "messages: must be text or turns",
    json.dumps({"messages": [turn("user", "a"), turn("assistant", "b")]}): "ends with a reply",
}


@pytest.mark.parametrize("line", FAULTS)
def test_a_record_that_asks_nothing_is_named_before_a_model_is_read(tmp_path, line):
    file = tmp_path / "prompts.jsonl"
    written = '{"prompt": "a\u2028b"}\n' + line + "\n3\n"  # JSON text may hold separators
    file.write_text(written, encoding="utf-8", errors="surrogateescape")
    both = rf"prompts\.jsonl:2: .*{FAULTS[line]}.*\n.*prompts\.jsonl:3: must be a map, found 3$"
    with pytest.raises(DataError, match=both):
        run_cli("generate", tmp_path / "none", "--file", file)
    file.write_text("\n")
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(file, is_raw=False)


def test_what_cannot_be_asked_is_named(trained, tmp_path):
    out, ok = trained / "out" / "global_step_8", tmp_path / "prompts.jsonl"
    ok.write_text('{"prompt": "x"}\n')
    long = tmp_path / "long.jsonl"
    long.write_text('{"prompt": "x"}\n' + json.dumps({"prompt": "yes " * 400}))
    one_by_one = ("--out", tmp_path / "new", "--batch-size", 1)
    for words, error, message in (
        ((tmp_path / "none", "--prompt", "x"), RecipeError, "no such folder or file"),
        (
            (trained / "state", "--prompt", "x"),
            RecipeError,
            "has no config.json .* did you mean `.*state/global_step_8`",
        ),
        ((out, "--prompt", "x", "--temperature", "nan"), RecipeError, "found temperature nan"),
        (
            (out, "--prompt", "x", *("--prompt", "yes " * 400) * 2),
            DataError,
            "--prompt 2: a prompt of .* the model has 256 positions(.|\n)*--prompt 3: a prompt of",
        ),
        ((out, "--file", long, *one_by_one), DataError, "long.jsonl:2: a prompt of"),
    ):
        with pytest.raises(error, match=message):
            run_cli("generate", *words)
    for words, message in (
        ((out,), "one of --prompt and --file"),
        ((out, "--prompt", "x", "--out", tmp_path / "new"), "--out is for the records"),
        ((out, "--prompt", "x", "--raw", "--system", "y"), "--system is for --prompt"),
        ((out, "--prompt", ""), "'--prompt': must be text, found ''"),
        ((out, "--prompt", "x", "--stop", ""), "'--stop': must be text, found ''"),
        (
            (out, "--prompt", "x", "--temperature", "-1"),
            "'--temperature': -1.0 is not in the range",
        ),
        ((out, "--prompt", "x", "--top-p", "2"), "'--top-p': 2.0 is not in the range"),
        ((out, "--prompt", "x", "--seed", 2**64), "'--seed': .* is not in the range"),
        ((out, "--file", ok, "--out", ok), "prompts.jsonl exists already; name a new one"),
        ((out, "--file", ok, "--out", ok / "x"), "is a file, where a folder is needed"),
    ):
        with pytest.raises(click.UsageError) as fault:
            run_cli("generate", *words)
        assert re.search(message, fault.value.format_message())
    assert not (tmp_path / "new").exists()
    run = tmp_path / "empty"
    run.mkdir()
    (run / "recipe.yaml").write_bytes((trained / "run" / "recipe.yaml").read_bytes())
    (run / "recipe.yaml").write_text(
        (run / "recipe.yaml").read_text().replace(str(trained / "state"), str(tmp_path / "state"))
    )
    with pytest.raises(CheckpointError, match="has saved no full state"):
        run_cli("generate", run, "--prompt", "x")


def test_a_model_without_a_chat_template_continues_texts_alone(trained, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in (trained / "out" / "global_step_8").iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(RecipeError, match="has no chat template; `jaxtrain generate --raw` cont"):
        load_speaker(str(bare))
    assert load_speaker(str(bare), is_raw=True).encode("yes")


def test_a_folder_says_how_it_is_sampled_and_a_flag_goes_before(trained, tmp_path):
    folder = shutil.copytree(trained / "out" / "global_step_8", tmp_path / "model")

    def sampling(written, **flags):
        (folder / "generation_config.json").write_text(json.dumps(written))
        return load_speaker(str(folder)).choose_options(max_new_tokens=1, **flags).sampling

    written = {"do_sample": True, "top_p": 0.7, "top_k": None, "eos_token_id": [3, 5]}
    found = sampling(written, min_p=0.1, top_k=None)
    assert found[:5] == (1.0, 1.0, 0, 0.7, 0.1) and {3, 5} < set(found.stop_tokens)
    assert sampling(written, temperature=0.0).temperature == 0
    assert sampling(written | {"do_sample": False, "temperature": 0.6}).temperature == 0
    with pytest.raises(RecipeError, match="sampling needs numbers, found"):
        sampling(written | {"top_p": "much"})


def test_a_reply_ends_before_a_stop_text(speaker):
    whole = greedy(speaker, ASKED)
    stop = whole[4:7]
    assert whole.index(stop) == 4
    assert greedy(speaker, ASKED, stop=["nowhere", stop]) == whole[:4]


def test_a_stop_that_is_a_special_token_ends_a_reply_though_no_text_shows_it(speaker):
    token = speaker.tokenizer.convert_tokens_to_ids("[INST]")
    found = [speaker.choose_options(max_new_tokens=1, stop=stop) for stop in ([], ["[INST]"])]
    assert [token in options.sampling.stop_tokens for options in found] == [False, True]


TOKENIZER = tiny_tokenizer()


@given(
    st.text(min_size=1, max_size=20), st.text("abé界", min_size=1, max_size=3), st.integers(1, 3)
)
def test_what_is_written_of_a_reply_is_never_taken_back(text, stop, size):
    tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    reply, written = Reply(TOKENIZER, [stop]), ""
    for start in range(0, len(tokens), size):
        reply.add(tokens[start : start + size])
        assert reply.text.startswith(written)
        written = reply.text
    expected = TOKENIZER.decode(tokens, skip_special_tokens=True).split(stop)[0]
    assert reply.whole == expected and expected.startswith(written)


def test_a_conversation_is_kept_begun_anew_and_goes_on_after_what_does_not_fit(speaker):
    said = []
    lines = iter([
        "hello", "again", "/reset", "hello", "/system Be brief.", "hello", "yes " * 400, " ",
        "/what", "hello", "/exit", "never",
    ])  # fmt: skip
    options = speaker.choose_options(max_new_tokens=NEW)
    converse(
        speaker, options, None, read=lambda: next(lines), write=lambda piece: said.append(piece)
    )
    text = "".join(said)
    hello = [turn("user", "hello")]
    first = greedy(speaker, hello)
    second = greedy(speaker, [*hello, turn("assistant", first), turn("user", "again")])
    brief = [turn("system", "Be brief."), *hello]
    third = greedy(speaker, brief)
    fourth = greedy(speaker, [*brief, turn("assistant", third), *hello])
    assert len({first, second, third, fourth}) == 4
    places = [text.index(first), text.index(second), text.rindex(fourth)]
    assert places == sorted(places) and text.count(" tokens/s]") == 5
    assert text.count("new conversation") == 2 and text.count("/reset, /help") == 2
    assert "new conversation, with this system message" in text and "no command /" in text
    assert "the model has 256 positions" in text and next(lines) == "never"
    assert (
        speaker.run.config.data
        == get_config({"model": {"name_or_path": "x"}, "data": {"sources": ["none"]}}).data
    )
