"""`jaxtrain eval`: the metrics of a recipe's evaluation sets, or of tasks of lm-evaluation-harness,
without training."""

import json
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxtrain import registry
from jaxtrain.export import HERE, find_checkpoint
from jaxtrain.files import write_atomically
from jaxtrain.generate import Speaker, load_speaker
from jaxtrain.parallel.mesh import first_devices
from jaxtrain.recipe.errors import RecipeError
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
        if checkpoint is not None and trainer.data.evals:
            trainer.allowed_changes = tuple(trainer.compatibility)  # nothing is trained
            trainer.load_checkpoint(find_checkpoint(checkpoint.absolute()))
        return trainer.evaluate()


def evaluate_tasks(
    source: Path | TrainerConfig, checkpoint: Path | None, out: Path | None, **tasks: Any
) -> tuple[str, Path | None]:
    """A table of the results of tasks, and the file that has them too: `out`, or else one beside
    the run or checkpoint, if there is one.

    `source` is a recipe, a run, a checkpoint or a model, and `tasks` what `jaxtrain.harness.Tasks`
    has. RecipeError without the package lm-eval, or when `source` cannot be read.
    """
    if find_spec("lm_eval") is None:
        need = "--lm-eval needs the package lm-eval; run pip install 'jaxtrain[lm-eval]'"
        raise RecipeError(need)
    from jaxtrain.harness import Tasks, find_tasks, run_tasks

    wanted = Tasks(**tasks)
    found = find_tasks(wanted)
    speaker, origin = _load(source, checkpoint)
    table, results = run_tasks(speaker, wanted, found)
    if out is None and origin.is_dir():
        now = datetime.now().strftime("%Y%m%d-%H%M%S")
        beside = {"recipe.yaml": origin, "metadata.json": origin.parent}
        folder = next((beside[name] for name in beside if (origin / name).is_file()), None)
        out = folder and folder / f"lm-eval-{now}.json"
    if out is not None:
        text = json.dumps({"model": str(origin), **results}, indent=2, default=str) + "\n"
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, text, must_be_new=True)
    return table, out


def _load(source: Path | TrainerConfig, checkpoint: Path | None) -> tuple[Speaker, Path]:
    """The model, and where it was read."""
    if isinstance(source, Path):
        return load_speaker(str(source), is_raw=True), source.absolute()
    if checkpoint is None:
        config = source.model_copy(update=HERE)
        trainer = registry.find("trainer", config.type)(config, "plan")
        checkpoint = trainer.checkpoints.resume_path
        if checkpoint is None:
            params, path = trainer.run.first_params(None), Path(config.model.name_or_path)
            return Speaker(trainer.run, params, trainer.tokenizer, is_raw=True), path
    return load_speaker(str(checkpoint), is_raw=True), checkpoint.absolute()
