"""The model of a recipe: found, described, loaded onto a mesh, exported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx
from jaxtrain.model.config import DecoderConfig, Execution
from jaxtrain.model.decoder import Params


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
