"""`optimizer.groups`: parameters with their own settings; the first group that matches counts."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import optax

from jaxtrain import registry
from jaxtrain.optimizer.moments import with_moments
from jaxtrain.optimizer.optimizers import OptimizerFactory, decay_mask
from jaxtrain.parallel.sharding import path_name
from jaxtrain.recipe.errors import Fault, RecipeError, show
from jaxtrain.recipe.optimizer import OptimizerConfig

REST, FROZEN = "rest", "frozen"
MAX_NAMES = 12  # of parameters in a message


@dataclass(frozen=True)
class Groups:
    """Assigns settings to each parameter, or freezes it."""

    config: OptimizerConfig
    shapes: Any
    labels: Any
    """`rest`, `frozen` or the number of the group, for each parameter"""

    @classmethod
    def of(cls, config: OptimizerConfig, shapes: Any) -> "Groups":
        """Matches the groups to parameters; RecipeError if one matches none or all are frozen."""
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
            Fault(f"optimizer.groups.{number}.match", _explain_no_match(group.match, names))
            for number, group in enumerate(config.groups)
            if not found[number]
        ]
        if set(jax.tree.leaves(labels)) == {FROZEN}:
            faults.append(Fault("optimizer.groups", "freeze every parameter; nothing is trained"))
        if faults:
            raise RecipeError(faults)
        return cls(config, shapes, labels)

    def optimizer(self, factory: OptimizerFactory) -> optax.GradientTransformation:
        """Builds one optimizer for all parameters, or one for each group."""
        # A user's optimizer keeps its own dtype unless the recipe sets one.
        is_ours = registry.is_built_in("optimizer", self.config.type)
        is_set = is_ours or "state_dtype" in self.config.model_fields_set
        dtype = self.config.state_dtype if is_set else None

        def build(config: OptimizerConfig) -> optax.GradientTransformation:
            return with_moments(factory.create_optimizer(self.trained(self.shapes), config), dtype)

        labels = set(jax.tree.leaves(self.labels))
        if labels == {REST}:
            return build(self.config)
        parts = {label: build(self._config_of(label)) for label in sorted(labels - {FROZEN})}
        # By a function, since an update may be of a part of the parameters.
        return optax.partition(parts, lambda params: _select(self.labels, params))

    @property
    def is_separable(self) -> bool:
        """Whether the optimizer treats every layer as if it were alone."""
        is_ours = registry.is_built_in("optimizer", self.config.type)
        return is_ours and self.config.state_dtype == "float32"  # bfloat16 is rounded by one draw

    def trained(self, tree: Any) -> Any:
        """A tree like the parameters', without what belongs to frozen ones."""
        return _without_frozen(tree, self.labels)

    def merge(self, params: Any, trained: Any) -> Any:
        """`params`, with those that are trained replaced by `trained`."""
        if not isinstance(params, dict):
            return trained
        return {
            name: self.merge(part, trained[name]) if name in trained else part
            for name, part in params.items()
        }

    def counts(self) -> Counter[str]:
        """Numbers of parameters that are decayed, not decayed, frozen."""
        counts: Counter[str] = Counter()
        leaves = (jax.tree.leaves(t) for t in (self.shapes, self.labels, decay_mask(self.shapes)))
        for leaf, label, may_decay in zip(*leaves, strict=True):
            decays = label != FROZEN and may_decay and self._config_of(label).weight_decay
            kind = FROZEN if label == FROZEN else "decayed" if decays else "not decayed"
            counts[kind] += math.prod(leaf.shape)
        return counts

    def _config_of(self, label: str) -> OptimizerConfig:
        """The optimizer section with the settings of one group."""
        if label == REST:
            return self.config
        group = self.config.groups[int(label)]
        decay = self.config.weight_decay if group.weight_decay is None else group.weight_decay
        rate = self.config.learning_rate * group.lr_scale
        return self.config.model_copy(update={"learning_rate": rate, "weight_decay": decay})


def _select(labels: Any, params: Any) -> Any:
    """The labels of these parameters."""
    if not isinstance(params, dict):
        return labels
    return {name: _select(labels[name], part) for name, part in params.items()}


def _without_frozen(tree: Any, labels: Any) -> Any:
    if not isinstance(labels, dict):
        return tree
    kept = {
        name: _without_frozen(tree[name], label)
        for name, label in labels.items()
        if label != FROZEN
    }
    return {name: part for name, part in kept.items() if not isinstance(part, dict) or part}


def _explain_no_match(match: str, names: list[str]) -> str:
    if any(re.search(match, name) for name in names):
        return f"every parameter that {show(match)} matches belongs to an earlier group"
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{show(match)} matches no parameter; there are {', '.join(names[:MAX_NAMES])}{more}"
