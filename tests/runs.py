"""Small runs for tests: a model folder without weights, conversations of uneven length, a
recipe."""

import json
import os
import random
import socket
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain import Batch, Loss, SFTTrainer, get_config
from jaxtrain.metrics.writer import read_rows
from jaxtrain.parallel.mesh import first_devices, make_mesh
from jaxtrain.recipe.mesh import MeshConfig
from jaxtrain.trainer import step as pure
from tests.tiny import TEXTS, tiny_tokenizer

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 384, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "attention_bias": False, "mlp_bias": False, "initializer_range": 0.1,
}  # fmt: skip


def model_folder(folder: Path, **config: Any) -> Path:
    """A Hugging Face folder with config and tokenizer, and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | config))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def conversations(file: Path, count: int, *, seed: int = 0) -> Path:
    """Rows of `messages` with very different lengths and shares of trained tokens."""
    rng = random.Random(seed)
    words = " ".join(TEXTS).split()
    say = lambda most: " ".join(rng.choices(words, k=rng.randint(1, most)))
    with file.open("w") as stream:
        for _ in range(count):
            turns = [("user", say(12)), ("assistant", say(12))] * rng.randint(1, 2)
            messages = [{"role": role, "content": text} for role, text in turns]
            stream.write(json.dumps({"messages": messages}) + "\n")
    return file


def recipe(folder: Path, *, rows: int = 64, **changes: Any) -> dict[str, Any]:
    """A recipe over files in `folder`; dicts among `changes` are merged into the sections."""
    model_folder(folder / "model")
    conversations(folder / "rows.jsonl", rows)
    base: dict[str, Any] = {
        "model": {"name_or_path": str(folder / "model"), "from_scratch": True},
        "data": {
            "sources": [str(folder / "rows.jsonl")], "max_length": 128, "pack_samples": True,
            "num_proc": 1,
        },
        "optimizer": {"lr": 1e-2},
        "train_iters": 4,
        "run_dir": str(folder / "run"),
    }  # fmt: skip
    for key, value in changes.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    return base


def trainer(written: Any, *, devices: int = 1, cls: type = SFTTrainer, **given: Any) -> Any:
    return cls(get_config(written), devices=jax.devices()[:devices], **given)


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    """A mesh of the first devices, as many as it takes."""
    return make_mesh(MeshConfig(**{"data": 1} | sizes), first_devices(prod(sizes.values())))


def environment(*, devices: int = 1, **variables: str) -> dict[str, str]:
    """That of the tests for a process of its own, which sees so many devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags} | variables


PROCESS = """
import json, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from jaxtrain import SFTTrainer, get_config
from tests.runs import losses
run = SFTTrainer(get_config(json.loads(sys.argv[3])))
"""


def in_two_processes(program: str, written: dict[str, Any], *, devices: int = 1) -> list[str]:
    """What each of two processes of one run prints; `program` has its trainer as `run`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    own = environment(devices=devices, PYTHONPATH=str(Path(__file__).parents[1]))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS + program, address, str(index), json.dumps(written)],
            env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    found = [process.communicate(timeout=300) for process in processes]
    for process, (_, err) in zip(processes, found, strict=True):
        assert process.returncode == 0, err[-3000:]
    return [out for out, _ in found]


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Every row of the metrics of the run in `folder`."""
    return read_rows(folder / "run" / "train-log-metrics.jsonl")


def first_batch(run: Any) -> Batch:
    return run.layout.on_devices(next(run.data.train_batches(0, 1)))


def loss_and_gradients(run: Any) -> tuple[Loss, Any]:
    """Of the first batch."""
    differentiate = lambda s, b: pure.grads(run.step_spec, s.params, s.frozen, b, jax.random.key(0))
    with jax.set_mesh(run.mesh):
        return jax.jit(differentiate)(run.state, first_batch(run))


def losses(trainer: Any, steps: int) -> list[float]:
    """Loss of each of the first updates."""
    found = []
    for batch in trainer.data.train_batches(0, steps):
        trainer.state, metrics = trainer.step(trainer.state, trainer.layout.on_devices(batch))
        found.append(metrics["loss"])
    return [float(loss) for loss in found]


def host(tree: Any) -> dict[str, np.ndarray]:
    """Path → array on the host."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same(found: Any, expected: dict[str, np.ndarray]) -> None:
    """Every array of a tree is, bit for bit, that of `host`."""
    arrays = host(found)
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
