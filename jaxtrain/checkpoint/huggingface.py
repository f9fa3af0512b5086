"""Export: a folder that `transformers` loads."""

from typing import Any

from jaxtrain.checkpoint.engine import CheckpointEngine
from jaxtrain.recipe.checkpoint import HFCheckpointConfig


class HFCheckpointEngine(CheckpointEngine):
    name = "huggingface"
    config: HFCheckpointConfig

    def save(self, model: Any) -> None:
        self.trainer.save_model(self.path(self.trainer.global_step))
        self.delete_surplus()
