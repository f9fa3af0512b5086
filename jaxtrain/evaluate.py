"""`jaxtrain eval`: the metrics of a recipe's evaluation sets, without training."""

from pathlib import Path

from jaxtrain import registry
from jaxtrain.export import find_checkpoint
from jaxtrain.parallel.mesh import first_devices
from jaxtrain.recipe.trainer import TrainerConfig


def evaluate(
    config: TrainerConfig, checkpoint: Path | None = None, num_devices: int | None = None
) -> dict[str, float]:
    """Metrics of all evaluation sets, by the names that a run reports them under; writes no file.

    The weights are those of the checkpoint, or of the newest one of the run in that folder; without
    one those that a run of the recipe starts or resumes from. RecipeError without evaluation data,
    CheckpointError when the weights cannot be read or are of another model.
    """
    devices = first_devices(num_devices) if num_devices else None
    with registry.find("trainer", config.type)(config, devices=devices) as trainer:
        if checkpoint is not None:
            trainer.allowed_changes = tuple(trainer.compatibility)  # nothing is trained
            trainer.load_checkpoint(find_checkpoint(checkpoint.absolute()))
        return trainer.evaluate()
