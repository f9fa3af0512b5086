"""Every optimizer of the recipe against its reference, matrix by matrix, on a whole small model.

The reference sees the tensors of a Hugging Face model: one for each layer, q, k, v, gate and up.
"""

from dataclasses import replace
from functools import cache, partial

import jax
import numpy as np
import optax
import pytest

from jaxtrain import registry
from jaxtrain.model.config import (
    ComputeConfig,
    DecoderConfig,
    Experts,
    Latent,
    LayerSpec,
    Norm,
    group_layers,
)
from jaxtrain.model.decoder import abstract, init_params, merge
from jaxtrain.model.export import to_hf_tensors
from jaxtrain.model.rope import Rope
from jaxtrain.model.tables import Layout
from jaxtrain.optimizer import Groups
from jaxtrain.optimizer.matrices import LAYOUTS, map_matrices
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import PARAMETERS, parameter_shardings
from jaxtrain.recipe.mesh import MeshConfig
from jaxtrain.recipe.resolve import get_config
from jaxtrain.trainer.state import optimizer_shardings
from tests.model.model_rows import batch_of, random_tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

UPDATES = 20
TOLERANCE = 1e-3  # of the distance that a tensor has moved: float32, another order of summation
CONFIG = DecoderConfig(
    family="qwen3_moe",
    vocab_size=96,
    width=8,
    num_heads=4,
    num_kv_heads=2,
    head_size=6,
    ffn_width=12,
    groups=group_layers(
        (LayerSpec(rope=Rope(1e4)),) * 9 + (LayerSpec(window=5, has_experts=True),)
    ),  # more layers than rows
    experts=Experts(count=3, per_token=2, width=10),
    norm=Norm(0.02),
    max_positions=64,
    qkv_bias=True,
    out_bias=True,
    qk_norm="head",
    initializer_range=0.1,
)


ROPE = Rope(1e4)
LATENT = replace(
    CONFIG,
    family="deepseek_v3",
    num_kv_heads=4,
    latent=Latent(q_rank=7, kv_rank=5, plain_size=3, value_size=9),
    qk_norm=None,
    experts=replace(CONFIG.experts, scores="sigmoid", has_choice_bias=True, shared_width=14),
    groups=group_layers(
        (LayerSpec(rope=ROPE, mixer="latent"),) * 9
        + (LayerSpec(rope=ROPE, mixer="latent", has_experts=True),)
    ),
)


class Torch:
    """A torch optimizer over named tensors, of which `decayed` shrink by `shrink` first."""

    def __init__(self, build, tensors, is_decayed, shrink=1.0):
        self.tensors = {name: torch.tensor(array) for name, array in tensors.items()}
        groups = [
            {"params": [t for n, t in self.tensors.items() if is_decayed(n) == decays], **settings}
            for decays, settings in ((True, {}), (False, {"weight_decay": 0.0}))
        ]
        self.optimizer = build([group for group in groups if group["params"]])
        self.decayed = [t for n, t in self.tensors.items() if is_decayed(n)]
        self.shrink = shrink

    def step(self, grads):
        for name, tensor in self.tensors.items():
            tensor.grad = torch.tensor(grads[name])
        torch._foreach_mul_(self.decayed, self.shrink)
        self.optimizer.step()

    def arrays(self):
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}


class Optax:
    """An optax optimizer over named arrays."""

    def __init__(self, optimizer, tensors):
        self.params, self.state = tensors, optimizer.init(tensors)

        @jax.jit
        def step(grads, state, params):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self._step = step

    def step(self, grads):
        grads = {name: grads[name] for name in self.params}
        self.params, self.state = self._step(grads, self.state, self.params)

    def arrays(self):
        return self.params


def is_decayed(name):
    return not name.endswith(("norm.weight", "bias"))


def is_hidden(name):
    return "_proj" in name and name.endswith("weight")


LR, DECAY, KEEP = 0.01, 0.1, 1 - 0.01 * 0.1
BETAS, EPS, MOMENTUM = (0.8, 0.95), 1e-6, 0.9


