"""Compile attention, forward and backward, on rows of 8192 tokens for a named target; prints for each
case, as JSON, the bytes of temporaries and the kernels that the lowered program holds."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.kernels.attention import Scoring, TokenPositions, attention
from tests.compile_ahead import GPUS, KERNELS, TPUS, topology

T, N, K = 8192, 16, 4
CASES = {
    "64": (64, jnp.bfloat16, {}),
    "128": (128, jnp.bfloat16, {}),
    "256": (256, jnp.bfloat16, {}),
    "64, float32": (64, jnp.float32, {}),
    "128, float32": (128, jnp.float32, {}),
    "256, float32": (256, jnp.float32, {}),
    "96, window": (96, jnp.bfloat16, {"window": 1000}),
    "256, soft cap and window": (256, jnp.bfloat16, {"softcap": 50.0, "window": 4096}),
    "64, sinks and window": (64, jnp.bfloat16, {"window": 128}),
}


def main(target: str) -> None:
    devices = topology(target, TPUS.get(target, "")).devices[:1]
    mesh = Mesh(np.array(devices), "data", (AxisType.Auto,))
    here = NamedSharding(mesh, P())
    on_device = partial(jax.ShapeDtypeStruct, sharding=here)
    found = {}
    for case, (H, dtype, rule) in CASES.items():
        if target in TPUS and H % 64:
            continue
        q, kv = on_device((1, T, N, H), dtype), on_device((1, T, K, H), dtype)
        places = TokenPositions(*[on_device((1, T), jnp.int32)] * 2)
        sinks = on_device((N,), jnp.float32) if "sinks" in case else None

        def pull(q, k, v, sinks, places, d_out, rule=rule, H=H):
            attend = partial(
                attention, q_positions=places, kv_positions=places,
                implementation="triton" if target in GPUS else "splash",
                scoring=Scoring(H**-0.5, **rule),
            )  # fmt: skip
            run = lambda q, k, v, sinks: attend(q, k, v, sinks_N=sinks)
            out, back = jax.vjp(run, q, k, v, sinks)
            return out, back(d_out)

        with jax.set_mesh(mesh):
            lowered = jax.jit(pull).lower(q, kv, kv, sinks, places, q)
            text = lowered.as_text()
            found[case] = {
                "temporaries": lowered.compile().memory_analysis().temp_size_in_bytes,
                "kernels": {
                    name: text.count(call) for name, call in KERNELS.items() if call in text
                },
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
