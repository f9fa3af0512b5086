import pytest
import yaml

from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.resolve import get_config

BASE = {"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}}


def errors(recipe, overrides=()):
    with pytest.raises(RecipeError) as error:
        get_config(recipe, overrides)
    return str(error.value).splitlines()


def test_all_faults_come_together_sorted_by_line_with_help(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {name_or_path: m}\n"
        "data:\n"
        "  sources: [a/b]\n"
        "  pack_sample: true\n"
        "optimizer:\n"
        "  learning_rat: 3e-4\n"
        "  weight_decay: true\n"
        "micro_batch_size: 0\n"
        "checkpoint:\n"
        "  - {output_dir: a, keep_best_n: 2, auto_resume: true}\n"
        "  - {type: huggingface, output_dir: a}\n"
    )
    assert errors(file, ["epoch=2"]) == [
        f"{file}:4: data.pack_sample: unknown key (found true); did you mean `pack_samples`?",
        f"{file}:6: optimizer.learning_rat: unknown key (found 0.0003); did you mean `learning_rate`?",
        f"{file}:7: optimizer.weight_decay: must be a number, found true",
        f"{file}:8: micro_batch_size: must be >= 1, found 0",
        f"{file}:11: checkpoint.1.output_dir: 'a' is the folder of checkpoint.0 too; use another",
        "command line: epoch: unknown key (found 2); did you mean `epochs`?",
        "6 errors in recipe.yaml; nothing was started",
    ]


def test_a_word_beside_true_and_false_is_taken():
    config = get_config(BASE | {"arctic_moe": "auto"})
    assert config.arctic_moe == "auto"
    assert errors(BASE | {"arctic_moe": "atuo"})


@pytest.mark.covers("code")
def test_user_code_that_fails_is_named_by_line(tmp_path):
    (tmp_path / "broken.py").write_text("x = 1\nraise RuntimeError('no luck')\n")
    file = tmp_path / "recipe.yaml"
    file.write_text("code: broken.py\nmodel: {name_or_path: m}\ndata: {sources: [a/b]}\n")
    no_luck = f"{tmp_path}/broken.py:2: RuntimeError: no luck"
    assert errors(file)[0] == no_luck
    assert errors(file, ["epoch=1", "optimizer.x=1"])[:-1] == [
        no_luck,
        "command line: optimizer.x: unknown key (found 1); remove it, or, if your own "
        "trainer defines it, name its file under `code:`",
        "command line: epoch: unknown key (found 1); did you mean `epochs`?",
    ]
    assert errors(file, ["type=theirs"])[:-1] == [no_luck]  # what else there is hangs on it


def test_prompts_are_the_lines_of_a_file_beside_the_recipe(tmp_path):
    (tmp_path / "prompts.txt").write_text("Who?\n\nWhy?\n")
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {name_or_path: m}\ndata: {sources: [a/b]}\neval_samples: {prompts: prompts.txt}\n"
    )
    config = get_config(file)
    assert config.eval_samples is not None and config.eval_samples.prompts == ("Who?", "Why?")


def test_the_dict_of_a_recipe_is_not_changed():
    recipe = BASE | {"optimizer": {"lr": 1}}
    before = yaml.safe_dump(recipe)
    get_config(recipe, ["optimizer.weight_decay=0"])
    assert yaml.safe_dump(recipe) == before
