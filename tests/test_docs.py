"""What `docs/trainers.md` teaches is run, every block of it."""

import re
from pathlib import Path

import jax
import pytest
import yaml

from jaxtrain import get_config, registry
from tests.runs import conversations, model_folder

PAGE = (Path(__file__).parents[1] / "docs" / "trainers.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.S)
(RECIPE,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)


def renamed(text):
    """Recipes that ship have classes of these names too, and a process knows a name once."""
    return re.sub(r"(name = \"|type: )(focal|sums|sign|careful|loud)\b", r"\1\2-of-docs", text)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The recipe of the page beside its classes, over a tiny model."""
    folder = tmp_path_factory.mktemp("docs")
    model_folder(folder / "model")
    conversations(folder / "chats.jsonl", 20)
    small = {"from_scratch": True, "name_or_path": str(folder / "model")}
    recipe = yaml.safe_load(renamed(RECIPE)) | {"model": small, "train_iters": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    classes = [renamed(block) for block in PYTHON if "get_config" not in block]
    (folder / "train.py").write_text("\n".join(classes))
    return folder


@pytest.fixture
def folder(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def test_the_python_use_of_the_page_runs(folder, monkeypatch, capsys):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *which: one)  # the tests have eight of them
    get_config("recipe.yaml")
    trainers = [registry.find("trainer", f"{name}-of-docs") for name in ("focal", "careful")]
    names = {cls.__name__: cls for cls in (*trainers, trainers[1].default_callbacks()[0])}
    used = [block for block in PYTHON if "get_config" in block]
    assert len(used) == 2
    for block in used:
        exec(block, names)
    assert names["again"].global_step == 2
    assert (folder / "exported" / "model.safetensors").is_file()
    assert "eval/loss" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sign", "careful", "loud"])
def test_every_trainer_of_the_page_trains(folder, name, capsys):
    changes = ["data.sources=[{type: sums-of-docs, rows: 20}]", f"run_dir=runs/{name}"]
    if name == "sign":
        changes.append("optimizer.decay=0.5")
    config = get_config("recipe.yaml", [f"type={name}-of-docs", *changes])
    run = registry.find("trainer", config.type)(config, devices=jax.devices()[:1])
    assert run.train().global_step == 2
    assert run.data.ledger.sources[0].rows == 20
    assert ("\nstep 2: " in capsys.readouterr().out) == (name == "loud")


def test_every_event_of_the_page_is_one():
    table = PAGE.split("| class | events |")[1].split("##")[0]
    shown = set(re.findall(r"`([a-z-]+)`", table))
    known = {
        event
        for base in ("trainer:sft", "data:sft", "data_source:json", "model:huggingface",
                     "tokenizer:huggingface", "optimizer:adamw", "scheduler:wsd", "checkpoint:orbax")
        for event in {"init", *registry.find(*base.split(":")).events}
    }  # fmt: skip
    assert shown == known
