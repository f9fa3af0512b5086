"""Optimizers: optax transformations, made from the `optimizer` section."""

from jaxtrain.optimizer.adamw import AdamWFactory as AdamWFactory
from jaxtrain.optimizer.factory import OptimizerFactory as OptimizerFactory
from jaxtrain.optimizer.factory import decayed as decayed
