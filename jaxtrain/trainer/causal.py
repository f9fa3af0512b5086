"""Causal language modelling: every token of running text is trained."""

from jaxtrain.data import CausalDataFactory
from jaxtrain.trainer.sft import SFTTrainer


class CausalTrainer(SFTTrainer):
    name = "causal"
    data_factory: CausalDataFactory
