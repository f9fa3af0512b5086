"""`jaxtrain eval --lm-eval`: the numbers that lm-evaluation-harness has of the same folder with
transformers, and what a user is told. The tasks and their data are files; nothing asks a hub."""

import json
import sys
from types import SimpleNamespace

import pytest
import yaml

from jaxtrain.cli import cli
from jaxtrain.generate import load_speaker
from jaxtrain.recipe.errors import RecipeError, UserError
from tests.runs import recipe, trainer
from tests.tiny import TEXTS


def run_cli(*words):
    cli([str(word) for word in words], standalone_mode=False)


def test_without_the_package_the_line_that_installs_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("jaxtrain.evaluate.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"run pip install 'jaxtrain\[lm-eval\]'"):
        run_cli("eval", tmp_path, "--lm-eval", "any")
    with pytest.raises(Exception, match="--limit is for --lm-eval"):
        run_cli("eval", tmp_path, "--limit", 3)


QUESTIONS = [
    {"question": f"{text[:30]} Then what?", "choices": list(choices), "answer": i % 3}
    for i, text in enumerate(TEXTS)
    for choices in (("yes", "no and no again", "numbers"), ("river", "summer boys", "a tool"))
]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
num_fewshot: 1
fewshot_split: test
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{(question ~ ' ') * 30}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "tiny_words": """
output_type: generate_until
doc_to_text: "{{question}} "
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 20, do_sample: false}
metric_list: [{metric: exact_match}, {metric: bleu}]
""",
    "tiny_greedy": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[1]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "tiny_long": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: x
generation_kwargs: {max_gen_toks: 9000}
metric_list: [{metric: exact_match}]
""",
    "tiny_beams": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: x
generation_kwargs: {num_beams: 4, max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
}
COMPARED = ("tiny_choice", "tiny_rolling", "tiny_words", "tiny_greedy")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="the extra `lm-eval` is not installed")
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}{task}{COMMON.format(data=data)}")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run, its checkpoint and its export; weights so large that replies differ."""
    folder = tmp_path_factory.mktemp("trained")
    entries = [
        {"output_dir": str(folder / "state"), "save_every_n_steps": 4},
        {"type": "huggingface", "output_dir": str(folder / "out"), "save_every_n_steps": 4},
    ]
    model = {"hf_config_kwargs": {"initializer_range": 0.4}}
    written = recipe(folder, train_iters=4, model=model, checkpoint=entries)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(written))
    trainer(written, devices=1).train()
    return folder


def test_results_are_those_of_the_harness_with_transformers(tasks, trained, tmp_path, capsys):
    """Choices, likelihoods in windows longer than the model has positions, and replies."""
    model = trained / "out" / "global_step_4"
    out = tmp_path / "results.json"
    words = ("--include-path", tasks, "--out", out, "--batch-size", 3)
    run_cli("eval", model, "--lm-eval", ",".join(COMPARED), *words)
    found = json.loads(out.read_text())
    table = capsys.readouterr().out
    assert found["model"] == str(model) and str(out) in table and "|tiny_choice" in table

    lm_eval = pytest.importorskip("lm_eval")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    theirs = lm_eval.simple_evaluate(
        model=huggingface.HFLM(str(model), device="cpu", dtype="float32", batch_size=2),
        tasks=list(COMPARED),
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks)),
        bootstrap_iters=0,
    )
    for name in COMPARED:
        numbers = {
            metric: value
            for metric, value in theirs["results"][name].items()
            if isinstance(value, float) and "stderr" not in metric
        }
        assert numbers
        for metric, value in numbers.items():
            assert found["results"][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
    assert 0 < found["results"]["tiny_choice"]["acc,none"] < 1, "choices must differ"
    asked = theirs["samples"]["tiny_words"]
    requests = [SimpleNamespace(args=one["arguments"][0]) for one in asked]
    harness = pytest.importorskip("jaxtrain.harness")
    ours = harness.HarnessModel(load_speaker(str(model), is_raw=True), 3).generate_until(requests)
    assert ours == [one["resps"][0][0] for one in asked] and len(set(ours)) > 2, ours


def test_a_run_its_checkpoint_and_its_recipe_have_the_same_results_in_a_file_beside_them(
    tasks, trained, tmp_path
):
    words = ("--lm-eval", "tiny_choice", "--include-path", tasks, "--limit", 4)
    run, checkpoint = trained / "run", trained / "state" / "global_step_4"
    found = {}
    for source, folder in {run: run, checkpoint: trained / "state"}.items():
        run_cli("eval", source, *words)
        (file,) = folder.glob("lm-eval-*.json")
        found[source] = json.loads(file.read_text())["results"]
    file = trained / "recipe.yaml"
    for source, more in {"trained": ("--checkpoint", run), "first": ()}.items():
        out = tmp_path / f"{source}.json"
        run_cli("eval", file, *words, *more, "--out", out)
        found[source] = json.loads(out.read_text())["results"]
    assert found[run] == found[checkpoint] == found["trained"] and found["first"]
    assert found[run]["tiny_choice"]["sample_len"] == 4


WRONG = {
    "a name": ("tiny_chioce", r"no task is called 'tiny_chioce'; did you mean `tiny_choice`"),
    "a pattern": ("tiny_choice,other_*", r"no task is called 'other_\*'"),
    "a long reply": ("tiny_long", "replies of 9000 tokens; the model has 256 positions"),
    "beams": ("tiny_beams", r"generation_kwargs \{'num_beams': 4\} of a task are not supported"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_evaluated_is_said(tasks, trained, case):
    names, message = WRONG[case]
    model = trained / "out" / "global_step_4"
    with pytest.raises(UserError, match=message):
        run_cli("eval", model, "--lm-eval", names, "--include-path", tasks)
