"""Checkpoint engines: full state through Orbax, and export to a Hugging Face folder."""

from jaxtrain.checkpoint.engine import CheckpointEngine as CheckpointEngine
from jaxtrain.checkpoint.huggingface import HFCheckpointEngine as HFCheckpointEngine
from jaxtrain.checkpoint.orbax import OrbaxEngine as OrbaxEngine
