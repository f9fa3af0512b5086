"""Parameters with settings of their own: `optimizer.groups`, of which the first that matches
counts."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtrain import registry
from jaxtrain.optimizer.factory import OptimizerFactory, decayed
from jaxtrain.optimizer.moments import with_moments
from jaxtrain.parallel.sharding import path_name
from jaxtrain.recipe.errors import Fault, RecipeError, show
from jaxtrain.recipe.optimizer import OptimizerConfig

REST, FROZEN = "rest", "frozen"
NAMED = 12  # parameters that a message lists


@dataclass(frozen=True)
class Groups:
    """Which parameters are trained, and with which settings."""

    config: OptimizerConfig
    shapes: Any
    labels: Any
    """for each parameter `rest`, `frozen` or the number of its group"""

    @classmethod
    def of(cls, config: OptimizerConfig, shapes: Any) -> "Groups":
        """RecipeError for a group without a parameter, and when nothing is left to train."""
        found: Counter[int] = Counter()

        def label(path: tuple[Any, ...], _: Any) -> str:
            name = path_name(path)
            for number, group in enumerate(config.groups):
                if re.search(group.match, name):
                    found[number] += 1
                    return FROZEN if group.freeze else str(number)
            return REST

        labels = jax.tree_util.tree_map_with_path(label, shapes)
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
        faults = [
            Fault(f"optimizer.groups.{number}.match", _unmatched(group.match, names))
            for number, group in enumerate(config.groups)
            if not found[number]
        ]
        if set(jax.tree.leaves(labels)) == {FROZEN}:
            faults.append(Fault("optimizer.groups", "freeze every parameter; nothing is trained"))
        if faults:
            raise RecipeError(faults)
        return cls(config, shapes, labels)

    def optimizer(self, factory: OptimizerFactory) -> optax.GradientTransformation:
        """One optimizer of the factory for all parameters, or one for each group."""
        # An optimizer of the user may have a dtype of its own in mind.
        is_ours = registry.is_built_in("optimizer", self.config.type)
        is_said = is_ours or "state_dtype" in self.config.model_fields_set
        dtype = self.config.state_dtype if is_said else None

        def made(config: OptimizerConfig) -> optax.GradientTransformation:
            return with_moments(factory.create_optimizer(self.shapes, config), dtype)

        labels = set(jax.tree.leaves(self.labels))
        if labels == {REST}:
            return made(self.config)
        parts = {label: made(self._settings(label)) for label in sorted(labels - {FROZEN})}
        if FROZEN in labels:
            parts[FROZEN] = optax.stateless(_nothing)
        return optax.partition(parts, self.labels)

    def held(self, params: Any) -> Any:
        """The same parameters, of which the frozen ones have no gradient."""
        stop = jax.lax.stop_gradient
        return jax.tree.map(lambda p, x: stop(p) if x == FROZEN else p, params, self.labels)

    def counts(self) -> Counter[str]:
        """Numbers of parameters that are decayed, not decayed, frozen."""
        counts: Counter[str] = Counter()
        leaves = (jax.tree.leaves(t) for t in (self.shapes, self.labels, decayed(self.shapes)))
        for leaf, label, may_decay in zip(*leaves, strict=True):
            decays = label != FROZEN and may_decay and self._settings(label).weight_decay
            kind = FROZEN if label == FROZEN else "decayed" if decays else "not decayed"
            counts[kind] += math.prod(leaf.shape)
        return counts

    def _settings(self, label: str) -> OptimizerConfig:
        """The section as it stands for one group."""
        if label == REST:
            return self.config
        group = self.config.groups[int(label)]
        decay = self.config.weight_decay if group.weight_decay is None else group.weight_decay
        rate = self.config.learning_rate * group.lr_scale
        return self.config.model_copy(update={"learning_rate": rate, "weight_decay": decay})


def _nothing(grads: Any, params: Any) -> Any:
    # Zeros with a sign: -0.0 + 0.0 would be another weight, bit for bit.
    return jax.tree.map(lambda g: jnp.full_like(g, -0.0), grads)


def _unmatched(match: str, names: list[str]) -> str:
    if any(re.search(match, name) for name in names):
        return f"every parameter that {show(match)} matches belongs to a group above"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{show(match)} matches no parameter; there are {', '.join(names[:NAMED])}{more}"