def adamw(tensors):
    build = partial(torch.optim.AdamW, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    return [Torch(build, tensors, is_decayed)]


def sgd(tensors, nesterov):
    build = partial(torch.optim.SGD, lr=LR, momentum=MOMENTUM, nesterov=nesterov)
    return [Torch(build, tensors, is_decayed, shrink=KEEP)]


def plain_sgd(tensors):
    return [Torch(partial(torch.optim.SGD, lr=LR), tensors, is_decayed, shrink=KEEP)]


def adafactor(tensors):
    given = {"lr": LR, "scale_parameter": False, "relative_step": False, "weight_decay": DECAY}
    return [Torch(partial(transformers.Adafactor, **given), tensors, is_decayed)]


def lion(tensors):
    mask = {name: is_decayed(name) for name in tensors}
    return [Optax(optax.lion(LR, *BETAS, weight_decay=DECAY, mask=mask), tensors)]


def muon(tensors, nesterov):
    hidden = {name: array for name, array in tensors.items() if is_hidden(name)}
    others = {name: array for name, array in tensors.items() if not is_hidden(name)}
    given = {"beta": MOMENTUM, "nesterov": nesterov, "consistent_rms": 0.2, "weight_decay": DECAY}
    return [Optax(optax.contrib.muon(LR, **given), hidden), *adamw(others)]


CASES = {
    "adamw": ("adamw", {"betas": BETAS, "eps": EPS}, adamw),
    "sgd": ("sgd", {}, plain_sgd),
    "sgd-momentum": ("sgd", {"momentum": MOMENTUM}, partial(sgd, nesterov=False)),
    "sgd-nesterov": ("sgd", {"momentum": MOMENTUM, "nesterov": True}, partial(sgd, nesterov=True)),
    "adafactor": ("adafactor", {}, adafactor),
    "lion": ("lion", {"betas": BETAS}, lion),
    "muon": (
        "muon",
        {"momentum": MOMENTUM, "nesterov": False, "betas": BETAS, "eps": EPS},
        partial(muon, nesterov=False),
    ),
    "muon-nesterov": (
        "muon",
        {"momentum": MOMENTUM, "nesterov": True, "betas": BETAS, "eps": EPS},
        partial(muon, nesterov=True),
    ),
}


def to_hf(config, tree):
    """A tensor for each matrix, by its Hugging Face name."""
    tensors = to_hf_tensors(jax.device_get(tree), config, "float32", Layout())
    return {name: tensor.make().copy() for name, tensor in tensors.items()}


@cache
def model_of(config):
    """First parameters, and the jitted gradient of a step; in one step, one layer has a spike."""
    graph, _ = abstract(config, ComputeConfig())
    params = jax.jit(partial(init_params, config, ComputeConfig()))(jax.random.key(0))

    @jax.jit
    def gradient(params, tokens, spike):
        batch = batch_of(np.zeros(tokens.shape, np.int32))._replace(tokens=tokens)
        loss = lambda p: merge(graph, p).weighted_nll(batch, batch.loss_weights).total
        grads = jax.grad(loss)(params)
        layers = grads["layers"]["0"]["0"]
        layers = jax.tree.map(lambda g: g.at[7].multiply(spike), layers)
        return grads | {"layers": grads["layers"] | {"0": {"0": layers}}}

    return params, gradient


@pytest.mark.parametrize(
    ("config", "case"),
    [
        *(pytest.param(CONFIG, case, id=case) for case in CASES),
        *(
            pytest.param(LATENT, case, id=f"latent-{case}", marks=pytest.mark.slow)
            for case in ("adafactor", "muon")
        ),
    ],
)
def test_an_optimizer_equals_its_reference_on_each_matrix(config, case):
    kind, keys, reference = CASES[case]
    (first, gradient), to_tensors = model_of(config), partial(to_hf, config)
    recipe = {"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}}
    settings = {"type": kind, "lr": LR, "weight_decay": DECAY, **keys}
    wanted = get_config(recipe | {"optimizer": settings}).optimizer
    factory = registry.find("optimizer", kind)(wanted)
    optimizer = Groups.of(wanted, jax.eval_shape(lambda: first)).optimizer(factory)

    @jax.jit
    def step(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state, before = first, optimizer.init(first), to_tensors(first)
    references = reference(before)
    for number in range(UPDATES):
        grads = gradient(params, random_tokens(2, 16, seed=number), 100.0 if number == 4 else 1.0)
        hf_grads = to_tensors(grads)
        params, state = step(grads, state, params)
        for one in references:
            one.step(hf_grads)
    found = to_tensors(params)
    expected = {name: np.asarray(a) for one in references for name, a in one.arrays().items()}
    assert found.keys() == expected.keys()
    far = {}
    for name, array in expected.items():
        moved, off = np.linalg.norm(array - before[name]), np.linalg.norm(found[name] - array)
        if off > TOLERANCE * moved:
            far[name] = off / moved
    assert not far


@pytest.mark.parametrize(("parent", "experts"), [("down", ()), ("expert_down", (6,))])
def test_a_factor_of_an_adapter_is_a_matrix_of_each_layer_and_expert(parent, experts):
    shapes = {"a": (2, *experts, 5, 4), "b": (2, *experts, 4, 3)}
    adapter = {name: np.zeros(shape) for name, shape in shapes.items()}
    tree = {"layers": {"0": {"0": {"mlp": {f"{parent}_lora": {"down_proj": adapter}}}}}}
    found = []
    map_matrices(lambda layout, _: found.append((layout.rows, layout.columns)), tree)
    rows = 1 + len(experts)
    assert found == [((rows,), (rows + 1,))] * 2


def test_every_matrix_that_has_a_place_has_a_layout():
    matrices = (place for place, axes in PARAMETERS if len(axes) > 1 and "_lora/" not in place)
    quantized = {"codes", "scales"}  # which stay frozen
    places = {place.rpartition("/")[2] for place in matrices} - quantized
    assert places <= LAYOUTS.keys()


@pytest.mark.parametrize("kind", ["adafactor", "muon"])
def test_a_mesh_changes_no_update(kind):
    params = jax.jit(partial(init_params, CONFIG, ComputeConfig()))(jax.random.key(0))
    recipe = {"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}}
    config = get_config(recipe | {"optimizer": {"type": kind, "lr": LR}}).optimizer
    shapes = jax.eval_shape(lambda: params)
    factory = registry.find("optimizer", kind)(config)
    optimizer = Groups.of(config, shapes).optimizer(factory)

    def update(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    def after_two(update, params, state):
        for _ in range(2):
            params, state = update(params, state)
        return params

    alone = after_two(jax.jit(update), params, optimizer.init(params))
    sizes = MeshConfig(data=1, fsdp=2, tensor=2, pipeline=2)
    mesh = make_mesh(sizes, jax.devices()[:8])
    placed = parameter_shardings(mesh, shapes)
    state_placed = optimizer_shardings(mesh, optimizer, shapes, placed)
    spread = jax.device_put(params, placed)
    with jax.set_mesh(mesh):
        state = jax.jit(optimizer.init, out_shardings=state_placed)(spread)
        found = after_two(jax.jit(update, out_shardings=(placed, state_placed)), spread, state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    big = {leaf.shape for leaf in jax.tree.leaves(shapes) if len(leaf.shape) > 2}
    for leaf in jax.tree.leaves(state):
        if leaf.shape in big:
            assert leaf.addressable_shards[0].data.size <= leaf.size // 2
