"""What the devices of a mesh tell each other in a step is what it takes, counted by hand, for a model
of L layers of four matrices each."""

import re
from collections import Counter
from math import prod

import jax
import pytest

from tests.compile_collectives import TINY, find_collectives, lower_step

L = TINY["num_hidden_layers"]
LARGE = 500  # entries, fewer than a device has of any matrix
GATHERS = 2 * 4 * L + 1
"""Of each matrix of a layer in the forward pass and again in the backward pass; of the head once."""
SCATTERS = 4 * L + 1
"""Of the gradient of each."""


# Sums over the tensor axis: after attention and after the MLP, of which the backward pass computes
# one again; of the gradients before both, and before the head; of the rows of the embedding.
TENSOR_SUMS = 5 * L + 2
# A stage computes its layers, of which one is padding, in two ticks, once more for the backward pass
# of a tick and once more for that of a layer; what is embedded is gathered over the stages.
RUNS = 2 * -(-L // 2)
ZERO_3 = {"deepspeed": {"zero_optimization": {"stage": 3}}}
MESHES = {
    "fsdp": (
        {"mesh": {"fsdp": 8}},
        {"all-gather": GATHERS, "reduce-scatter": SCATTERS, "all-reduce": 0},
    ),
    # Each sum is over two axes; the update makes the parts of six parameters, which all get then.
    "data": (
        {"mesh": {"data": 4, "fsdp": 2}},
        {"all-gather": GATHERS + 6, "reduce-scatter": 2 * SCATTERS, "all-reduce": 0},
    ),
    "tiles": (
        {"mesh": {"fsdp": 8}, "tokens": 512, "tiled_mlp_compute": True},
        {"all-gather": GATHERS, "reduce-scatter": SCATTERS, "all-reduce": 0},
    ),
    "tensor": (
        {"mesh": {"fsdp": 4, "tensor": 2}},
        {"all-gather": GATHERS, "reduce-scatter": SCATTERS, "all-reduce": TENSOR_SUMS},
    ),
    # A table of embeddings is gathered and summed as a matrix is; each sum is over two axes. Queries,
    # keys, values and what attention makes of them go to the devices of their heads, in four parts.
    "context": (
        {"mesh": {"context": 4, "fsdp": 2}, "tokens": 512, "tiled_mlp_compute": True, **ZERO_3},
        {
            "all-gather": GATHERS + 1,
            "reduce-scatter": 2 * (SCATTERS + 1),
            "all-reduce": 0,
            "all-to-all": 3 * 4 * L * 4,
        },
    ),
    "pipeline": (
        {"mesh": {"pipeline": 2, "fsdp": 4}},
        {"all-gather": 3 * 4 * RUNS + 2, "reduce-scatter": 4 * RUNS + 1},
    ),
}
CASES = [
    case if case != "pipeline" else pytest.param(case, marks=pytest.mark.slow) for case in MESHES
]


@pytest.fixture
def no_cache():
    """What is compiled is not kept, with which the compiler would have nothing to say."""
    key = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, key)
    jax.config.update(key, 1e9)
    yield
    jax.config.update(key, before)


@pytest.mark.parametrize("case", CASES)
def test_a_step_moves_what_it_takes(case, capfd, no_cache):
    written, expected = MESHES[case]
    compiled = lower_step(jax.devices(), dict(written)).compile()
    # Of what it weighs and does not choose, jax 0.12's compiler warns by a parameter that it fakes.
    said = [line for line in capfd.readouterr().err.splitlines() if "%fake_parameter" not in line]
    assert "full rematerialization" not in "".join(said)
    counts = Counter()
    for one in find_collectives(compiled.as_text()):
        if one.dtype == "f32" and prod(one.sizes) >= LARGE:
            counts[one.kind] += one.times
    assert {kind: counts[kind] for kind in expected} == expected, counts


def test_gradients_of_adapters_are_summed_in_float32():
    """Said in the program, since XLA on CPU computes any sum so. Of q, k, v, gate and up the first
    factors are shared as their inputs are, of out and down the second; of the others all is
    everywhere, and of v there is one beside the layers' norms."""
    peft = {"peft_type": "Lora", "r": 4, "target_modules": "all-linear"}
    model = {"peft_config": peft, "dtype": "bf16"}
    text = lower_step(jax.devices(), {"mesh": {"fsdp": 8}, "model": model}).as_text()
    found = {
        kind: re.findall(rf'"stablehlo.{kind}"(?s:.*?)\) : \(tensor<([^>]*)>', text)
        for kind in ("reduce_scatter", "all_reduce")
    }
    assert {kind: len(shapes) for kind, shapes in found.items()} == {
        "reduce_scatter": 5 + 2, "all_reduce": 2 + 5,
    }  # fmt: skip
    assert all(shape.endswith("f32") for shapes in found.values() for shape in shapes), found
