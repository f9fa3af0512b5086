"""A user's class of every kind is named in a recipe, has its own keys, and its callbacks are told
of everything."""

import sys
from pathlib import Path

import pytest

from jaxtrain import get_config, registry
from jaxtrain.hooks import HookedMethod
from jaxtrain.recipe.code import module_name
from jaxtrain.recipe.errors import RecipeError
from tests.runs import model_folder, trainer

CODE = Path(__file__).parent / "everything.py"
EVENTS = {
    "trainer": ["init", "train", "epoch", "step", "evaluate", "checkpoint", "loss", "backward"],
    "data": ["init", "load", "process", "split", "create_dataloader"],
    "data_source": ["init", "load"],
    "model": ["init", "create-config", "create-model"],
    "optimizer": ["init", "create-optimizer"],
    "scheduler": ["init", "create-scheduler"],
    "tokenizer": ["init", "create-tokenizer"],
    "checkpoint": ["init", "load", "save"],
}


def written(folder):
    model_folder(folder / "model")
    return {
        "type": "my-trainer",
        "code": str(CODE),
        "factor": 0.5,
        "model": {"name_or_path": str(folder / "model"), "from_scratch": True, "mark": 3},
        "tokenizer": {"mark": 4},
        "data": {
            "type": "my-data", "fewest": 2, "max_length": 64, "cache_dir": str(folder / "cache"),
            "sources": [{"type": "my-source", "rows": 8}],
            "eval_sources": [{"type": "my-source", "rows": 4}],
        },
        "optimizer": {"lr": 0.1, "slowness": 10},
        "scheduler": {"share": 0.5},
        "checkpoint": {
            "output_dir": str(folder / "state"), "file": "numbers", "save_every_n_steps": 2,
            "auto_resume": True,
        },
        "train_iters": 4, "eval_interval": 2,
        "exit_iteration": 2,
        "run_dir": str(folder / "run"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the callbacks saw, up to the start of a run that goes on, and that run."""
    folder = tmp_path_factory.mktemp("everything")
    first = trainer(written(folder), cls=found(folder))
    assert first.train().global_step == 2
    second = trainer(written(folder) | {"exit_iteration": 0}, cls=found(folder))
    second.start()
    return list(sys.modules[module_name(CODE.resolve())].SEEN), second


def found(folder):
    get_config(written(folder))
    return registry.find("trainer", "my-trainer")


def test_every_key_of_a_users_own_is_read(seen):
    run = seen[1]
    assert run.config.factor == 0.5
    assert (run.config.model.mark, run.config.tokenizer.mark) == (3, 4)
    assert run.data.train_rows == 8 - 2
    assert run.scheduler(0) == 0.5
    assert run.global_step == 2
    assert (Path(run.config.checkpoint[0].output_dir) / "global_step_2/numbers.npz").is_file()


@pytest.mark.parametrize(
    ("kind", "event"), [(k, e) for k, events in EVENTS.items() for e in events]
)
def test_every_event_is_told_before_and_after(seen, kind, event):
    words = [word for of, word, _ in seen[0] if of == kind]
    before, after = f"pre-{event}", f"post-{event}"
    assert before in words and after in words
    assert words.index(before) < words.index(after)
    cls = found_class(kind)
    events = {known.replace("-", "_") for known in {"init", *cls.events}}
    assert {e.replace("-", "_") for e in EVENTS[kind]} == events, "the table is complete"


def found_class(kind):
    return registry.find(
        kind, f"my-{ {'data_source': 'source', 'checkpoint': 'engine'}.get(kind, kind) }"
    )


def test_callbacks_get_arguments_before_and_results_after(seen):
    values = {(kind, word): given for kind, word, given in seen[0]}
    assert len(values["trainer", "pre-step"]) == 2  # state, batch
    assert len(values["trainer", "post-evaluate"]) == 1
    assert values["trainer", "post-epoch"] == ()  # it returns nothing
    assert values["data_source", "pre-load"][1] == "eval"
    assert values["optimizer", "pre-create-optimizer"][1].slowness == 10


def test_a_key_that_the_users_class_has_not_is_refused(tmp_path):
    wrong = written(tmp_path) | {"optimizer": {"slownes": 1}}
    with pytest.raises(
        RecipeError, match=r"optimizer.slownes: unknown key.*did you mean `slowness`"
    ):
        get_config(wrong)


def test_a_callback_that_returns_too_little_is_told_what_to_return():
    class Owner:
        def method(self, a, b):
            return a, b

    owner = Owner()
    change = lambda returned: HookedMethod(owner, owner.method, [lambda self, a, b: returned], [])(
        1, b=2
    )
    assert change(None) == (1, 2)
    assert change((3, 4)) == (3, 4)
    with pytest.raises(
        ValueError, match=r"before method must return \(a, b\) or nothing, found int"
    ):
        change(5)
    assert HookedMethod(owner, owner.method, [lambda self, a: 7], [])(1, 2) == (7, 2)
