"""One decoder, its families as data, and loading and exporting of Hugging Face folders.

The names of the package can be imported from here too, as in ArcticTraining.
"""

from typing import Any

import jaxtrain
from jaxtrain.model.decoder import Decoder as Decoder
from jaxtrain.model.factory import HFModelFactory as HFModelFactory
from jaxtrain.model.factory import LanguageModel as LanguageModel
from jaxtrain.model.factory import ModelFactory as ModelFactory
from jaxtrain.model.factory import ModelSpec as ModelSpec


def __getattr__(name: str) -> Any:
    return getattr(jaxtrain, name)
