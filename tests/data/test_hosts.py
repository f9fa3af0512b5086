"""Several processes and hosts prepare the same rows: by files alone, and each exactly once."""

import multiprocessing
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxtrain.data import BatchShape, SFTDataFactory
from jaxtrain.data import cache as cache_module
from jaxtrain.data.cache import DataCache
from jaxtrain.recipe.data import SFTDataConfig
from tests.data.made import write
from tests.data.test_cache import entry_of, is_hit, local
from tests.tiny import chat, tiny_tokenizer


def _prepare_slowly(folder, log):
    def build(new):
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(1.0)
        (new / "x").write_text("rows")

    found = DataCache(folder).get({"name": "a"}, build)
    with log.open("a") as file:
        file.write(f"{found.note.split(',')[0]} {(found.folder / 'x').read_text()}\n")


def test_of_several_processes_one_prepares_and_the_others_wait(tmp_path):
    log, context = tmp_path / "log", multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_prepare_slowly, args=(tmp_path / "c", log)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    lines = sorted(log.read_text().splitlines())
    assert lines == ["built", "cache: hit rows", "cache: hit rows", "cache: miss rows"]


def _prepare_as_host(index, path, folder, answers):
    config = SFTDataConfig(sources=("x",), pack_samples=True, cache_dir=str(folder))
    factory = SFTDataFactory(config, tiny_tokenizer(), 64)
    own = range(2 * index, 2 * index + 2)
    data = factory.prepare([local(path)], {}, BatchShape(1, 4, own))
    waits = "jax" in sys.modules  # who knows no jax takes part in no collective
    batches = [batch.tokens for batch in data.train_batches(0, data.steps_per_epoch)]
    answers.put((index, is_hit(data.ledger.notes[0]), waits, batches))


@pytest.mark.parametrize("is_shared", [True, False])
def test_hosts_prepare_without_a_word_to_each_other(tmp_path, is_shared):
    """Each by itself where they share no folder; no collective waits on tokenisation."""
    rows = write(tmp_path / "rows.jsonl", [{"messages": chat(f"a{n}", "yes")} for n in range(6)])
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    folders = [tmp_path / "c", tmp_path / ("c" if is_shared else "other")]
    hosts = [
        context.Process(target=_prepare_as_host, args=(index, rows, folder, answers))
        for index, folder in enumerate(folders)
    ]
    for host in hosts:
        host.start()
    found = sorted((answers.get(timeout=120) for _ in hosts), key=lambda answer: answer[0])
    for host in hosts:
        host.join(60)
    assert sorted(hit for _, hit, _, _ in found) == [False, is_shared]
    assert not any(waits for _, _, waits, _ in found)
    config = SFTDataConfig(sources=("x",), pack_samples=True, cache_dir=str(tmp_path / "alone"))
    alone = SFTDataFactory(config, tiny_tokenizer(), 64).prepare(
        [local(rows)], {}, BatchShape(1, 4)
    )
    for step, batch in enumerate(alone.train_batches(0, alone.steps_per_epoch)):
        joined = np.concatenate([batches[step] for *_, batches in found], axis=1)
        assert (joined == batch.tokens).all()


DIES = """
import os, sys
from pathlib import Path
from jaxtrain.data import cache
from jaxtrain.data.cache import DataCache
cache.CLAIM_TIMEOUT_S = 0.5
DataCache(sys.argv[1]).get({"name": "a"}, lambda folder: os._exit(9))
"""


@pytest.mark.parametrize("is_here", [True, False])
def test_a_claim_of_a_process_that_died_is_taken_over(tmp_path, monkeypatch, is_here):
    monkeypatch.setattr(cache_module, "CLAIM_TIMEOUT_S", 0.5)
    died = subprocess.run([sys.executable, "-c", DIES, str(tmp_path / "c")], check=False)
    (claim,) = (tmp_path / "c").glob("*.claim")
    assert died.returncode == 9 and socket.gethostname() in claim.read_text()
    if not is_here:  # nobody can ask another machine for its processes, so the claim has to age
        claim.write_text(claim.read_text().replace(socket.gethostname(), "elsewhere"))
    entry = entry_of(DataCache(tmp_path / "c"), "a", 10)
    assert (entry / "x").stat().st_size == 10
    assert not list((tmp_path / "c").glob("*.claim"))
