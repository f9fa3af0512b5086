"""Optimizers: optax transformations, made from the `optimizer` section."""

from jaxtrain.optimizer.adafactor import AdafactorFactory as AdafactorFactory
from jaxtrain.optimizer.adamw import AdamWFactory as AdamWFactory
from jaxtrain.optimizer.factory import OptimizerFactory as OptimizerFactory
from jaxtrain.optimizer.factory import decayed as decayed
from jaxtrain.optimizer.groups import Groups as Groups
from jaxtrain.optimizer.lion import LionFactory as LionFactory
from jaxtrain.optimizer.muon import MuonFactory as MuonFactory
from jaxtrain.optimizer.sgd import SGDFactory as SGDFactory
