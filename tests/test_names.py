"""The names of section 15 of the recipe format: in one place, and where code for ArcticTraining
looks for them."""

import importlib

import pytest

import jaxtrain

NAMES = [
    "get_config",
    "register",
    "Callback",
    "logger",
    "TrainerConfig",
    "DPOTrainerConfig",
    "ModelConfig",
    "DataConfig",
    "TokenizerConfig",
    "OptimizerConfig",
    "SchedulerConfig",
    "CheckpointConfig",
    "LoggerConfig",
    "Trainer",
    "DataFactory",
    "DataSource",
    "ModelFactory",
    "OptimizerFactory",
    "SchedulerFactory",
    "TokenizerFactory",
    "CheckpointEngine",
    "SFTTrainer",
    "CausalTrainer",
    "SFTDataFactory",
    "CausalDataFactory",
    "HFDataSource",
    "HFDataSourceInstruct",
    "HFDataSourceCausal",
    "HFModelFactory",
    "LigerModelFactory",
    "HFTokenizerFactory",
    "HFSchedulerFactory",
    "FusedAdamOptimizerFactory",
    "HFCheckpointEngine",
    "DSCheckpointEngine",
]


@pytest.mark.parametrize("module", ["jaxtrain", "jaxtrain.model", "jaxtrain.trainers"])
def test_every_name_is_found(module):
    found = importlib.import_module(module)
    for name in NAMES:
        assert getattr(found, name) is getattr(jaxtrain, name), name


def test_names_of_other_words_are_the_classes_that_do_the_same():
    assert jaxtrain.DSCheckpointEngine.name == "orbax"
    assert jaxtrain.FusedAdamOptimizerFactory.name == "adamw"
    assert jaxtrain.LigerModelFactory.name == jaxtrain.HFDataSource.name == "huggingface"


def test_a_name_that_is_not_supported_says_so():
    with pytest.raises(ImportError, match="jaxtrain.DPOTrainer is not supported yet"):
        from jaxtrain import DPOTrainer  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'SFTTrainers'"):
        jaxtrain.SFTTrainers  # noqa: B018
