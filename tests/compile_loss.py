"""Compile the chunked loss with both its gradients for one device that is not here; prints for each
number of tokens of a chunk what it takes.

    python tests/compile_loss.py h200 '{"tokens": 32768, "width": 2560, "chunks": [1024, 2048]}'

The environment is that of `compile_with` in test_ahead_of_time.py; other keys are `tied`, and `null`
among the chunks is what is chosen.
"""

import json
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.kernels.cross_entropy import weighted_nll
from tests.compile_ahead import TPUS, topology
from tests.compile_traffic import find_costs

V = 128256


def main(target: str, written: dict[str, Any]) -> None:
    T, D, tied = written["tokens"], written["width"], written.get("tied", False)
    devices = topology(target, TPUS.get(target, "")).devices[:1]
    mesh = Mesh(np.array(devices), "data", (AxisType.Auto,))
    shaped = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P()))
    arrays = (
        shaped((1, T, D), jnp.bfloat16), shaped((V, D) if tied else (D, V), jnp.float32),
        shaped((1, T), jnp.int32), shaped((1, T), jnp.float32),
    )  # fmt: skip
    for chunk in written["chunks"]:

        def loss(hidden, head, targets, weights, chunk=chunk):
            how = {"head_layout": "VD" if tied else "DV", "chunk_tokens": chunk}
            return weighted_nll(hidden, head.astype(jnp.bfloat16), targets, weights, **how).total

        with jax.set_mesh(mesh):
            lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays)
            compiled = lowered.compile()
        costs = list(find_costs(compiled.as_text()))
        products = sum(one.seconds for one in costs if one.work == "products")
        print(
            f"{target} {T} x {D}, chunks of {chunk}: "
            f"{compiled.memory_analysis().temp_size_in_bytes / 2**30:.2f} GiB of temporaries, "
            f"{sum(one.num_bytes for one in costs) / 1e9:.1f} GB moved, "
            f"{sum(one.cycles for one in costs) / 1e6:.1f} Mcycles, products {products * 1e3:.1f} ms, "
            f"all {sum(one.seconds for one in costs) * 1e3:.1f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
