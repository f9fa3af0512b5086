"""What a step costs beside its arithmetic: compilation and dispatch, by the number of layers.

    python benchmarks/step_overhead.py                  12, 24, 48 and 96 layers, CPU

A tiny model on one device, one sequence of 64 tokens. Prints for each number of layers the seconds
of tracing, lowering and compiling the step (no cache, the first process that compiles anything is
not measured), and the milliseconds that a call of the compiled step takes until it returns, the
median of 200 on an idle device. Layers are stacked, so neither is to grow with their number.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from cpu_step import write_inputs

from jaxtrain import Batch, SFTTrainer, get_config

TOKENS, CALLS = 64, 200
CONFIG = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 2048, "tie_word_embeddings": True,
}  # fmt: skip


def measure(layers: int) -> dict[str, float]:
    preset = {
        "config": CONFIG | {"num_hidden_layers": layers}, "rows": 1, "tokens": TOKENS,
        "dtype": "float32", "remat": "full",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        trainer = SFTTrainer(
            get_config(write_inputs(Path(name), preset, steps=1)), "plan", devices=jax.devices()[:1]
        )
    run, shape = trainer.run, (1, 1, TOKENS)
    tokens = np.random.default_rng(0).integers(0, 2000, shape, np.int32)
    positions, ones = np.indices(shape, np.int32)[2], np.ones(shape, np.int32)
    batch = Batch(tokens, positions, ones, ones.astype(np.float32), ones[..., 0])
    batch = jax.device_put(batch, trainer.layout.batch_shardings)
    state = run.first_state(run.first_params(None))
    times = [time.perf_counter()]
    with jax.set_mesh(run.mesh):
        traced = trainer.step._jit(run).trace(state, batch)
        times.append(time.perf_counter())
        lowered = traced.lower()
        times.append(time.perf_counter())
        lowered.compile()
        times.append(time.perf_counter())
    seconds = [end - begin for begin, end in itertools.pairwise(times)]
    calls = []
    for _ in range(CALLS):
        jax.block_until_ready(state)
        began = time.perf_counter()
        state, _ = trainer.step(state, batch)
        calls.append(time.perf_counter() - began)
    found = dict(zip(("trace_s", "lower_s", "compile_s"), seconds, strict=True))
    return {**found, "dispatch_ms": 1e3 * statistics.median(calls[2:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48, 96])
    jax.config.update("jax_enable_compilation_cache", False)
    measure(2)  # what a process does once
    for layers in parser.parse_args().layers:
        found = measure(layers)
        print(
            f"{layers:4} layers  {' '.join(f'{k} {v:.2f}' for k, v in found.items())}", flush=True
        )


if __name__ == "__main__":
    sys.exit(main())
