"""What a checkpoint holds beside the arrays, and how a run goes on from it."""

from typing import TYPE_CHECKING, Any

from jaxtrain.checkpoint import CheckpointEngine
from jaxtrain.recipe.dump import effective
from jaxtrain.trainer.run_folder import versions

if TYPE_CHECKING:
    from jaxtrain.trainer.trainer import Trainer


def metadata(trainer: "Trainer") -> dict[str, Any]:
    """JSON data."""
    return {
        "step": trainer.global_step,
        "epoch": trainer.position / trainer.data.steps_per_epoch,
        "position": trainer.position,
        "schedule_start": trainer.schedule_start,
        "eval_metrics": trainer.eval_metrics,
        "callbacks": trainer.callback_states,
        "report": trainer.report.state_dict(),
        "lineage": trainer.lineage,
        "recipe": effective(trainer.config),
        "versions": versions(),
    }


def restore(trainer: "Trainer", engine: CheckpointEngine) -> None:
    """Put the state of the checkpoint that the engine loads into the trainer, but for the parts
    that the recipe resets."""
    trainer._state = None  # its memory is needed
    with trainer.console.phase(f"restoring from {engine.directory}"):
        state = engine.load(trainer.state_shapes)
    step = trainer.global_step = int(state.step)
    saved, reset = engine.restored or engine.metadata(step), engine.resets
    if "optimizer" in reset:
        kept = {"step": state.step, "frozen": state.frozen, "average": state.average}
        state = trainer.new_state(state.params)._replace(**kept)
    trainer._state = state
    trainer.position = 0 if "data" in reset else saved.get("position", step)
    trainer.eval_metrics = saved.get("eval_metrics", {})
    _count_schedule_from(trainer, step if "scheduler" in reset else saved.get("schedule_start", 0))
    trainer._callbacks.load_state_dict({
        name: callback
        for name, callback in saved.get("callbacks", {}).items()
        if _part_of(name) not in reset
    })  # fmt: skip
    if "report" in saved:
        trainer.report.load_state_dict(saved["report"])
    without = f", not restored: {', '.join(reset)}" if reset else ""
    trainer.console.line(f"continuing after update {step}{without}")


def _part_of(name: str) -> str:
    """What `reset` calls the state of a callback: those of the recipe go by their key, those of
    the user by class and number."""
    return "callbacks" if "." in name else name


def _count_schedule_from(trainer: "Trainer", start: int) -> None:
    """Begin the schedule with this update; it ends with the run all the same."""
    if start != trainer.schedule_start:
        trainer.schedule_start = start
        for made_from_it in ("scheduler", "_spec"):
            vars(trainer).pop(made_from_it, None)
