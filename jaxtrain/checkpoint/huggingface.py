"""Export: a folder that `transformers` loads."""

from jaxtrain.checkpoint.engine import CheckpointEngine, Snapshot
from jaxtrain.recipe.checkpoint import HFCheckpointConfig


class HFCheckpointEngine(CheckpointEngine):
    name = "huggingface"
    config: HFCheckpointConfig

    def save(self, model: Snapshot) -> None:
        try:
            model.export(self.path(model.step))
        except OSError as error:
            raise self.write_error(model.step, error) from error
        self.delete_surplus(model.step)
