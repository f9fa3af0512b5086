"""Moments in eight bits: the numbers and the updates of bitsandbytes, and a run with them."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.optimizer.adamw_8bit import BLOCK, block_dims, decode, encode
from jaxtrain.parallel.sharding import parameter_shardings
from jaxtrain.plan import device_bytes
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.trainer.pieces import choose_apply_if
from jaxtrain.trainer.state import Moving, apply_if, optimizer_shardings, with_shardings
from tests.optimizer.test_groups import build
from tests.runs import assert_same, host, losses, mesh_of, model_folder, recipe, trainer

SIGNS = pytest.mark.parametrize("is_signed", [True, False], ids=["signed", "unsigned"])
KEYS = {"lr": 1e-2, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1}


@cache
def numbers(is_signed):
    """As Dettmers (2015, arXiv:1511.04561) defines them: 7 powers of ten, each with the centres of
    twice as many parts as the one below."""
    found = [0.0, 1.0]
    for k in range(7):
        edges = np.linspace(0.1, 1, 2**k * (1 if is_signed else 2) + 1)
        centres = 10.0 ** (k - 6) * (edges[1:] + edges[:-1]) / 2
        found += [*centres, *-centres] if is_signed else [*centres]
    return np.sort(found)


def bitsandbytes():
    pytest.importorskip("torch")
    return pytest.importorskip("bitsandbytes")


@SIGNS
@pytest.mark.parametrize("source", ["paper", "bitsandbytes"])
def test_codes_stand_for_the_published_numbers(is_signed, source):
    published = numbers(is_signed)
    if source == "bitsandbytes":
        published = bitsandbytes().functional.create_dynamic_map(signed=is_signed).numpy()
    assert len(published) == 256
    found = decode(jnp.arange(256, dtype=jnp.uint8), is_signed=is_signed)
    np.testing.assert_allclose(found, published, rtol=3e-7)


@SIGNS
def test_a_code_is_that_of_the_nearest_number(is_signed):
    table, rng = numbers(is_signed), np.random.default_rng(0)
    x = 10 ** rng.uniform(-8, 0, 100_000) * (rng.choice([-1, 1], 100_000) if is_signed else 1)
    x = np.concatenate([x, table, [1e-30, -1.0 if is_signed else 1.0]]).astype(np.float32)
    codes = np.asarray(encode(jnp.asarray(x), is_signed=is_signed))
    nearest = np.abs(table - x[:, None]).min(1)
    np.testing.assert_allclose(np.abs(table[codes] - x), nearest, rtol=1e-4, atol=1e-9)
    assert set(codes) == set(range(256)), "each is in use"


class Plain:
    """The update on one tensor, in numpy, with its entries in rows of blocks."""

    def __init__(self, tensor):
        self.tensor, self.moments, self.steps = tensor, [np.zeros_like(tensor)] * 2, 0

    def step(self, grad):
        (b1, b2), self.steps = KEYS["betas"], self.steps + 1
        mu, nu = self.moments
        mu, nu = b1 * mu + (1 - b1) * grad, b2 * nu + (1 - b2) * grad**2
        root = np.sqrt(nu / (1 - b2**self.steps)) + KEYS["eps"]
        self.tensor = self.tensor * (1 - KEYS["lr"] * KEYS["weight_decay"])
        self.tensor -= KEYS["lr"] * mu / (1 - b1**self.steps) / root
        self.moments = [self._round(mu, True), self._round(nu, False)]

    def _round(self, x, is_signed):
        table, blocks = numbers(is_signed), x.reshape(-1, BLOCK)
        scales = np.abs(blocks).max(1, keepdims=True)
        codes = np.searchsorted((table[1:] + table[:-1]) / 2, blocks / scales)
        return (table[codes] * scales).reshape(x.shape)


class Published:
    def __init__(self, tensor):
        self.torch = pytest.importorskip("torch")
        self.variable = self.torch.nn.Parameter(self.torch.tensor(tensor.copy()))
        self.optimizer = bitsandbytes().optim.AdamW8bit([self.variable], **KEYS)

    def step(self, grad):
        self.variable.grad = self.torch.tensor(grad)
        self.optimizer.step()

    @property
    def tensor(self):
        return self.variable.detach().numpy()


@pytest.mark.parametrize(("reference", "tolerance"), [(Plain, 1e-4), (Published, 1e-3)])
def test_its_updates_are_those_of_the_reference(reference, tolerance):
    """A stack of two matrices of 512 inputs and 48 outputs; blocks are of inputs, as there.

    Gradients are of one size, since on CPU bitsandbytes takes neighbours of the nearest codes, and
    never those below 2e-5."""
    rng = np.random.default_rng(0)
    path = lambda w: {"layers": {"0": {"0": {"mlp": {"down": jnp.asarray(w)}}}}}
    first = rng.normal(size=(2, 512, 48)).astype(np.float32)
    references = [reference(np.ascontiguousarray(w.T)) for w in first]
    runs = {}
    for kind in ("adamw_8bit", "adamw"):
        optimizer = build(kind, path(first), **KEYS)[1]
        runs[kind] = jax.jit(optimizer.update), optimizer.init(path(first)), path(first)
    for _ in range(20):
        grad = (np.sign(first) * rng.uniform(0.5, 2, size=first.shape)).astype(np.float32)
        for kind, (update, state, params) in runs.items():
            updates, state = update(path(grad), state, params)
            runs[kind] = update, state, optax.apply_updates(params, updates)
        for one, g in zip(references, grad, strict=True):
            one.step(np.ascontiguousarray(g.T))
    expected = np.stack([one.tensor.T for one in references])
    distance = lambda a: np.linalg.norm(a - expected) / np.linalg.norm(first - expected)
    off = {kind: distance(jax.tree.leaves(params)[0]) for kind, (*_, params) in runs.items()}
    assert off["adamw_8bit"] < tolerance < off["adamw"] / 3


@pytest.mark.parametrize(
    ("place", "shape", "dims"),
    [
        ("layers/0/0/attention/qkv", (2, 64, 4, 6, 16), (2, 3, 4)),
        ("layers/0/0/attention/out", (2, 4, 4, 16, 64), (1, 2, 3)),
        ("layers/0/0/mlp/gate_up", (2, 64, 2, 256), (3,)),
        ("layers/0/0/mlp/down", (2, 256, 64), (1,)),
        ("layers/0/0/mlp/expert_down", (2, 4, 256, 64), (2,)),
        ("layers/0/0/mlp/router", (2, 512, 8), (1, 2)),  # neighbours, where a row is too short
        ("layers/0/0/mlp/down_lora/down_proj/a", (2, 256, 16), (1, 2)),
        ("layers/0/0/mlp/down_lora/down_proj/b", (2, 16, 256), (1, 2)),
        ("head", (64, 1000), (1,)),
        ("layers/0/0/mlp_norm", (2, 4096), (1,)),
        ("layers/0/0/mlp_norm", (40, 4095), ()),  # fewer than 4096 of a layer
        ("embed/embedding", (1000, 512), ()),
        ("embed/layer_inputs", (1000, 2, 512), ()),
    ],
)
def test_blocks_lie_along_what_fsdp_does_not_cut(place, shape, dims):
    assert block_dims(place, shape) == dims


SHAPES = {
    "embed": {"embedding": (96, 64)},
    "head": (64, 1000),  # its last block is shorter
    "layers": {"0": {"0": {
        "attention": {"qkv": (4, 64, 4, 6, 32)},
        "mlp": {"down": (4, 512, 64)},
        "mlp_norm": (4, 64),
    }}},
}  # fmt: skip


def tree(seed):
    leaves, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return treedef.unflatten([jax.random.normal(key, shape) for key, shape in pairs])


def update_on(mesh, *, apply=None):
    """State after three updates on a mesh, and the compiled update."""
    params = tree(0)
    some, optimizer = build("adamw_8bit", params, **KEYS)
    places, moments = parameter_shardings(mesh, params), jax.eval_shape(optimizer.init, params)
    all_places = Moving(places, optimizer_shardings(mesh, optimizer, params, places), {})
    with_places = with_shardings(moments, all_places.opt_state)
    apply = apply or choose_apply_if(with_places, optimizer, some.is_separable)

    def update(moving, gradients):
        updates, moments = optimizer.update(gradients, moving.opt_state, moving.trained)
        return Moving(optax.apply_updates(moving.trained, updates), moments, {})

    def step(moving, gradients):
        return apply(jnp.bool_(True), update, moving, gradients)

    with jax.set_mesh(mesh):
        moving = jax.device_put(Moving(params, optimizer.init(params), {}), all_places)
        gradients = [jax.device_put(tree(seed), places) for seed in (1, 2, 3)]
        compiled = jax.jit(step, out_shardings=all_places).lower(moving, gradients[0]).compile()
        for one in gradients:
            moving = compiled(moving, one)
    return moving, compiled.as_text()


def test_neither_a_mesh_nor_the_order_of_layers_changes_an_update():
    """On a pipeline all layers are updated at once, elsewhere one after the other."""
    at_once = host(update_on(mesh_of(), apply=apply_if)[0])
    cut, text = update_on(mesh_of(fsdp=4))
    for moving in (cut, update_on(mesh_of(tensor=2, pipeline=2))[0]):
        for name, array in host(moving).items():
            if array.dtype == np.uint8:
                # The last bit of a moment may round to the other code.
                assert (array != at_once[name]).mean() < 1e-3, name
            else:
                np.testing.assert_allclose(array, at_once[name], rtol=2e-4, atol=1e-6, err_msg=name)
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
    layers = cut.opt_state[0].nu["layers"]["0"]["0"]
    assert layers["mlp"]["down"].scales.shape == (4, 2, 64)
    for leaf in jax.tree.leaves((layers["attention"], layers["mlp"])):
        assert leaf.addressable_shards[0].data.nbytes == leaf.nbytes / 4


def written(folder, kind="adamw_8bit", **changes):
    entry = {"output_dir": str(folder / "state"), "save_every_n_steps": 2, "auto_resume": True}
    changes["optimizer"] = {"type": kind, **changes.get("optimizer", {})}
    found = recipe(
        folder, checkpoint=[entry], gradient_accumulation_steps=2, micro_batch_size=2, **changes
    )
    model_folder(folder / "model", hidden_size=64, intermediate_size=256)
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = trainer(written(tmp_path_factory.mktemp("unbroken"), train_iters=32))
    return run, losses(run, 30)


@pytest.mark.covers("optimizer.type")
def test_a_run_learns_as_with_whole_moments(tmp_path, unbroken):
    run, found = unbroken
    whole = trainer(written(tmp_path, "adamw", train_iters=32))
    expected = np.array(losses(whole, 30))
    assert expected[-5:].mean() < 0.65 * expected[0]
    np.testing.assert_allclose(found, expected, rtol=0.005)
    sizes = {path: leaf.size for path, leaf in host(run.state.params).items()}
    rounded = sum(
        size for path, size in sizes.items() if "embed" not in path and "norm" not in path
    )
    bytes_of_rest = 8 * (sum(sizes.values()) - rounded)
    found = device_bytes(run.run.state_shapes.opt_state) - bytes_of_rest
    assert 2 * rounded < found < 2.05 * rounded
    assert device_bytes(whole.run.state_shapes.opt_state) > 8 * sum(sizes.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"groups": [{"match": "down|embed", "freeze": True}]}},
        pytest.param(
            {
                "model": {
                    "peft_config": {"peft_type": "Lora", "r": 64, "target_modules": "all-linear"}
                }
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["frozen", "adapters"],
)
def test_a_resumed_run_is_bitwise_the_unbroken_one(tmp_path, changes):
    whole = trainer(written(tmp_path / "whole", train_iters=4, **changes))
    whole.train()
    codes = [leaf for leaf in jax.tree.leaves(whole.state.opt_state) if leaf.dtype == jnp.uint8]
    assert codes and all(len(np.unique(leaf)) > 50 for leaf in codes)
    trainer(written(tmp_path, train_iters=4, exit_iteration=2, **changes)).train()
    again = trainer(written(tmp_path, train_iters=4, **changes))
    again.train()
    assert_same(again.state, host(whole.state))


def test_moments_of_another_dtype_are_refused():
    with pytest.raises(RecipeError, match="optimizer.state_dtype: bfloat16 contradicts eight bits"):
        build("adamw_8bit", {}, state_dtype="bf16")
