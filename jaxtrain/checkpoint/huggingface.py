"""Export: a folder that `transformers` loads."""

from jaxtrain.checkpoint.engine import CheckpointEngine, Snapshot
from jaxtrain.recipe.checkpoint import HFCheckpointConfig
from jaxtrain.recipe.errors import CheckpointError


class HFCheckpointEngine(CheckpointEngine):
    name = "huggingface"
    config: HFCheckpointConfig

    def save(self, model: Snapshot) -> None:
        path = self.path(model.step)
        try:
            model.export(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from error
        self.delete_surplus(model.step)
