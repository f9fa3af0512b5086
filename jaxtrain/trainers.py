"""The names of the package once more, since code written for ArcticTraining looks here too."""

from typing import Any

import jaxtrain


def __getattr__(name: str) -> Any:
    return getattr(jaxtrain, name)
