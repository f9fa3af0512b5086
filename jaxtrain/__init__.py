"""Train language models in JAX from one YAML recipe.

Names are imported at first use, so that a recipe is checked without importing jax.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtrain.batch import Batch as Batch
    from jaxtrain.checkpoint import CheckpointEngine as CheckpointEngine
    from jaxtrain.checkpoint import HFCheckpointEngine as HFCheckpointEngine
    from jaxtrain.data import CausalDataFactory as CausalDataFactory
    from jaxtrain.data import DataFactory as DataFactory
    from jaxtrain.data import DataSource as DataSource
    from jaxtrain.data import SFTDataFactory as SFTDataFactory
    from jaxtrain.data.preference import DPODataFactory as DPODataFactory
    from jaxtrain.model import HFModelFactory as HFModelFactory
    from jaxtrain.model import ModelFactory as ModelFactory
    from jaxtrain.optimizer import OptimizerFactory as OptimizerFactory
    from jaxtrain.recipe.checkpoint import CheckpointConfig as CheckpointConfig
    from jaxtrain.recipe.data import DataConfig as DataConfig
    from jaxtrain.recipe.data import DataSourceConfig as DataSourceConfig
    from jaxtrain.recipe.logger import LoggerConfig as LoggerConfig
    from jaxtrain.recipe.model import ModelConfig as ModelConfig
    from jaxtrain.recipe.model import TokenizerConfig as TokenizerConfig
    from jaxtrain.recipe.objectives import DPOTrainerConfig as DPOTrainerConfig
    from jaxtrain.recipe.optimizer import OptimizerConfig as OptimizerConfig
    from jaxtrain.recipe.resolve import get_config as get_config
    from jaxtrain.recipe.scheduler import SchedulerConfig as SchedulerConfig
    from jaxtrain.recipe.trainer import TrainerConfig as TrainerConfig
    from jaxtrain.registry import register as register
    from jaxtrain.scheduler import HFSchedulerFactory as HFSchedulerFactory
    from jaxtrain.scheduler import SchedulerFactory as SchedulerFactory
    from jaxtrain.tokenizer import HFTokenizerFactory as HFTokenizerFactory
    from jaxtrain.tokenizer import TokenizerFactory as TokenizerFactory
    from jaxtrain.trainer.callbacks import Callback as Callback
    from jaxtrain.trainer.callbacks import Control as Control
    from jaxtrain.trainer.causal import CausalTrainer as CausalTrainer
    from jaxtrain.trainer.loss import Loss as Loss
    from jaxtrain.trainer.norms import GradLogger as GradLogger
    from jaxtrain.trainer.norms import WeightNormLogger as WeightNormLogger
    from jaxtrain.trainer.progress import TrainOutput as TrainOutput
    from jaxtrain.trainer.sft import SFTTrainer as SFTTrainer
    from jaxtrain.trainer.trainer import Trainer as Trainer

# Tokenizers need no torch; without this, transformers tells everyone that it is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_HOME = {
    "batch": "Batch",
    "checkpoint": "CheckpointEngine HFCheckpointEngine DSCheckpointEngine=OrbaxEngine",
    "data": "CausalDataFactory DataFactory DataSource SFTDataFactory "
    "HFDataSource=HuggingFaceSource HFDataSourceCausal=HuggingFaceCausalSource "
    "HFDataSourceInstruct=HuggingFaceInstructSource",
    "data.preference": "DPODataFactory",
    "metrics.log": "logger=log",
    "model": "HFModelFactory LigerModelFactory=HFModelFactory ModelFactory",
    "optimizer": "OptimizerFactory FusedAdamOptimizerFactory=AdamWFactory",
    "recipe.checkpoint": "CheckpointConfig",
    "recipe.data": "DataConfig DataSourceConfig",
    "recipe.logger": "LoggerConfig",
    "recipe.model": "ModelConfig TokenizerConfig",
    "recipe.objectives": "DPOTrainerConfig",
    "recipe.optimizer": "OptimizerConfig",
    "recipe.resolve": "get_config",
    "recipe.scheduler": "SchedulerConfig",
    "recipe.trainer": "TrainerConfig",
    "registry": "register",
    "scheduler": "HFSchedulerFactory SchedulerFactory",
    "tokenizer": "HFTokenizerFactory TokenizerFactory",
    "trainer.callbacks": "Callback Control",
    "trainer.causal": "CausalTrainer",
    "trainer.loss": "Loss",
    "trainer.norms": "GradLogger WeightNormLogger",
    "trainer.sft": "SFTTrainer",
    "trainer.progress": "TrainOutput",
    "trainer.trainer": "Trainer",
}
"""Module → the public names that it holds, `=` before one that it holds under another name."""
_PLACE = {
    words.split("=")[0]: (f"jaxtrain.{module}", words.split("=")[-1])
    for module, names in _HOME.items()
    for words in names.split()
}
_NOT_SUPPORTED = ("DPOTrainer", "SnowflakeDataSource")


def __getattr__(name: str) -> Any:
    if name in _NOT_SUPPORTED:  # `from jaxtrain import` has its own message for AttributeError
        raise ImportError(f"jaxtrain.{name} is not supported yet")
    if name not in _PLACE:
        raise AttributeError(f"module 'jaxtrain' has no attribute {name!r}")
    module, held = _PLACE[name]
    return getattr(importlib.import_module(module), held)
