"""Optimizers: optax transformations built from the `optimizer` section."""

from jaxtrain.optimizer.adafactor import AdafactorFactory as AdafactorFactory
from jaxtrain.optimizer.adamw_8bit import AdamW8bitFactory as AdamW8bitFactory
from jaxtrain.optimizer.groups import Groups as Groups
from jaxtrain.optimizer.moments import with_moments as with_moments
from jaxtrain.optimizer.muon import MuonFactory as MuonFactory
from jaxtrain.optimizer.optimizers import AdamWFactory as AdamWFactory
from jaxtrain.optimizer.optimizers import LionFactory as LionFactory
from jaxtrain.optimizer.optimizers import OptimizerFactory as OptimizerFactory
from jaxtrain.optimizer.optimizers import SGDFactory as SGDFactory
from jaxtrain.optimizer.optimizers import decay_mask as decay_mask

AnyOptimizerFactory = (
    AdamWFactory | AdafactorFactory | LionFactory | MuonFactory | SGDFactory | AdamW8bitFactory
)
