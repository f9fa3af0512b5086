"""Every recipe that ships parses; every recipe that the README shows does too."""

import re
from pathlib import Path

import pytest
import yaml

from jaxtrain import get_config

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda f: f.stem)
def test_a_shipped_recipe_is_valid(file):
    assert get_config(file).run_dir == f"runs/{file.stem}"


def test_recipes_in_the_readme_are_valid():
    shown = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert shown
    for text in shown:
        get_config(yaml.safe_load(text.replace("2e-5", "2.0e-5")))


def test_the_trainer_in_the_readme_trains(tmp_path):
    from tests.runs import losses, recipe, trainer

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names: dict = {"__name__": "readme"}
    exec(code.replace('"focal"', '"focal-of-the-readme"'), names)
    written = recipe(tmp_path, train_iters=8) | {"type": "focal-of-the-readme", "gamma": 1.0}
    found = losses(trainer(written, cls=names["FocalTrainer"]), 8)
    assert found[-1] < found[0]
