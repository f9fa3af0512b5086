"""A run that is killed, or ended by a signal, at any moment is continued by the same command, to the
same bits."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from jaxtrain.recipe.errors import PreemptedError
from jaxtrain.signals import ended_by_signals
from tests.forks import Forks
from tests.runs import environment, recipe

KILLS = int(os.environ.get("JAXTRAIN_TEST_KILLS", "100"))
STEPS, STATE_EVERY, EXPORT_EVERY = 8, 2, 4
EXPORTS = ["global_step_4", "global_step_8"]
STRIKE = """
import importlib

module, *names, method = {place!r}.split(":")
owner = importlib.import_module(module)
for name in names:
    owner = getattr(owner, name)
original = getattr(owner, method)

def struck(*args, **named):
    setattr(owner, method, original)
    os.kill(os.getpid(), {number})
    return original(*args, **named)

setattr(owner, method, struck)
"""
"""The program sends itself a signal where a method is first called."""
PLACES = {
    "reading the recipe": "jaxtrain.recipe.resolve:resolve",
    "reading the tokenizer": "transformers:AutoTokenizer:from_pretrained",
    "preparing": "jaxtrain.data.factory:DataFactory:process",
    "building": "jaxtrain.trainer.checkpoints:Checkpoints:_build",
    "looking": "jaxtrain.trainer.run_folder:RunFolder:refuse_foreign",
    "told of the start": "jaxtrain.trainer.callbacks:Callbacks:tell",
    "claiming": "jaxtrain.files:_lock",
    "reading weights": "jaxtrain.trainer.run:Run:first_params",
    "opening": "jaxtrain.trainer.run_folder:RunFolder:open",
    "compiling": "jaxtrain.trainer.jit:Compiled:_jit",
    "stepping": "jaxtrain.trainer.trainer:Trainer:_count_step",
    "evaluating": "jaxtrain.trainer.trainer:Trainer:evaluate",
    "saving": "jaxtrain.checkpoint.orbax:OrbaxEngine:save",
    "exporting": "jaxtrain.trainer.run:Run:export",
    "closing": "jaxtrain.trainer.report:Report:close",
    "summing up": "jaxtrain.trainer.progress:TrainOutput:__new__",
    "exiting": "threading:_shutdown",
}
"""Where a method is first called, in the order of a run."""
AT_THE_END = ("closing", "summing up", "exiting")


def write_recipe(folder: Path) -> Path:
    entries = [
        {"output_dir": str(folder / "state"), "save_every_n_steps": STATE_EVERY,
         "auto_resume": True, "keep_last_n": 2},
        {"type": "huggingface", "output_dir": str(folder / "exports"),
         "save_every_n_steps": EXPORT_EVERY},
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    written = recipe(
        folder, train_iters=STEPS, rows=30, eval_interval=4, data={"train_eval_split": [0.8, 0.2]}
    )
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(written | {"checkpoint": entries}))
    return file


def ends_of(folder: Path) -> dict[str, bytes]:
    """The exports of a run, and nothing half done beside them."""
    names = [*(folder / "exports").iterdir(), *(folder / "state").iterdir()]
    assert not [path for path in names if path.name.startswith(".")], names
    assert sorted(path.name for path in (folder / "exports").glob("global*")) == EXPORTS
    return {
        name: (folder / "exports" / name / "model.safetensors").read_bytes() for name in EXPORTS
    }


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forks")
    made = Forks(folder, JAXTRAIN_CACHE=str(folder / "cache"))
    yield made
    made.close()


def finish(forks: Forks, file: Path) -> None:
    done = forks.run(file)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, forks):
    folder = tmp_path_factory.mktemp("kills") / "unbroken"
    file = write_recipe(folder)
    finish(forks, file)  # fills the caches
    again = write_recipe(folder.parent / "timed")
    began = time.perf_counter()
    finish(forks, again)
    return folder, ends_of(folder), time.perf_counter() - began


@pytest.mark.slow
@pytest.mark.parametrize("index", range(KILLS))
def test_a_kill_at_a_random_moment_loses_nothing(unbroken, forks, index):
    folder, expected, seconds = unbroken
    file = write_recipe(folder.parent / f"killed-{index}")
    forks.run(file, kill_after_s=random.Random(index).uniform(0, seconds))
    finish(forks, file)
    assert ends_of(file.parent) == expected


QUICK = {("stepping", signal.SIGHUP), ("preparing", signal.SIGTERM)}


@pytest.mark.parametrize(
    ("place", "number"),
    [
        pytest.param(place, number, marks=[] if (place, number) in QUICK else pytest.mark.slow)
        for place in PLACES
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else value,
)
def test_a_signal_in_any_phase_ends_cleanly_and_the_run_resumes(unbroken, forks, place, number):
    folder, expected, _ = unbroken
    file = write_recipe(folder.parent / f"{place}-{number.name}")
    if place == "preparing":  # what the cache has is not prepared
        text = file.read_text().replace("max_length: 128", "max_length: 128\n  cache_dir: own")
        file.write_text(text.replace("cache_dir: own", f"cache_dir: {file.parent / 'own'}"))
    done = forks.run(file, before=STRIKE.format(place=PLACES[place], number=int(number)))
    finish(forks, file)
    assert ends_of(file.parent) == expected
    if place in AT_THE_END:  # the run is whole
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
        return
    assert done.returncode == 75, done.stderr[-3000:]
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"{number.name}: ended ") and "Traceback" not in done.stderr
    assert "before the first step" in said or "its full state is saved" in said


IMPORTING = """
import os, signal, sys

class Strike:
    def find_spec(self, name, *rest):
        if name == "optax":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Strike())
from jaxtrain.cli import main
main()
"""


def test_a_signal_while_packages_are_imported_ends_before_the_first_step(tmp_path):
    file = write_recipe(tmp_path / "folder")
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, str(file)],
        env=environment(JAXTRAIN_CACHE=str(tmp_path / "cache")), capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == "SIGTERM: ended before the first step; run it again\n"
    assert done.returncode == 75 and not (tmp_path / "folder" / "run").exists()


def test_a_signal_is_heard_though_code_catches_every_exception():
    swallowing = suppress(BaseException)
    with pytest.raises(PreemptedError, match="SIGHUP: ended"), ended_by_signals(), swallowing:
        signal.raise_signal(signal.SIGHUP)
    with pytest.raises(PreemptedError, match="SIGTERM: ended before"), ended_by_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            raise ValueError("made of it") from error
    with pytest.raises(KeyError), ended_by_signals():
        raise KeyError("not of a signal")


IN_FRONT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
from jaxtrain.cli import main
main()
"""


def children_of(process: int) -> list[str]:
    found = subprocess.run(["ps", "--ppid", str(process)], capture_output=True, text=True)
    return found.stdout.splitlines()[1:]


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs workers, and ps"
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("delay_s", [0.0, 10.0])
def test_what_a_terminal_sends_to_all_its_processes_is_one_line(tmp_path, number, delay_s):
    """While workers start, and while they prepare."""
    base = recipe(tmp_path, rows=20, data={"num_proc": 2})
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text() * 5000)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(base))
    process = subprocess.Popen(
        [sys.executable, "-c", IN_FRONT, str(file)], stderr=subprocess.PIPE, text=True,
        env=environment(JAXTRAIN_CACHE=str(tmp_path / "cache")), start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and len(children_of(process.pid)) < 3:  # and what they share
        time.sleep(0.1)
    time.sleep(delay_s)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=300)
    assert err == f"{number.name}: ended before the first step; run it again\n"
    assert process.returncode == 75
