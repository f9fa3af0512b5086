"""What the machine, a template or the user's code raises is one message with its exit code."""

import json
import random
import re
import subprocess
import sys

import pytest
from rich.text import Text

from jaxtrain.data import render
from jaxtrain.data.cache import PARTS_FILE, DataCache
from jaxtrain.data.command import Piece, Sample, format_sample
from jaxtrain.data.conversation import read_conversation
from jaxtrain.explain import explain_error
from jaxtrain.gguf_file import read_header
from jaxtrain.recipe.errors import DataError, WeightError, printable
from jaxtrain.recipe.resolve import get_config
from tests.runs import environment, model_folder, recipe
from tests.test_cli import jaxtrain, written
from tests.tiny import chat, tiny_tokenizer

OWN = """
from jaxtrain import SFTTrainer

class Mean(SFTTrainer):
    name = "mean"

    def loss_fn(self, model, batch, key):
        return model(batch).mean()
"""


def no_device(folder, base, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")


def below_a_file(folder, base, monkeypatch):
    (folder / "file").touch()
    base["run_dir"] = str(folder / "file" / "run")


def mean(folder, base, monkeypatch):
    (folder / "train.py").write_text(OWN)
    base["type"] = "mean"


RAISED = {
    "device": (no_device, 1, "no device: JAX_PLATFORMS=cuda cannot be used here"),
    "run folder": (below_a_file, 2, "Not a directory"),
    "loss": (mean, 1, "loss_fn returned"),
}


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_command_without_a_recipe_says_that_there_is_no_device(tmp_path, command):
    words = [command, str(model_folder(tmp_path / "model"))]
    words += ["--prompt", "x"] if command == "generate" else []
    own = environment(JAX_PLATFORMS="cuda")
    done = subprocess.run(
        [sys.executable, "-m", "jaxtrain", *words], env=own, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("no device: JAX_PLATFORMS=cuda cannot be used here")


@pytest.mark.parametrize("case", RAISED)
def test_what_the_machine_or_the_users_code_raises_is_no_traceback(tmp_path, monkeypatch, case):
    spoil, code, expected = RAISED[case]
    base = recipe(tmp_path, rows=4)
    spoil(tmp_path, base, monkeypatch)
    done = jaxtrain(tmp_path, written(tmp_path, base))
    assert done.returncode == code, done.stdout + done.stderr
    assert expected in done.stderr and "Traceback" not in done.stderr, done.stderr
    log = tmp_path / "run" / "logs" / "rank_0.log"
    if case == "loss":
        assert "Traceback" in log.read_text() and "TypeError" in log.read_text()


LIMITED = """
import resource
from jaxtrain.cli import main
resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30,) * 2)
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits what a process may allocate")
def test_a_step_that_does_not_fit_names_its_batch_and_what_helps(tmp_path):
    """12 GiB for six arrays of [2 sequences, 8192 tokens, 65536 features], each of 4 GiB."""
    base = recipe(
        tmp_path, rows=80, data={"max_length": 8192}, micro_batch_size=2, train_iters=1,
        model={"remat": "none"},
    )  # fmt: skip
    wide = {"hidden_size": 8, "intermediate_size": 2**16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    model_folder(tmp_path / "model", **wide, **heads, max_position_embeddings=8192)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(written(tmp_path, base))],
        env=environment(JAXTRAIN_CACHE=str(tmp_path / "cache")), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    first, size, advice = done.stderr.splitlines()
    assert first == "out of memory" and re.search(r"Out of memory allocating \d{11} bytes", size)
    assert "2 sequences of 8,192 tokens per batch shard" in advice
    for way in ("lower micro_batch_size", "model.remat: full", "data.max_length", "mesh.fsdp"):
        assert way in advice
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert "Traceback" in log and "RESOURCE_EXHAUSTED" in log


def test_of_what_would_help_is_said_what_is_not_done_yet():
    config = get_config({"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}})
    error = explain_error(MemoryError("cannot allocate"), config)
    assert error is not None and error.exit_code == 4
    said = str(error)
    assert "1 sequence of" in said and "lower data.max_length" in said and "mesh.fsdp" in said
    assert "micro_batch_size" not in said and "remat" not in said


def test_a_fault_of_this_package_is_none_of_the_users():
    config = get_config({"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}})
    assert explain_error(RuntimeError("a fault of ours"), config) is None


ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ENDLESS, "renders for more than 1 s"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ 'x' * 2000 }}", "renders 2,000 characters"),
    ],
)
def test_a_template_is_bounded_in_time_and_output(monkeypatch, template, expected):
    monkeypatch.setattr(render, "MAX_RENDER_S", 1.0)
    monkeypatch.setattr(render, "MAX_CHARACTERS", 1000)
    render._detect_quirks.cache_clear()
    conversation = read_conversation({"messages": chat("a", "b")})
    with pytest.raises(DataError, match=expected):
        render.Renderer(tiny_tokenizer(template)).render(conversation)


def test_a_damaged_gguf_header_is_refused(tmp_path):
    rng, file = random.Random(5), tmp_path / "m.gguf"
    for _ in range(300):
        length = rng.randrange(200)
        file.write_bytes(
            b"GGUF\3\0\0\0" + bytes(rng.choice(b"\0\1\4\x08\x09\xff") for _ in range(length))
        )
        try:
            read_header(file)
        except WeightError as error:
            assert "damaged" in str(error)


def test_a_flipped_bit_in_the_cache_is_not_served(tmp_path):
    cache, built = DataCache(tmp_path), []

    def build(folder):
        built.append(folder)
        (folder / "tokens").write_bytes(bytes(100))

    entry = cache.get({"a": "b"}, build).folder
    assert cache.get({"a": "b"}, build).folder == entry and len(built) == 1
    (entry / "tokens").write_bytes(bytes(50) + b"\1" + bytes(49))
    assert (cache.get({"a": "b"}, build).folder / "tokens").read_bytes() == bytes(100)
    assert len(built) == 2
    (entry / PARTS_FILE).write_text(json.dumps([]))
    cache.get({"a": "b"}, build)
    assert len(built) == 3


def test_control_characters_of_data_do_not_reach_the_terminal():
    evil = "a\x1b[2Jb\x9bc\r\nd\te"
    assert printable(evil) == "a\\x1b[2Jb\\x9bc\\x0d\nd\te"
    assert printable("a\ud800b\u202ec\u2066é") == "a\\ud800b\\u202ec\\u2066é"
    sample = Sample(evil, (Piece(evil, True, False),), 1, 1, 0)
    shown = format_sample(sample, in_colour=False)
    assert isinstance(shown, Text) and not {"\x1b", "\x9b", "\r"} & set(shown.plain)
