"""The model of a recipe: found, described, loaded onto a mesh, exported."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxtrain.kernels import attention
from jaxtrain.model import decoder, export
from jaxtrain.model.config import DecoderConfig, Execution
from jaxtrain.model.decoder import Decoder, Params
from jaxtrain.model.generate import generate
from jaxtrain.model.source import locate, read_config
from jaxtrain.model.weights import load_params
from jaxtrain.parallel.mesh import platform
from jaxtrain.recipe.model import ModelConfig
from jaxtrain.registry import Factory


@dataclass(frozen=True)
class LanguageModel:
    """A decoder on a mesh, without its arrays."""

    config: DecoderConfig
    hf_config: dict[str, Any]
    source: Path | None
    """Folder or GGUF file of the weights; None for random ones."""
    execution: Execution
    why: str
    """Why this attention kernel; empty when there is nothing to say."""
    graph: nnx.GraphDef
    shapes: Params
    param_dtype: str
    export_dtype: str
