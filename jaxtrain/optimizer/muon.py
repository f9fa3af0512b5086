"""Muon (Jordan et al. 2024), with the scale of Liu et al. 2025, arXiv:2502.16982: one learning rate
suits matrices and the parameters that adam updates."""

from typing import Any

import jax
import optax
from optax import GradientTransformation
from optax.contrib import MuonDimensionNumbers, muon

from jaxtrain.optimizer.optimizers import OptimizerFactory, decay_mask
from jaxtrain.recipe.optimizer import MuonConfig

MATRICES = {
    "qkv": MuonDimensionNumbers(1, (2, 3, 4)),
    "out": MuonDimensionNumbers((1, 2, 3), 4),
    "gate_up": MuonDimensionNumbers(1, 3),
    "down": MuonDimensionNumbers(1, 2),
}
"""Name of a stacked matrix → its input and output dimensions; the others, such as layers, index
separate matrices."""
RMS = 0.2  # of an update, about that of adamw


class MuonFactory(OptimizerFactory):
    name = "muon"
    config: MuonConfig

    def create_optimizer(self, model: Any, optimizer_config: MuonConfig) -> GradientTransformation:
        config = optimizer_config
        return optax.chain(
            muon(
                1.0,
                beta=config.momentum,
                eps=config.eps,
                nesterov=config.nesterov,
                adam_b1=config.betas[0],
                adam_b2=config.betas[1],
                muon_weight_dimension_numbers=matrix_dimensions,
                consistent_rms=RMS,
            ),
            # `muon` negates its updates; decay follows it, so its sign is negative.
            optax.add_decayed_weights(-config.weight_decay, decay_mask),
            optax.scale(config.learning_rate),
        )


def matrix_dimensions(params: Any) -> Any:
    """The dimension numbers of every stack of matrices; None for other parameters."""
    lookup = lambda path, _: MATRICES.get(str(path[-1].key))
    return jax.tree_util.tree_map_with_path(lookup, params)
