"""A disk that fills up, or a folder that is lost, while a run writes: one message, no traceback, and
what was saved before is good."""

import resource
import time
from contextlib import contextmanager

import numpy as np
import pytest
import yaml

from jaxtrain.data.cache import DataCache
from jaxtrain.data.documents import Documents, DocumentWriter
from jaxtrain.data.encode import Encoded
from jaxtrain.files import write_atomically
from jaxtrain.metrics.log import close_log, open_log, screen
from jaxtrain.metrics.writer import JsonLines
from jaxtrain.recipe.errors import DataError
from jaxtrain.recipe.logger import LoggerConfig
from jaxtrain.tokenizer import save_tokenizer
from tests.forks import Forks
from tests.runs import metrics_of, recipe
from tests.tiny import tiny_tokenizer

FILLING = """
import resource
from pathlib import Path
from jaxtrain import Callback, SFTTrainer

folder = Path({folder!r})

def limit(size):  # no file gets larger, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

class Fill(Callback):
    def on_step_end(self, state):
        if state.global_step == 3 and (folder / "fill").exists():
            state.checkpoints.wait()
            {code}

class Filling(SFTTrainer):
    name = "filling"

    def post_init_callback(self):
        self.add_callback(Fill())
"""
LOST = "(folder / 'state').rename(folder / 'lost'); (folder / 'state').touch()"
CASES = {
    "state": (
        "limit(50_000)",
        "{folder}/state/global_step_4 cannot be written: File too large; the newest checkpoint "
        "there is global_step_2",
    ),
    "state folder": (
        LOST,
        "{folder}/state/global_step_4 cannot be written: Not a directory; none is there",
    ),
    "export": (
        "limit(50_000)",
        "{folder}/exports/global_step_4 cannot be written: File too large; none is there",
    ),
    "metrics": (
        "(folder / 'run/train-log-metrics.jsonl').open('a').write('\\n' * 49_990); limit(50_000)",
        "{folder}/run/train-log-metrics.jsonl: File too large",
    ),
}  # fmt: skip


@contextmanager
def limited_to(size):
    """No file gets larger; also not that of this test's own report, so only for a while."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def written(folder, code, *, state_every=2):
    (folder / "fill").touch()
    (folder / "train.py").write_text(FILLING.format(folder=str(folder), code=code))
    entries = [
        {"output_dir": str(folder / "state"), "save_every_n_steps": state_every,
         "auto_resume": True},
        {"type": "huggingface", "output_dir": str(folder / "exports"), "save_every_n_steps": 4,
         "verify_export": False},
    ]  # fmt: skip
    made = recipe(folder, type="filling", train_iters=5, rows=30)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(made | {"checkpoint": entries}))
    return file


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forks")
    made = Forks(folder, JAXTRAIN_CACHE=str(folder / "cache"))
    yield made
    made.close()


@pytest.mark.parametrize(
    "case",
    [case if case == "state" else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_a_write_that_fails_is_one_message_and_the_run_goes_on_later(tmp_path, forks, case):
    code, expected = CASES[case]
    file = written(tmp_path, code, state_every=100 if case == "export" else 2)
    began = time.monotonic()
    done = forks.run(file)
    # Threads of Orbax would wait for 300 s for a folder that another one could not make.
    assert time.monotonic() - began < 250
    assert done.stderr.splitlines()[-1] == expected.format(folder=tmp_path), done.stderr
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    # What a thread of Orbax still writes then is removed by the next start.
    assert not list(tmp_path.glob("exports/.global*")), "half-written"
    if case != "metrics":  # the log is on that disk
        log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
        assert "Traceback" in log and "CheckpointError" in log
    if case == "state folder":  # a limit is one of the files in jax's cache too, which warns
        assert len(done.stderr.splitlines()) == 1, done.stderr
    (tmp_path / "fill").unlink()
    if (tmp_path / "lost").exists():
        (tmp_path / "state").unlink()
        (tmp_path / "lost").rename(tmp_path / "state")
    done = forks.run(file)
    assert done.returncode == 0, done.stderr
    assert [row["iter"] for row in metrics_of(tmp_path)] == [1, 2, 3, 4, 5]
    assert (tmp_path / "exports" / "global_step_4").is_dir()
    assert not list(tmp_path.glob("*/.global*"))


def test_a_log_that_cannot_be_written_says_so_once(tmp_path, capsys):
    open_log(tmp_path, LoggerConfig(), process=0)
    with limited_to(1000):
        for _ in range(3):
            screen.info("a" * 600)
        said = capsys.readouterr().err
    close_log()
    assert said.count("rank_0.log: File too large; what follows is not logged") == 1
    assert "Traceback" not in said and "Logging error" not in said


def test_an_error_of_a_write_names_the_file(tmp_path):
    file = tmp_path / "file.json"
    rows = JsonLines(tmp_path / "rows.jsonl", resumed_at=0)
    with pytest.raises(OSError, match=r"File too large: '.*file.json'"), limited_to(100):
        write_atomically(file, "a" * 200)
    with pytest.raises(OSError, match=r"File too large: '.*rows.jsonl'"), limited_to(100):
        rows.write({"text": "a" * 200})
    rows.close()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("size", [100, 5000])
def test_a_tokenizer_that_cannot_be_written_is_an_error_of_the_system(tmp_path, size):
    """tokenizers, which writes the longest file, has a class of its own for none."""
    with pytest.raises(OSError, match="File too large"), limited_to(size):
        save_tokenizer(tiny_tokenizer(), tmp_path)


def test_a_full_disk_under_the_cache_is_an_error_of_its_folder(tmp_path):
    tokens = np.zeros(1000, np.int32)

    def build(folder):
        with DocumentWriter(folder) as writer:
            writer.append(Encoded(tokens, tokens), source=0, record=0)
        Documents.open(folder).save(folder / "copy")

    expected = rf"cache folder {tmp_path}: File too large"
    with pytest.raises(DataError, match=expected), limited_to(1000):
        DataCache(tmp_path).get({"a": "b"}, build)
    assert not list(tmp_path.glob(".new*"))
