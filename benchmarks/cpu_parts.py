"""Where a training step on CPU spends its time, beside torch, part by part.

    python benchmarks/cpu_parts.py                 SmolLM2-135M shape, 2 x 512, float32
    python benchmarks/cpu_parts.py --dtype bf16    the same in bfloat16; autocast in torch

The model and the settings of `cpu_step.py`, each part alone: the layers with the embedding forward,
their backward pass, head and loss with their gradients, and AdamW. Each side is a process of its
own, in turn. Of the layers' backward pass of jaxtrain it is known only with the forward pass, which
is subtracted. Prints the median of the calls, GFLOP/s where products are most of a part, counted
without what is computed twice, and GB/s of AdamW: of parameters and two moments read and written,
and of gradients read.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cpu_step import COMMON, DTYPES, PRESETS, write_inputs

PRESET = PRESETS["smollm2-135m"]
PARTS = ("layers forward", "layers backward", "head and loss", "AdamW")
OWN = {"jaxtrain": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, "torch": {}}
"""As the command line of jaxtrain has it."""


def count_work() -> dict[str, float]:
    """GFLOP of a part, GB of AdamW."""
    c, tokens, T = PRESET["config"], PRESET["rows"] * PRESET["tokens"], PRESET["tokens"]
    D, F, H = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    N, K, L = c["num_attention_heads"], c["num_key_value_heads"], c["num_hidden_layers"]
    weights = L * (2 * D * N * H + 2 * D * K * H + 3 * D * F)
    head = D * c["vocab_size"]
    forward = 2 * tokens * weights + L * tokens * 2 * T * N * H  # half of the pairs are hidden
    return {
        "layers forward": forward / 1e9,
        "layers backward": 2 * forward / 1e9,
        "head and loss": 6 * tokens * head / 1e9,
        "AdamW": 7 * 4 * (weights + head) / 1e9,
    }


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each; every round makes every call once, the first one is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def measure_jaxtrain(dtype: str, rounds: int) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxtrain import Batch, SFTTrainer, get_config

    with tempfile.TemporaryDirectory() as name:
        recipe = write_inputs(Path(name), PRESET | {"dtype": dtype}, steps=1)
        run = SFTTrainer(get_config(recipe), mode="plan").run
    shape = PRESET["rows"], PRESET["tokens"]
    tokens = np.random.default_rng(0).integers(0, 2000, shape, np.int32)
    positions, ones = np.indices(shape, np.int32)[1], np.ones(shape, np.int32)
    batch = jax.device_put(Batch(tokens, positions, ones, ones.astype(np.float32), ones[:, 0]))
    with jax.set_mesh(run.mesh):
        params = run.first_params(None)
        hidden = jax.jit(lambda params: run.model.merge(params).hidden(batch))
        loss = lambda params, x: run.model.merge(params).weighted_nll(
            batch, batch.loss_weights, hidden_BTD=x
        )
        head = jax.jit(jax.grad(lambda *given: loss(*given).total, argnums=(0, 1)))
        x_BTD = jax.block_until_ready(hidden(params))
        both = jax.jit(lambda params, d_x: jax.vjp(hidden, params)[1](d_x))

        def update(params, moments, gradients):
            updates, moments = run.optimizer.update(gradients, moments, params)
            return optax.apply_updates(params, updates), moments

        state = [jax.tree.map(jnp.copy, params), run.optimizer.init(params)]
        gradients, adamw = jax.tree.map(jnp.copy, params), jax.jit(update, donate_argnums=(0, 1))

        def step() -> None:
            state[:] = jax.block_until_ready(adamw(*state, gradients))

        found = measure(
            {
                "layers forward": lambda: jax.block_until_ready(hidden(params)),
                "both": lambda: jax.block_until_ready(both(params, x_BTD)),
                "head and loss": lambda: jax.block_until_ready(head(params, x_BTD)),
                "AdamW": step,
            },
            rounds,
        )
    return {"layers backward": found.pop("both") - found["layers forward"], **found}


def measure_torch(dtype: str, rounds: int) -> dict[str, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**(COMMON | PRESET["config"])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    ids = torch.randint(0, 2000, (PRESET["rows"], PRESET["tokens"]))
    kept = {}

    def forward() -> None:
        with autocast:
            kept["x"] = model.model(input_ids=ids, use_cache=False).last_hidden_state

    def backward() -> None:
        kept["x"].backward(torch.ones_like(kept["x"]))

    def head() -> None:
        x = kept["x"].detach().requires_grad_()
        with autocast:
            logits = model.lm_head(x)
            loss = model.loss_function(logits, ids, vocab_size=logits.shape[-1])
        loss.backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    calls = (forward, backward, head, step)
    return measure(dict(zip(PARTS, calls, strict=True)), rounds)


SIDES = {"jaxtrain": measure_jaxtrain, "torch": measure_torch}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--calls", type=int, default=5, help="of each part in a process")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(SIDES[args.side](DTYPES[args.dtype], args.calls)))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side, rounds in found.items():
            command = [sys.executable, __file__, "--side", side, "--dtype", args.dtype]
            done = subprocess.run(
                [*command, "--calls", str(args.calls)],
                env=os.environ | {"JAX_PLATFORMS": "cpu"} | OWN[side],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
    for part, work in count_work().items():
        unit = "GB/s" if part == "AdamW" else "GFLOP/s"
        line = f"{part:16}"
        for side, rounds in found.items():
            seconds = statistics.median(one[part] for one in rounds)
            line += f"  {side} {seconds:6.3f} s {work / seconds:6.1f} {unit:7}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
