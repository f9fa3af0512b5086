"""A base model that ends texts with one token, trained on a template that ends turns with
another."""

import json

import pytest

from jaxtrain.model.generate import Sampling, generate
from tests.data.made import write
from tests.runs import model_folder, recipe, trainer
from tests.tiny import chat, tiny_tokenizer

ROOM = 24


def test_samples_of_the_run_and_of_the_export_stop_where_turns_end(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "</s>"
    end_of_text, end_of_turn = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    export = {"type": "huggingface", "output_dir": str(tmp_path), "save_end_of_training": True}
    written = recipe(
        tmp_path, rows=1, train_iters=30, micro_batch_size=4, checkpoint=[export],
        data={
            "max_length": 64, "pack_samples": False, "mask_inputs": False,
            "eval_sources": [str(tmp_path / "rows.jsonl")],
        },
        eval_samples={"prompts": ["Numbers?"], "max_new_tokens": ROOM}, eval_interval=30,
    )  # fmt: skip
    model_folder(tmp_path / "model", num_hidden_layers=2, eos_token_id=end_of_text)
    tokenizer.save_pretrained(tmp_path / "model")
    conversation = chat(*["Numbers?", "yes and yes"] * 2)  # it learns what comes after a turn, too
    write(tmp_path / "rows.jsonl", [{"messages": conversation}] * 16)
    run = trainer(written)
    run.train()

    assert "'Numbers?' → 'yes and yes'\n" in capsys.readouterr().out
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    prompt = run.tokenizer.apply_chat_template(conversation[:1], **options)["input_ids"]
    sampling = Sampling(stop_tokens=(end_of_text,))
    graph, params = run.run.model.graph, run.state.params
    (on,) = generate(graph, params, [prompt], max_new_tokens=ROOM, sampling=sampling)
    assert len(on) == ROOM and "<|im_start|>user" in run.tokenizer.decode(on)

    folder = tmp_path / "global_step_30"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [end_of_text, end_of_turn]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (tokens,) = model.generate(
        torch.tensor([prompt]), max_new_tokens=ROOM, do_sample=False
    ).tolist()
    reply = tokens[len(prompt) :]
    assert reply == on[: on.index(end_of_turn) + 1] and len(reply) < ROOM
    assert run.tokenizer.decode(reply, skip_special_tokens=True) == "yes and yes"
