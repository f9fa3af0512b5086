"""The model of a recipe: found, described, loaded onto a mesh, asked, exported."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxtrain.kernels.attention import choose
from jaxtrain.model import decoder
from jaxtrain.model.config import DecoderConfig, Execution
from jaxtrain.model.decoder import Decoder, Params
from jaxtrain.model.export import save_pretrained
from jaxtrain.model.generate import generate
from jaxtrain.model.source import locate, read_config
from jaxtrain.model.weights import load_params
from jaxtrain.parallel.mesh import platform
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.model import ModelConfig
from jaxtrain.registry import Factory

WANTED_ATTENTION = {"eager": "reference", "reference": "reference", "pallas": "pallas"}
"""`attn_implementation` → what the kernel is asked for; everything else is automatic."""


@dataclass(frozen=True)
class Described:
    """A model before its arrays: what it is and where its weights lie."""

    config: DecoderConfig
    hf_config: dict[str, Any]
    path: Path


@dataclass(frozen=True)
class LanguageModel:
    """A decoder as it is computed on a mesh, without its arrays."""

    described: Described
    execution: Execution
    attention: str
    """Which attention kernel, and why."""
    graph: nnx.GraphDef
    shapes: Params
    """Shape and dtype of every parameter."""
    param_dtype: str
    from_scratch: bool

    def merge(self, params: Params) -> Decoder:
        """The module with these parameters: what a loss function is given."""
        return decoder.merge(self.graph, params)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Attention window of each layer."""
        groups = self.described.config.groups
        return tuple(layer.window for g in groups for _ in range(g.repeats) for layer in g.layers)

    def load(self, shardings: Any, *, seed: int) -> Params:
        """Parameters read from disk, or random ones, each made where it lives."""
        config = self.described.config
        if self.from_scratch:
            make = partial(
                decoder.init_params, config, self.execution, param_dtype=self.param_dtype
            )
            return jax.jit(make, out_shardings=shardings)(jax.random.key(seed))
        path = self.described.path
        return load_params(path, config, self.shapes, shardings, self.param_dtype)
