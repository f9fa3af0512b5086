"""The names of the package, where recipes' code of ArcticTraining looks for some of them."""

from jaxtrain import __getattr__ as __getattr__
