"""Recipes put together: bases, overrides, variables, and what must never be shown."""

from functools import reduce

import pytest
import yaml

from jaxtrain.recipe.compose import compose
from jaxtrain.recipe.dump import to_yaml
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.resolve import get_config, resolve

SMALL = "model: {name_or_path: m}\ndata: {sources: [a/b]}\n"


def written(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "recipe.yaml"


def fails(source, *overrides):
    with pytest.raises(RecipeError) as error:
        get_config(source, overrides)
    return str(error.value)


@pytest.mark.covers("base")
def test_maps_merge_and_lists_are_replaced(tmp_path):
    file = written(
        tmp_path,
        under="optimizer: {lr: 1, eps: 2}\ndata: {sources: [x/y, z/z]}\nseed: 1\nepochs: 4\n",
        over="optimizer: {lr: 3}\nseed: 2\n",
        recipe=f"base: [under.yaml, over.yaml]\nseed: 3\n{SMALL}",
    )
    assert compose(file).tree == {
        "optimizer": {"lr": 3, "eps": 2},
        "data": {"sources": ["a/b"]},
        "seed": 3,
        "epochs": 4,
        "model": {"name_or_path": "m"},
    }


def test_a_base_may_have_a_base_in_another_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    written(tmp_path / "deep", one="base: two.yaml\nepochs: 2\n", two="epochs: 1\nseed: 5\n")
    config = get_config(written(tmp_path, recipe=f"base: deep/one.yaml\n{SMALL}"))
    assert (config.epochs, config.seed, config.base) == (2, 5, None)


def test_a_fault_names_the_file_that_it_is_in(tmp_path):
    file = written(tmp_path, under="seed: 1\nepoch: 2\n", recipe=f"base: under.yaml\n{SMALL}")
    assert fails(file).startswith(f"{tmp_path}/under.yaml:2: epoch: unknown key (found 2)")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"recipe": "base: recipe.yaml\n"}, "cannot be based on itself: recipe.yaml → recipe.yaml"),
        (
            {"recipe": "seed: 1\nbase: a.yaml\n", "a": "base: recipe.yaml\n"},
            "a.yaml:1: base: a recipe cannot be based on itself: recipe.yaml → a.yaml → "
            "recipe.yaml",
        ),
        ({"recipe": "base: none.yaml\n"}, "recipe.yaml:1: base: no such file: 'none.yaml'"),
        ({"recipe": "base: 3\n"}, "base: must be a path or a list of paths, found 3"),
        (
            {"recipe": "base: a.yaml\n", "a": "- 1\n"},
            "a.yaml: a recipe is a map of keys, found [1]",
        ),
    ],
)
def test_a_base_that_cannot_be_read_is_said(tmp_path, files, expected):
    assert expected in fails(written(tmp_path, **files))


def test_one_base_twice_is_no_cycle(tmp_path):
    file = written(
        tmp_path, a="seed: 1\n", b="base: a.yaml\n", recipe=f"base: [a.yaml, b.yaml]\n{SMALL}"
    )
    assert get_config(file).seed == 1


def test_keys_are_removed_and_entries_of_lists(tmp_path):
    file = written(
        tmp_path,
        recipe=SMALL + "optimizer: {lr: 1}\ncheckpoint: [{output_dir: a}, {output_dir: b}]\n",
    )
    tree = compose(file, ["del:optimizer.lr", "del:checkpoint.0", "mesh.data=[1, x]"]).tree
    assert tree["optimizer"] == {} and tree["checkpoint"] == [{"output_dir": "b"}]
    assert tree["mesh"] == {"data": [1, "x"]}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("del:wandb", "command line: wandb: the recipe has no 'wandb'"),
        (
            "del:optimizer.lrr",
            "command line: optimizer.lrr: optimizer has no 'lrr'; did you mean `lr`?",
        ),
        ("del:seed=1", "an override must be key=value or del:key, found 'del:seed=1'"),
        (
            "base=x.yaml",
            "command line: base: is read before the command line; write it in the recipe",
        ),
        (
            "checkpoint.7.x=1",
            "command line: checkpoint.7.x: checkpoint has no '7', it is a list: write a position "
            "from 0 to 0",
        ),
        ("sceduler.name=x", "command line: sceduler: unknown key (found {'name': 'x'}); did you"),
        ("lr", "command line: an override must be key=value or del:key, found 'lr'"),
        ("=3", "command line: an override must be key=value or del:key, found '=3'"),
        ("model.name_or_path.c=1", "model.name_or_path.c: model.name_or_path has no 'c'"),
        ("seed=[1", "command line: seed: the value is not YAML: '[1'"),
        ("seed=&a [*a]", "the value is not YAML: '&a [*a]' (an alias that contains itself)"),
    ],
)
def test_an_override_without_a_target_is_said(tmp_path, override, expected):
    file = written(tmp_path, recipe=SMALL + "optimizer: {lr: 1}\ncheckpoint: [{output_dir: a}]\n")
    assert expected in fails(file, override)


