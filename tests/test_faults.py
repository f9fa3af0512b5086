"""What the machine, a template or the user's code raises is one message with its exit code."""

import json
import random

import jax.numpy as jnp
import pytest
from rich.text import Text

from jaxtrain.cli import explain_error
from jaxtrain.data import render
from jaxtrain.data.cache import PARTS_FILE, DataCache
from jaxtrain.data.command import Piece, Sample, format_sample
from jaxtrain.data.conversation import read_conversation
from jaxtrain.gguf_file import read_header
from jaxtrain.recipe.errors import DataError, WeightError, printable
from jaxtrain.recipe.resolve import get_config
from tests.runs import recipe
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


LARGE = """
import jax.numpy as jnp
from jaxtrain import SFTTrainer

class Large(SFTTrainer):
    name = "large"

    def post_init_callback(self):
        jnp.zeros((10**14,)).block_until_ready()
"""


def too_large(folder, base, monkeypatch):
    (folder / "train.py").write_text(LARGE)
    base["type"] = "large"


RAISED = {
    "device": (no_device, 1, "no device: JAX_PLATFORMS=cuda cannot be used here"),
    "run folder": (below_a_file, 2, "Not a directory"),
    "loss": (mean, 1, "loss_fn returned"),
    "memory": (too_large, 4, "lower micro_batch_size"),
}


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


def test_memory_of_a_device_that_does_not_suffice_names_batch_and_keys():
    config = get_config({"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}})
    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED") as raised:
        jnp.zeros((10**14,)).block_until_ready()
    error = explain_error(raised.value, config)
    assert error is not None and error.exit_code == 4
    for part in ("bytes", "1 sequences of", "micro_batch_size", "model.remat: full", "mesh.fsdp"):
        assert part in str(error)
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
