"""`jaxtrain export`: a checkpoint as a folder that `transformers` loads; prepares no data and reads
the weights of the checkpoint alone."""

from operator import itemgetter
from pathlib import Path
from typing import Any

from jaxtrain import registry
from jaxtrain.checkpoint import OrbaxEngine
from jaxtrain.checkpoint.compatibility import Identity
from jaxtrain.checkpoint.engine import read_metadata
from jaxtrain.model_folder import name_inside
from jaxtrain.recipe.checkpoint import HFCheckpointConfig, OrbaxConfig
from jaxtrain.recipe.deepspeed import DeepSpeedConfig
from jaxtrain.recipe.dump import to_dict
from jaxtrain.recipe.errors import CheckpointError, RecipeError
from jaxtrain.recipe.mesh import MeshConfig, PipelineConfig
from jaxtrain.recipe.resolve import get_config
from jaxtrain.trainer.checkpoints import restore_state
from jaxtrain.trainer.state import TrainState

HERE = {
    "mesh": MeshConfig(data=1, fsdp=-1),
    "pipeline": PipelineConfig(),
    "deepspeed": DeepSpeedConfig(),
}


def export(source: Path, to: Path) -> Path:
    """Write the checkpoint at `source`, or the newest one of the run at `source`, to the folder
    `to`; returns the checkpoint.

    RecipeError if there is none, CheckpointError if it is damaged or the export reads back as
    another.
    """
    checkpoint = find_checkpoint(source.absolute())
    trainer, state = restore_weights(checkpoint)
    to = to.absolute()
    trainer.run.export(state, to, HFCheckpointConfig(output_dir=str(to.parent)), trainer.tokenizer)
    return checkpoint


def restore_weights(checkpoint: Path) -> tuple[Any, TrainState]:
    """The trainer of a checkpoint's recipe on the devices at hand, which can only be asked, and the
    state without an optimizer's."""
    recipe = read_metadata(checkpoint)["recipe"]
    config = get_config(recipe, runs_here=False).model_copy(update=HERE)
    trainer = registry.find("trainer", config.type)(config, "plan")
    entry = OrbaxConfig(
        type="orbax",
        output_dir=str(checkpoint.parent),
        resume_from=str(checkpoint),
        reset=("optimizer", "data"),
    )
    engine = OrbaxEngine(entry)
    engine.identify = lambda: Identity(trainer.compatibility, to_dict(config), ())
    engine.say = lambda text: None  # what is another is the mesh, and nothing is trained
    return trainer, restore_state(engine, trainer.run)


def find_checkpoint(source: Path) -> Path:
    """`source`, if it is a checkpoint, else the newest full state of the run in that folder."""
    if read_metadata(source):
        return source
    if not (source / "recipe.yaml").is_file():
        why = "is neither a run folder, with recipe.yaml, nor full state, with metadata.json"
        raise RecipeError(f"{source}: {why}{name_inside(source, 'metadata.json')}")
    entries = get_config(source / "recipe.yaml", runs_here=False).checkpoint
    engines = [registry.find("checkpoint", entry.type)(entry) for entry in entries]
    saved = [(step, engine) for engine in engines if (step := engine.latest()) is not None]
    latest = [engine.path(step) for step, engine in sorted(saved, key=itemgetter(0))]
    states = [path for path in latest if read_metadata(path)]
    if states:
        return states[-1]
    hint = f"; it has exported {latest[-1]}" if latest else ""
    raise CheckpointError(f"the run in {source} has saved no full state{hint}")
