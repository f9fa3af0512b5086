"""An engine over a state of a few arrays, for tests that need no model."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.checkpoint import OrbaxEngine
from jaxtrain.metrics.console import Console
from jaxtrain.recipe.checkpoint import OrbaxConfig
from jaxtrain.trainer.state import TrainState, with_shardings


def state(step: int, size: int = 3) -> TrainState:
    """Arrays whose values follow from the step."""
    w = jax.random.normal(jax.random.key(step), (size, 4))
    return TrainState(jnp.int32(step), {"w": w, "b": w[0] > 0}, {}, {"mu": w.astype("bfloat16")})


class Run:
    """What an engine asks of a trainer."""

    def __init__(self):
        self.console = Console()
        self.allowed_changes = ()
        self.compatibility = {"type": "sft", "data.sources": ["a"], "optimizer.type": "adamw"}
        self.recipe = {"epochs": 1}
        self.at(0)

    def at(self, step, size=3):
        self.global_step = step
        self.state = state(step, size)

    @property
    def metadata(self):
        return {"step": self.global_step, "lineage": self.compatibility, "recipe": self.recipe}


def engine(folder, **config) -> OrbaxEngine:
    entry = OrbaxConfig(type="orbax", output_dir=str(folder), **config)
    return OrbaxEngine(entry, Run())


def saved(folder, steps, *, size=3, **config) -> OrbaxEngine:
    """An engine that has saved these steps."""
    saver = engine(folder, **config)
    for step in steps:
        saver.trainer.at(step, size)
        saver.save(None)
    saver.wait()
    return saver


def shapes(size: int = 3) -> TrainState:
    made = state(0, size)
    return with_shardings(jax.eval_shape(lambda: made), jax.tree.map(lambda a: a.sharding, made))


def assert_same(found: TrainState, step: int, size: int = 3) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, state(step, size))


def listed(folder):
    return sorted(int(p.name.removeprefix("global_step_")) for p in folder.glob("global_step_*"))
