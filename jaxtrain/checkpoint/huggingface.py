"""Export: a folder that `transformers` loads."""

from typing import Any

from jaxtrain.checkpoint.engine import CheckpointEngine
from jaxtrain.recipe.checkpoint import HFCheckpointConfig
from jaxtrain.recipe.errors import CheckpointError


class HFCheckpointEngine(CheckpointEngine):
    name = "huggingface"
    config: HFCheckpointConfig

    def save(self, model: Any) -> None:
        step = self.trainer.global_step
        try:
            self.trainer.save_model(self.path(step))
        except OSError as error:
            raise CheckpointError(f"{self.path(step)} cannot be written: {error}") from error
        self.delete_surplus(step)
