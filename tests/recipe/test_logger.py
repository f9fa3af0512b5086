"""Whom a run tells: what is wrong with that is said by `check` already."""

import itertools
from importlib import metadata

import pytest

from jaxtrain.recipe.check import describe
from jaxtrain.recipe.resolve import resolve

BASE = {"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}}


@pytest.fixture
def _nothing_is_installed(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)


@pytest.mark.parametrize(
    ("written", "fault"),
    [
        (
            {"tensorboard": True},
            "tensorboard.enable: needs the package tensorboardX; "
            "pip install 'jaxtrain[tensorboard]', or write false",
        ),
        (
            {"wandb": {"enable": True}},
            "wandb.enable: needs the package wandb; pip install 'jaxtrain[wandb]', or write false",
        ),
        ({"wandb": {"enable": True, "mode": "disabled"}}, None),
        ({"wandb": {"enable": False}, "tensorboard": {"enable": False, "dir": "x"}}, None),
    ],
)
@pytest.mark.usefixtures("_nothing_is_installed")
def test_a_missing_extra_is_named(written, fault):
    faults = resolve(BASE | written).faults
    assert [str(found) for found in faults] == ([fault] if fault else [])


def test_a_variable_with_no_level_is_a_fault(monkeypatch):
    monkeypatch.setenv("JAXTRAIN_LOG_LEVEL", "loud")
    assert resolve(BASE | {"logger": {"level": "INFO"}}).faults == ()
    (fault,) = resolve(BASE).faults
    assert str(fault) == (
        "logger.level: the variable JAXTRAIN_LOG_LEVEL must be one of DEBUG, INFO, WARNING, ERROR, "
        "CRITICAL, found 'LOUD'"
    )


@pytest.mark.parametrize("run_dir", ["a/{n}/b", "a/{n}-{n}"])
def test_a_number_stands_once_and_last(run_dir):
    (fault,) = resolve(BASE | {"run_dir": run_dir}).faults
    assert str(fault) == f"run_dir: may have one {{n}}, in its last part, found {run_dir!r}"


def test_check_names_the_files_of_a_run(monkeypatch):
    monkeypatch.setattr(metadata, "distribution", lambda name: None)
    everything = {
        "run_dir": "runs/a",
        "train_log_metrics_path": "rows.jsonl",
        "tensorboard": {"dir": "events"},
        "wandb": {"enable": True},
        "profile": {"start_step": 1},
        "mem_profiler": "e2e",
    }
    assert "".join(files(everything)) == (
        "runs/a: recipe.yaml, run.json, logs, loss.png, wandb, profile, mem-prof, rows.jsonl, events"
    )
    assert "".join(files({"run_dir": "b"})) == (
        "b: recipe.yaml, run.json, logs, train-log-metrics.jsonl, loss.png"
    )


def files(change):
    """The line of the files, and those that it goes on in."""
    lines = iter(describe(resolve(BASE | change)).splitlines())
    yield next(line for line in lines if line.startswith("files")).removeprefix("files      ")
    yield from (
        f" {line.strip()}" for line in itertools.takewhile(lambda x: x.startswith(" "), lines)
    )
