"""The base class of optimizer factories."""

from typing import Any

import jax
import optax

from jaxtrain.recipe.optimizer import OptimizerConfig
from jaxtrain.registry import Factory


class OptimizerFactory(Factory, kind="optimizer"):
    events = {"create-optimizer": "create_optimizer"}
    config: OptimizerConfig

    def create_optimizer(self, model: Any, optimizer_config: Any) -> optax.GradientTransformation:
        """Returns an optax transformation at the peak learning rate; the training step multiplies
        its updates by the schedule.

        `model` is the tree of the trained parameters' shapes.
        """
        raise NotImplementedError(
            f"{type(self).__qualname__} defines no create_optimizer(model, optimizer_config)"
        )


def decay_mask(params: Any) -> Any:
    """True for each parameter that weight decay applies to: all but norms and biases."""

    def is_decayed(path: tuple[Any, ...], _: Any) -> bool:
        return not str(path[-1].key).endswith(("norm", "bias"))

    return jax.tree_util.tree_map_with_path(is_decayed, params)