def test_one_entry_is_the_first_also_without_its_list(tmp_path):
    file = written(tmp_path, recipe=SMALL + "checkpoint: {output_dir: a, keep_last_n: 1}\n")
    changes = ["checkpoint.0.keep_last_n=3", "checkpoint.0.save_every_n_steps=5"]
    (entry,) = get_config(file, changes).checkpoint
    assert (entry.keep_last_n, entry.save_every_n_steps) == (3, 5)
    assert compose(file, ["del:checkpoint.0.keep_last_n"]).tree["checkpoint"] == {"output_dir": "a"}
    assert "checkpoint" not in compose(file, ["del:checkpoint.0"]).tree
    (entry,) = get_config(file, ["checkpoint.0={output_dir: b}"]).checkpoint
    assert (entry.output_dir, entry.keep_last_n) == ("b", None)


def test_faults_of_overrides_come_with_all_others(tmp_path):
    file = written(tmp_path, recipe=SMALL + "epoch: 1\n")
    assert [line.split(": ")[1] for line in fails(file, "del:x", "seed=y").splitlines()[:-1]] == [
        "epoch",
        "x",
        "seed",
    ]


def test_variables_are_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("ROWS", "7")
    monkeypatch.setenv("WORD", "a: [b")
    monkeypatch.delenv("NONE_SUCH", raising=False)
    file = written(
        tmp_path,
        recipe="a: ${env:ROWS}\nb: ${env:NONE_SUCH:1e-5}\nc: ${dir}/x\nd: ${env:WORD}\ne: ${env:NONE_SUCH:}\n"
        "f: '${env:ROWS} rows'\ng: ${env:NONE_SUCH:true}\n",
    )
    tree = compose(file, ["h=${env:ROWS}"]).tree
    assert tree == {
        "a": 7,
        "b": 1e-5,
        "c": f"{tmp_path.resolve()}/x",
        "d": "a: [b",
        "e": "",
        "f": "7 rows",
        "g": True,
        "h": 7,
    }


