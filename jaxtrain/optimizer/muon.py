"""Muon (Jordan et al. 2024; the scale of Liu et al. 2025, arXiv:2502.16982, so that one rate suits
both parts)."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from jaxtrain.optimizer.factory import OptimizerFactory, decayed
from jaxtrain.recipe.optimizer import MuonConfig

MATRICES = {
    "qkv": MuonDimensionNumbers(1, (2, 3, 4)),
    "out": MuonDimensionNumbers((1, 2, 3), 4),
    "gate_up": MuonDimensionNumbers(1, 3),
    "down": MuonDimensionNumbers(1, 2),
}
"""Name of a stacked matrix → the dimensions of its input and output; the others, layers first, are
matrices apart."""
RMS = 0.2  # of an update, which is about that of adamw


class MuonFactory(OptimizerFactory):
    name = "muon"
    config: MuonConfig

    def create_optimizer(
        self, model: Any, optimizer_config: MuonConfig
    ) -> optax.GradientTransformation:
        config = optimizer_config
        return optax.chain(
            muon(
                1.0,
                beta=config.momentum,
                eps=config.eps,
                nesterov=config.nesterov,
                adam_b1=config.betas[0],
                adam_b2=config.betas[1],
                muon_weight_dimension_numbers=matrices,
                consistent_rms=RMS,
            ),
            # `muon` has turned the sign already.
            optax.add_decayed_weights(-config.weight_decay, decayed),
            optax.scale(config.learning_rate),
        )


def matrices(params: Any) -> Any:
    """The dimension numbers of every parameter that is a stack of matrices; None for the others."""

    def one(path: tuple[Any, ...], _: Any) -> MuonDimensionNumbers | None:
        return MATRICES.get(str(path[-1].key))

    return jax.tree_util.tree_map_with_path(one, params)
