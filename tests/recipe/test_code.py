"""A user's file: run once, its imports its own, its faults said by line, known to workers."""

import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from jaxtrain import registry
from jaxtrain.data import factory as factory_module
from jaxtrain.recipe.code import module_name, run_user_code
from jaxtrain.recipe.errors import RecipeError
from tests.runs import recipe, trainer

OPTIMIZER = """
    import jaxtrain
    {above}
    class Mine(jaxtrain.OptimizerFactory):
        name = {name!r}
        {body}
"""


def write(file: Path, text: str, **values) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text).format(**values) if values else textwrap.dedent(text))
    return file


def optimizer(file, name, *, above="", body="pass"):
    return write(file, OPTIMIZER, name=name, above=above, body=body)


def test_a_file_is_run_once_and_again_when_it_has_changed(tmp_path):
    file = optimizer(tmp_path / "train.py", "again-of-test", body="value = 1")
    run_user_code(file)
    first = registry.find("optimizer", "again-of-test")
    run_user_code(file)
    assert registry.find("optimizer", "again-of-test") is first
    optimizer(file, "again-of-test", body="value = 2")
    run_user_code(file)
    assert registry.find("optimizer", "again-of-test").value == 2


def test_two_users_with_equal_file_names_do_not_meet(tmp_path):
    for user in ("ann", "bob"):
        write(tmp_path / user / "helpers.py", f"WHO = {user!r}\n")
        optimizer(
            tmp_path / user / "train.py", f"{user}-of-test", above="import helpers",
            body="who = helpers.WHO",
        )  # fmt: skip
        run_user_code(tmp_path / user / "train.py")
    assert registry.find("optimizer", "ann-of-test").who == "ann"
    assert registry.find("optimizer", "bob-of-test").who == "bob"
    names = {module_name((tmp_path / user / "train.py").resolve()) for user in ("ann", "bob")}
    assert len(names) == 2 and names <= sys.modules.keys()


def test_a_changed_sibling_is_read_again(tmp_path):
    write(tmp_path / "sibling_of_test.py", "WHO = 'first'\n")
    file = optimizer(
        tmp_path / "train.py", "sibling-of-test", above="import sibling_of_test",
        body="who = sibling_of_test.WHO",
    )  # fmt: skip
    run_user_code(file)
    write(tmp_path / "sibling_of_test.py", "WHO = 'the second'\n")
    run_user_code(file)
    assert registry.find("optimizer", "sibling-of-test").who == "the second"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"train.py": "import jaxtrain\n\n1 / 0\n"}, "train.py:3: ZeroDivisionError: division by"),
        ({"train.py": "x = 1\nif x\n"}, "train.py:2: SyntaxError: expected ':'"),
        (
            {"train.py": "import broken_of_test\n", "broken_of_test.py": "a = 1\na.b\n"},
            "broken_of_test.py:2: AttributeError: 'int' object",
        ),
        ({"notes.txt": "a = 1\nb.c\n"}, "notes.txt:2: NameError: name 'b' is not defined"),
        ({"train.py": "no python here\n"}, "train.py:1: SyntaxError: invalid syntax"),
        (
            {"train.py": "import arctic_training\n"},
            "train.py:1: imports arctic_training; write `import jaxtrain`",
        ),
        (
            {
                "train.py": "import os\nfrom arctic_training.trainer.sft_trainer import (\n SFTTrainer,\n register)\n"
            },
            "train.py:2: imports arctic_training; write `from jaxtrain import SFTTrainer, register`",
        ),
        (
            {
                "train.py": "import jaxtrain\nclass A(jaxtrain.SFTTrainer):\n    name = 'sft'\n",
            },
            "train.py: ValueError: the trainer name 'sft' is taken by jaxtrain.trainer.sft:SFTTrainer",
        ),
        (
            {"train.py": "from jaxtrain import SFTTrainer\n\nclass A(SFTTrainer): pass\n"},
            'train.py:3: ValueError: A needs a line `name = "..."` in its class body',
        ),
    ],
)
def test_a_failing_import_is_one_line_with_the_users_own_place(tmp_path, files, expected):
    """Trap A39."""
    for name, text in files.items():
        write(tmp_path / name, text)
    with pytest.raises(RecipeError) as error:
        run_user_code(tmp_path / next(iter(files)))
    assert error.value.exit_code == 2
    assert str(error.value).startswith(f"{tmp_path}/{expected}") and "\n" not in str(error.value)
    registry.settle()  # a failed file leaves nothing behind that others stumble over


def test_upstream_is_not_imported_even_where_it_is_installed(tmp_path, monkeypatch):
    write(tmp_path / "site" / "arctic_training.py", "raise SystemExit('it was run')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    file = write(tmp_path / "user" / "train.py", "import arctic_training\n")
    with pytest.raises(RecipeError, match="write `import jaxtrain`"):
        run_user_code(file)
    assert "arctic_training" not in sys.modules


SHOUTING = """
    from jaxtrain import SFTDataFactory
    from jaxtrain.data.encode import ConversationEncoder
    from words_of_test import louder

    class Encoder(ConversationEncoder):
        def read(self, row):
            turns = [{**turn, "content": louder(turn["content"])} for turn in row["messages"]]
            return super().read({"messages": turns})

    class Shouting(SFTDataFactory):
        name = "shouting-of-test"

        def encoder(self, loaded):
            encoder = super().encoder(loaded)
            encoder.__class__ = Encoder
            return encoder
"""


def test_the_users_code_and_what_it_imports_work_in_worker_processes(tmp_path, monkeypatch):
    write(tmp_path / "code" / "words_of_test.py", "def louder(text):\n    return text.upper()\n")
    write(tmp_path / "code" / "train.py", SHOUTING)
    written = recipe(tmp_path, rows=40, skip_validation=True, data={"type": "shouting-of-test"})
    (tmp_path / "code" / "recipe.yaml").write_text(yaml.safe_dump(written))
    alone = trainer(tmp_path / "code" / "recipe.yaml")
    text = alone.tokenizer.decode(alone.data.train.documents.tokens, skip_special_tokens=True)
    words = text.replace("user\n", "").replace("assistant\n", "")
    assert words.isupper()

    monkeypatch.setattr(factory_module, "choose_num_workers", lambda num_records, num_proc: 2)
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))
    apart = trainer(tmp_path / "code" / "recipe.yaml")
    assert (apart.data.train.documents.tokens == alone.data.train.documents.tokens).all()