def test_a_value_is_filled_in_once(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTER", "${env:INNER}")
    monkeypatch.delenv("INNER", raising=False)
    assert compose(written(tmp_path, recipe="a: ${env:OUTER}\n")).tree == {"a": "${env:INNER}"}


def test_every_missing_variable_is_named_with_its_line(tmp_path, monkeypatch):
    monkeypatch.delenv("NONE_SUCH", raising=False)
    file = written(
        tmp_path,
        recipe=f"{SMALL}run_dir: ${{env:NONE_SUCH}}\noptimizer: {{lr: '${{env:NONE_SUCH}}'}}\n",
    )
    what = "the environment variable NONE_SUCH is not set, and has no default"
    assert fails(file).splitlines()[:-1] == [
        f"{file}:3: run_dir: {what}",
        f"{file}:4: optimizer.lr: {what}",
    ]


SECRET = "hunter2-and-a-very-long-tail-that-a-message-would-cut-short-0123456789-abcdefgh"


@pytest.mark.parametrize(
    "value", [SECRET, "s3c", "it's \\ quoted 'twice' over and over and over and over"]
)
@pytest.mark.parametrize(
    "recipe",
    [
        {"seed": "${env:SECRET}"},
        {"model": {"name_or_path": "m", "remat": "${env:SECRET}"}},
        {"type": "${env:SECRET}"},
        {"code": "${env:SECRET}"},
        {"optimizer": {"lr": "1${env:SECRET}"}},
        {"data": {"sources": [{"type": "${env:SECRET}"}]}},
        {"no_such_key": "${env:SECRET}"},
        {
            "scheduler": {
                "name": "cosine",
                "scheduler_specific_kwargs": {"num_cycles": "${env:SECRET}"},
            }
        },
        {
            "checkpoint": {
                "output_dir": "a",
                "max_shard_size": "${env:SECRET}",
                "type": "huggingface",
            }
        },
    ],
)
def test_a_message_never_shows_a_secret(monkeypatch, recipe, value):
    monkeypatch.setenv("SECRET", value)
    shown = fails({"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}} | recipe)
    for form in {value, repr(value)[1:-1], value[:16]}:
        assert form not in shown, shown


@pytest.mark.parametrize("value", [SECRET, "s3c"])
def test_a_saved_recipe_names_the_variable(monkeypatch, value):
    monkeypatch.setenv("SECRET", value)
    recipe = {
        "model": {"name_or_path": "${env:SECRET}"},
        "data": {
            "sources": [
                "x/${env:SECRET}",
                {"name_or_path": "y", "kwargs": {"token": "${env:SECRET}"}},
            ]
        },
        "checkpoint": {"output_dir": "out/${env:SECRET}"},
        "tokenizer": {"chat_template": "{{ '${env:SECRET}' }}"},
        "optimizer": {"lr": "${env:RATE:0.5}"},
    }
    resolved = resolve(recipe)
    text = to_yaml(resolved.require_config())
    assert value not in text and text.count("${env:SECRET}") == 5, text
    assert get_config(yaml.safe_load(text)).model_dump() == resolved.require_config().model_dump()
    assert resolved.require_config().model.name_or_path == value


def test_a_secret_that_a_recipe_holds_itself_is_neither_shown_nor_saved(monkeypatch):
    source = {"name_or_path": "a/b", "kwargs": {"token": SECRET, "pad_token": "kept-as-it-is"}}
    recipe = {"model": {"name_or_path": "m"}, "data": {"sources": [source]}}
    resolved = resolve(recipe)
    text = to_yaml(resolved.require_config())
    assert SECRET not in text and "token: ${env:TOKEN}" in text and "kept-as-it-is" in text
    assert resolved.require_config().data.sources[0].kwargs["token"] == SECRET
    assert resolved.report.notes[0] == (
        "data.sources.0.kwargs.token: neither shown nor saved; write ${env:TOKEN}, and the saved "
        "recipe runs"
    )
    monkeypatch.setenv("TOKEN", SECRET)
    assert get_config(yaml.safe_load(text)).model_dump() == resolved.require_config().model_dump()
    shown = fails(recipe | {"hf_token": SECRET, "wandb": {"api_key": "s3c", "password": 12345678}})
    assert SECRET[:16] not in shown and "s3c" not in shown and "12345678" not in shown
    assert len(shown.splitlines()) == 3


def test_runs_with_other_variables_have_other_folders(monkeypatch):
    recipe = {"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}, "seed": "${env:SEED}"}
    folders = set()
    for seed in "12":
        monkeypatch.setenv("SEED", seed)
        folders.add(get_config(recipe).run_dir)
    assert len(folders) == 2


def test_a_path_in_two_places_is_noted(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    for folder in (tmp_path, tmp_path / "recipes"):
        (folder / "words.jinja").write_text("{{ messages }}")
    file = written(tmp_path / "recipes", recipe=SMALL + "tokenizer: {chat_template: words.jinja}\n")
    monkeypatch.chdir(tmp_path)
    resolved = resolve(file)
    beside = tmp_path / "recipes" / "words.jinja"
    assert resolved.require_config().tokenizer.chat_template == str(beside)
    note = f"chat_template: {beside} is used, not {tmp_path / 'words.jinja'}"
    assert note in resolved.report.notes


PATHS = {
    "model.name_or_path": "model: {name_or_path: it, type: huggingface}",
    "tokenizer.name_or_path": "tokenizer: {name_or_path: it}",
    "tokenizer.chat_template": "tokenizer: {chat_template: it.jinja}",
    "eval_samples.prompts": "eval_samples: {prompts: it.txt}",
    "data.sources.0.name_or_path": "data: {sources: ['it:train']}",
    "data.sources.0.path": "data: {sources: [{path: ['it/*.csv']}]}",
    "data.eval_sources.own.0.path": "data: {sources: [a/b], eval_sources: {own: [it.jsonl]}}",
    "checkpoint.0.resume_from": "checkpoint: {output_dir: x, resume_from: global_step_2}",
    "code": "code: it.py",
}


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("is_here", [True, False])
def test_a_path_is_looked_up_beside_the_file_that_has_it(tmp_path, key, is_here):
    """Also where a file of that name lies beside the recipe that has the other as its base."""
    names = ("it.jinja", "it.jsonl", "it.py", "it.txt", "it/a.csv")
    for folder in ("base", *(["run"] if is_here else [])):
        for name in ("it", "global_step_2"):
            (tmp_path / folder / name).mkdir(parents=True)
        for name in names:
            (tmp_path / folder / name).write_text(f"# {folder}\n")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "base" / "base.yaml").write_text(PATHS[key])
    top = SMALL.replace("data: {sources: [a/b]}\n", "") if "data.sources" in key else SMALL
    top = top.replace("model: {name_or_path: m}\n", "") if "model." in key else top
    file = written(tmp_path / "run", recipe=f"base: ../base/base.yaml\n{top}")
    config = resolve(file).require_config()
    step = lambda part, name: part[int(name)] if name.isdigit() else dict(part)[name]
    found = reduce(step, key.split("."), config)
    found = found[0] if isinstance(found, tuple) else found
    assert found.startswith(("# base", f"{tmp_path / 'base'}/")), found


@pytest.mark.parametrize(
    ("source", "written"),
    [
        (
            {"type": "jsonl", "path": "s3://ann:hunter22@host/a.jsonl"},
            "s3://ann:${env:PASSWORD}@host",
        ),
        (
            {"name_or_path": "a/b", "kwargs": {"headers": {"Authorization": "Bearer hunter22"}}},
            "Authorization: ${env:AUTHORIZATION}",
        ),
    ],
)
def test_passwords_in_urls_and_headers_are_neither_shown_nor_saved(source, written):
    recipe = {"model": {"name_or_path": "m"}, "data": {"sources": [source]}}
    text = to_yaml(get_config(recipe))
    assert "hunter22" not in text and written in text, text
    source["split_mapping"] = source["path_"] = 1
    assert "hunter22" not in fails(recipe | {"data": {"sources": [source], "path": source}})
