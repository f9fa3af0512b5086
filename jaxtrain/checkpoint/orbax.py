"""Full state through Orbax: parameters, optimizer, step and data position, restored onto any
mesh."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxtrain.checkpoint.engine import PREFIX, CheckpointEngine
from jaxtrain.recipe.checkpoint import OrbaxConfig
from jaxtrain.recipe.errors import CheckpointError, Fault, RecipeError, shown

EVERY_STEP: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
"""The recipe's triggers decide when to save; Orbax does as it is told."""


@dataclass
class _Retention(ocp.training.preservation_policies.PreservationPolicy):
    """Orbax asks this after each commit."""

    engine: CheckpointEngine

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        kept = self.engine.retained([info.step for info in checkpoints])
        return [info.step in kept for info in checkpoints]


class OrbaxEngine(CheckpointEngine):
    name = "orbax"
    is_full_state = True
    config: OrbaxConfig

    def __init__(self, config: OrbaxConfig, trainer: Any = None):
        super().__init__(config, trainer)
        self._checkpointer: ocp.training.Checkpointer | None = None

    def checkpointer(self) -> ocp.training.Checkpointer:
        """Made at first use: making it makes the folder."""
        if self._checkpointer is None:
            self._checkpointer = ocp.training.Checkpointer(
                str(self.directory),
                save_decision_policy=EVERY_STEP,
                preservation_policy=_Retention(self),
                step_name_format=ocp.path.step.standard_name_format(step_prefix=PREFIX.rstrip("_")),
                cleanup_tmp_directories=True,
            )
        return self._checkpointer

    def save(self, model: Any) -> None:
        """Write the trainer's state; in the background unless the recipe says otherwise."""
        trainer = self.trainer
        step = trainer.global_step
        about = {
            "step": step,
            "position": trainer.position,
            "eval_metrics": trainer.eval_metrics,
            "shapes": _described(trainer.state),
            "lineage": trainer.lineage,
            "callbacks": trainer.callback_states,
            "report": trainer.report.state_dict(),
        }
        parts = {"state": trainer.state._asdict(), "about": about}
        if self.config.async_save:
            self.checkpointer().save_checkpointables_async(step, parts)
        else:
            self.checkpointer().save_checkpointables(step, parts)

    def load(self, model: Any) -> Any:
        """The newest state, each array placed as the leaf of `model` (shapes with shardings) says.

        CheckpointError when tree, shapes or dtypes differ from the saved ones, or when it cannot be
        read.
        """
        step = self.steps()[-1]
        about = self.about(step)
        self._refuse_other_lineage(about["lineage"])
        wanted, saved = _described(model), about["shapes"]
        differing = sorted(k for k in wanted.keys() | saved.keys() if wanted.get(k) != saved.get(k))
        if differing:
            key = differing[0]
            raise CheckpointError(
                f"{self.path(step)} does not fit the recipe's model: {len(differing)} arrays "
                f"differ, first {key}: saved {saved.get(key, 'nothing')}, wanted "
                f"{wanted.get(key, 'nothing')}"
            )
        try:
            parts = self.checkpointer().load_checkpointables(step, {"state": model._asdict()})
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(f"{self.path(step)} cannot be read: {error}") from error
        return type(model)(**parts["state"])

    def _refuse_other_lineage(self, saved: dict[str, Any]) -> None:
        wanted = json.loads(json.dumps(self.trainer.lineage))
        differing = sorted(k for k in wanted.keys() | saved.keys() if wanted.get(k) != saved.get(k))
        if differing:
            faults = [
                Fault(key, f"is {shown(wanted.get(key))}, the run in {self.directory} has "
                      f"{shown(saved.get(key))}; a run cannot be continued with another")
                for key in differing
            ]  # fmt: skip
            raise RecipeError(faults)

    def about(self, step: int) -> dict[str, Any]:
        """What was written beside the arrays: step, shapes, fingerprint of the run."""
        try:
            return self.checkpointer().load_checkpointables(step, {"about": None})["about"]
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(f"{self.path(step)} cannot be read: {error}") from error

    def wait(self) -> None:
        if self._checkpointer is not None:
            self._checkpointer.wait()

    def steps(self) -> list[int]:
        """Steps saved or being saved, oldest first."""
        known = (
            {info.step for info in self._checkpointer.checkpoints} if self._checkpointer else set()
        )
        return sorted({*super().steps(), *known})

    def delete_surplus(self) -> None:
        """Orbax does it, by the policy given to it."""


def _described(state: Any) -> dict[str, str]:
    """Path → dtype and shape of every array."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): f"{a.dtype}{list(a.shape)}" for path, a in leaves}
