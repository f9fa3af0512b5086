"""Going back: the newest full state again, and on behind the batches that led astray."""

from typing import TYPE_CHECKING

from jaxtrain.recipe.errors import NonFiniteError

if TYPE_CHECKING:
    from jaxtrain.trainer.trainer import Trainer

MOST_ROLLBACKS = 3  # of a process


def roll_back(trainer: "Trainer") -> None:
    """Restore, cut what was told and exported since, and leave the data position where it is.

    NonFiniteError at the fourth time, or when no full state was saved yet.
    """
    step, position = trainer.global_step, trainer.position
    if trainer.num_rollbacks == MOST_ROLLBACKS:
        raise NonFiniteError(f"update {step + 1}: rolled back {MOST_ROLLBACKS} times already")
    for engine in trainer.checkpoint_engines:
        engine.wait()
    saved = [engine for engine in trainer.full_state_engines if engine.steps()]
    if not saved:
        raise NonFiniteError(f"update {step + 1}: no full state was saved yet to roll back to")
    engine = max(saved, key=lambda engine: engine.steps()[-1])
    trainer.num_rollbacks += 1
    trainer.restore(engine)
    trainer.position = position
    for other in trainer.checkpoint_engines:
        other.roll_back(trainer.global_step)
    trainer.report.rolled_back(
        trainer.global_step, {"rolled_back_from": step, "rollbacks": trainer.num_rollbacks}
    )
