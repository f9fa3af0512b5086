"""Train language models in JAX from one YAML recipe.

Names are imported at first use, so that a recipe is checked without importing jax.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtrain.batch import Batch as Batch
    from jaxtrain.checkpoint import CheckpointEngine as CheckpointEngine
    from jaxtrain.data import DataFactory as DataFactory
    from jaxtrain.data import DataSource as DataSource
    from jaxtrain.data import SFTDataFactory as SFTDataFactory
    from jaxtrain.model import HFModelFactory as HFModelFactory
    from jaxtrain.model import ModelFactory as ModelFactory
    from jaxtrain.optimizer import OptimizerFactory as OptimizerFactory
    from jaxtrain.recipe.resolve import get_config as get_config
    from jaxtrain.recipe.trainer import TrainerConfig as TrainerConfig
    from jaxtrain.registry import register as register
    from jaxtrain.scheduler import SchedulerFactory as SchedulerFactory
    from jaxtrain.tokenizer import TokenizerFactory as TokenizerFactory
    from jaxtrain.trainer.callbacks import Callback as Callback
    from jaxtrain.trainer.callbacks import Control as Control
    from jaxtrain.trainer.loss import Loss as Loss
    from jaxtrain.trainer.sft import SFTTrainer as SFTTrainer
    from jaxtrain.trainer.trainer import Trainer as Trainer

# Tokenizers need no torch; without this, transformers tells everyone that it is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_HOME = {
    "jaxtrain.batch": ("Batch",),
    "jaxtrain.checkpoint": ("CheckpointEngine",),
    "jaxtrain.data": ("DataFactory", "DataSource", "SFTDataFactory"),
    "jaxtrain.model": ("HFModelFactory", "ModelFactory"),
    "jaxtrain.optimizer": ("OptimizerFactory",),
    "jaxtrain.recipe.checkpoint": ("CheckpointConfig",),
    "jaxtrain.recipe.data": ("DataConfig", "DataSourceConfig"),
    "jaxtrain.recipe.logger": ("LoggerConfig",),
    "jaxtrain.recipe.model": ("ModelConfig", "TokenizerConfig"),
    "jaxtrain.recipe.optimizer": ("OptimizerConfig",),
    "jaxtrain.recipe.resolve": ("get_config",),
    "jaxtrain.recipe.scheduler": ("SchedulerConfig",),
    "jaxtrain.recipe.trainer": ("TrainerConfig",),
    "jaxtrain.registry": ("register",),
    "jaxtrain.scheduler": ("SchedulerFactory",),
    "jaxtrain.tokenizer": ("TokenizerFactory",),
    "jaxtrain.trainer.callbacks": ("Callback", "Control"),
    "jaxtrain.trainer.loss": ("Loss",),
    "jaxtrain.trainer.sft": ("SFTTrainer",),
    "jaxtrain.trainer.trainer": ("Trainer", "TrainOutput"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'jaxtrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE[name]), name)
