import pytest
import yaml

from jaxtrain.recipe.dump import recipe_hash, to_yaml
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


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"type": "stf"}, "type: unknown trainer type 'stf'; did you mean `sft`? (known: sft"),
        ({"optimizer": {"type": "adamv"}}, "optimizer.type: unknown optimizer type 'adamv'; did you mean `adamw` or `cpu_adam`?"),
        ({"model": None}, "model: is required"),
        ({"model": "m"}, "model: must be a map of keys, found 'm'"),
        ({"model": {"name_or_path": "m", "dtype": "int8"}}, "model.dtype: must be one of bf16, fp16, fp32"),
        ({"data": {"sources": []}}, "data.sources: is empty; name at least one source"),
        ({"data": {"sources": [{"type": "json1", "path": "x"}]}}, "data.sources.0.type: unknown data source type"),
        ({"data": {"sources": ["a/b"], "train_eval_split": [1.5, -0.5]}}, "two numbers from 0 to 1"),
        ({"data": {"sources": ["a/b"], "train_eval_split": [0.9, 0.1]}}, "eval_interval: must be > 0"),
        ({"eval_interval": 5}, "eval_interval: needs eval data"),
        ({"optimizer": {"lr": 1, "learning_rate": 2}}, "optimizer.lr"),
        ({"scheduler": {"warmup_ratio": 0.1, "warmup_steps": 3}}, "scheduler.warmup_ratio: excludes warmup_steps; remove one"),
        ({"mesh": {"tensr": 2}}, "mesh.tensr: unknown key (found 2); did you mean `tensor`?"),
        ({"mesh": {"data": -1, "fsdp": -1}}, "only one axis may be -1"),
        ({"checkpoint": {"type": "huggingface", "output_dir": "a", "auto_resume": True}}, "weights alone cannot"),
        ({"code": "nowhere.py"}, "code: no such file: 'nowhere.py'"),
    ],
)  # fmt: skip
def test_bad_values_are_said_by_key(change, expected):
    assert any(expected in line for line in errors(BASE | change)), errors(BASE | change)


def test_a_word_beside_true_and_false_is_taken():
    config = get_config(BASE | {"arctic_moe": "auto"})
    assert config.arctic_moe == "auto"
    assert errors(BASE | {"arctic_moe": "atuo"})


def test_names_of_the_shared_format_resolve():
    config = get_config(
        BASE
        | {
            "optimizer": {"type": "fused_adam"},
            "checkpoint": {"type": "deepspeed", "output_dir": "a"},
        }
    )
    assert (config.optimizer.type, config.checkpoint[0].type) == ("adamw", "orbax")


def test_the_effective_recipe_runs_again_and_is_the_same():
    config = get_config(
        BASE
        | {
            "train_iters": 7,
            "scheduler": {"warmup_steps": 2},
            "data": {"sources": [{"type": "huggingface", "name_or_path": "a/b:train[:9]"}], "pad_to": "max_length",
                     "max_length": 100},
            "checkpoint": [{"output_dir": "a"}, {"type": "huggingface", "output_dir": "b"}],
        }
    )  # fmt: skip
    again = get_config(yaml.safe_load(to_yaml(config)))
    assert again == config
    assert recipe_hash(again) == recipe_hash(config)


def test_different_recipes_have_different_run_folders():
    folders = {get_config(BASE | {"seed": seed}).run_dir for seed in (1, 2)}
    assert len(folders) == 2


def test_the_dict_of_a_recipe_is_not_changed():
    recipe = BASE | {"optimizer": {"lr": 1}}
    before = yaml.safe_dump(recipe)
    get_config(recipe, ["optimizer.weight_decay=0"])
    assert yaml.safe_dump(recipe) == before


def test_user_code_adds_keys_that_are_checked(tmp_path):
    (tmp_path / "focal.py").write_text(
        "from jaxtrain import SFTTrainer, TrainerConfig, register\n"
        "class FocalConfig(TrainerConfig):\n"
        "    gamma: float = 2.0\n"
        "@register\n"
        "class FocalTrainer(SFTTrainer):\n"
        "    name = 'focal-of-test-resolve'\n"
        "    config: FocalConfig\n"
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "type: focal-of-test-resolve\ncode: focal.py\ngamma: 1.5\nmodel: {name_or_path: m}\ndata: {sources: [a/b]}\n"
    )
    assert get_config(file).gamma == 1.5
    assert errors(file, ["gama=1"])[0] == (
        "command line: gama: unknown key (found 1); did you mean `gamma`?"
    )


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
