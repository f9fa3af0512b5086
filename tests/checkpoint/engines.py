"""An engine over a state of a few arrays, for tests that need no model."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.checkpoint import OrbaxEngine
from jaxtrain.checkpoint.compatibility import Identity
from jaxtrain.checkpoint.engine import Snapshot
from jaxtrain.metrics.console import Console
from jaxtrain.recipe.checkpoint import OrbaxConfig
from jaxtrain.trainer.state import TrainState, with_shardings


def state(step: int, size: int = 3) -> TrainState:
    """Arrays whose values follow from the step."""
    w = jax.random.normal(jax.random.key(step), (size, 4))
    return TrainState(jnp.int32(step), {"w": w, "b": w[0] > 0}, {}, {"mu": w.astype("bfloat16")})


class Run:
    """What an engine is compared by, and what it says."""

    def __init__(self):
        self.compatibility = {"type": "sft", "data.sources": ["a"], "optimizer.type": "adamw"}
        self.recipe = {"epochs": 1}
        self.allowed_changes = ()

    def identify(self):
        return Identity(self.compatibility, self.recipe, self.allowed_changes)

    def snapshot(self, step, size=3) -> Snapshot:
        metadata = {"step": step, "lineage": self.compatibility, "recipe": self.recipe}
        return Snapshot(step, state(step, size), metadata, lambda folder: folder)


def engine(folder, run=None, **config) -> OrbaxEngine:
    entry = OrbaxConfig(type="orbax", output_dir=str(folder), **config)
    made = OrbaxEngine(entry)
    made.run = run or Run()
    made.identify, made.say = made.run.identify, Console().line
    return made


def saved(folder, steps, *, size=3, **config) -> OrbaxEngine:
    """An engine that has saved these steps."""
    saver = engine(folder, **config)
    for step in steps:
        saver.save(saver.run.snapshot(step, size))
    saver.wait()
    return saver


def shapes(size: int = 3) -> TrainState:
    made = state(0, size)
    return with_shardings(jax.eval_shape(lambda: made), jax.tree.map(lambda a: a.sharding, made))


def assert_same(found: TrainState, step: int, size: int = 3) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, state(step, size))


def listed(folder):
    return sorted(int(p.name.removeprefix("global_step_")) for p in folder.glob("global_step_*"))
