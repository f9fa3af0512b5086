"""What a run keeps on disk and goes on from: full state, and exports."""

from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxtrain.checkpoint import CheckpointEngine, HFCheckpointEngine, OrbaxEngine
from jaxtrain.checkpoint.orbax import OPTIMIZER
from jaxtrain.metrics.console import Console
from jaxtrain.model_folder import is_complete
from jaxtrain.recipe.checkpoint import HFCheckpointConfig, OrbaxConfig
from jaxtrain.recipe.dump import to_dict
from jaxtrain.recipe.errors import CheckpointError, RecipeError
from jaxtrain.tokenizer import save_tokenizer
from jaxtrain.trainer.callbacks import Callbacks
from jaxtrain.trainer.facts import Facts
from jaxtrain.trainer.run_folder import versions
from jaxtrain.trainer.state import TrainState


class Saved(Facts):
    """Of a trainer. The loop saves by `checkpoint`; the rest is for who asks."""

    console: Console
    callback_states: dict[str, Any]
    _callbacks: Callbacks
    _state: TrainState | None = None

    @property
    def state(self) -> TrainState:
        """Present parameters and optimizer state; read or restored at first use."""
        self.start()
        assert self._state is not None
        return self._state

    @state.setter
    def state(self, state: TrainState) -> None:
        self._state = state

    def start(self) -> None:
        """Read the weights, or restore the checkpoint that the recipe goes on from; once."""
        if self._state is not None:
            return
        engine = self._resumed_engine
        if engine is not None and self.resume_path is not None:
            self.restore(engine)
            return
        if engine is not None:
            self.console.line(f"no checkpoint in {engine.directory}: starting fresh")
        with self.console.phase("reading the weights"), jax.set_mesh(self.mesh):
            if (given := self.given.get("model")) is not None:
                params = self.language_model.copied(given, self.shardings.params)
            else:
                params = self.language_model.load(self.shardings.params, seed=self.config.seed)
            self._state = self.new_state(params)

    @property
    def resume_path(self) -> Path | None:
        """The checkpoint that a start from here goes on from; None for a fresh start."""
        engine = self._resumed_engine
        return engine.start_path if engine else None

    @property
    def _resumed_engine(self) -> CheckpointEngine | None:
        engines = self.checkpoint_engines
        return next((e for e in engines if e.config.auto_resume or e.config.start), None)

    def restore(self, engine: CheckpointEngine) -> None:
        """Take over the checkpoint that the engine loads, but for the parts that the recipe
        resets."""
        self._state = None  # its memory is needed
        with self.console.phase(f"restoring from {engine.directory}"):
            state = engine.load(self.state_shapes)
        step = self.global_step = int(state.step)
        saved, reset = engine.restored or engine.metadata(step), engine.resets
        if "optimizer" in reset:
            kept = {"step": state.step, "frozen": state.frozen, "average": state.average}
            state = self.new_state(state.params)._replace(**kept)
        if self.config.ema is not None and not state.average:
            start = jax.jit(self.average.start, out_shardings=self.shardings.average)
            state = state._replace(average=start(state.params))
        self._state = state
        self.position = 0 if "data" in reset else saved.get("position", step)
        self.eval_metrics = saved.get("eval_metrics", {})
        self._count_schedule_from(step if "scheduler" in reset else saved.get("schedule_start", 0))
        self._callbacks.load_state_dict({
            name: callback
            for name, callback in saved.get("callbacks", {}).items()
            if _part_of(name) not in reset
        })  # fmt: skip
        if "report" in saved:
            self.report.load_state_dict(saved["report"])
        without = f", not restored: {', '.join(reset)}" if reset else ""
        self.console.line(f"continuing after update {step}{without}")

    def _count_schedule_from(self, start: int) -> None:
        """Begin the schedule with this update; it ends with the run all the same."""
        if start != self.schedule_start:
            self.schedule_start = start
            for made_from_it in ("scheduler", "_spec"):
                vars(self).pop(made_from_it, None)

    @property
    def metadata(self) -> dict[str, Any]:
        """What a checkpoint holds beside the arrays, as JSON data."""
        return {
            "step": self.global_step,
            "epoch": self.epochs_done,
            "position": self.position,
            "schedule_start": self.schedule_start,
            "eval_metrics": self.eval_metrics,
            "callbacks": self.callback_states,
            "report": self.report.state_dict(),
            "lineage": self.compatibility,
            "recipe": to_dict(self.config),
            "versions": versions(),
        }

    def save_checkpoint(self, path: Path | str | None = None) -> Path:
        """Save full state now, whatever is due, and return its folder, `global_step_N`: in `path`,
        else where the recipe's first `orbax` entry saves."""
        if path is None and self.full_state_engines:
            engine = self.full_state_engines[0]
        elif path is None:
            raise RecipeError("checkpoint: no `orbax` entry says where to; name a folder")
        else:
            engine = self._orbax(output_dir=str(path))
        if engine.last_saved != self.global_step:
            self.report.flush()
            engine.save(self)
            engine.last_saved = self.global_step
        engine.wait()
        return engine.path(self.global_step)

    def load_checkpoint(self, path: Path | str | int | None = None) -> None:
        """Go on from a checkpoint: the folder `path`, or this step of the recipe's first `orbax`
        entry, or its newest one."""
        for engine in self.checkpoint_engines:
            engine.wait()
        full = self.full_state_engines
        if not full and (path is None or isinstance(path, int)):
            raise RecipeError("checkpoint: no `orbax` entry says where from; name a folder")
        if path is None:
            self.restore(full[0])
            return
        folder = full[0].path(path) if isinstance(path, int) else Path(path).absolute()
        weights_only = folder.is_dir() and not (folder / OPTIMIZER).is_dir()
        self.restore(
            self._orbax(
                output_dir=str(folder.parent),
                resume_from=str(folder),
                reset=("optimizer",) if weights_only else (),
            )
        )

    def load_best_model(self) -> None:
        """Go back to the checkpoint with the best score; for after the training, which leaves the
        last weights."""
        best = ((e, e.best()) for e in self.checkpoint_engines if isinstance(e, OrbaxEngine))
        found = next((engine.path(step) for engine, step in best if step is not None), None)
        if found is None:
            raise CheckpointError("no checkpoint of an `orbax` entry has a score")
        self.load_checkpoint(found)

    def _orbax(self, **keys: Any) -> OrbaxEngine:
        return OrbaxEngine(OrbaxConfig(type="orbax", **keys), trainer=self)

    def save_model(self, output_dir: Path | str | None = None) -> Path:
        """Export the weights to a folder that `transformers` loads; to where the recipe's first
        `huggingface` entry has those of this update when none is named.

        CheckpointError if the folder reads back as something else; it is not there then.
        """
        exports = [e for e in self.checkpoint_engines if isinstance(e, HFCheckpointEngine)]
        if output_dir is None and not exports:
            raise RecipeError(
                "checkpoint: no entry of type huggingface says where to; write save_model(folder)"
            )
        folder = Path(output_dir or exports[0].path(self.global_step)).absolute()
        own = (engine.config for engine in exports if engine.directory == folder.parent)
        config = next(own, HFCheckpointConfig(output_dir=str(folder.parent)))
        self.language_model.save(
            folder,
            self.average.told(self.state),
            dtype=self.config.model.dtype or self.language_model.compute.compute_dtype,
            add_files=partial(save_tokenizer, self.tokenizer),
            max_shard_bytes=config.max_shard_bytes,
            verify=config.verify_export,
        )
        return folder

    def model_exists(self, output_dir: Path | str) -> bool:
        """Is a whole exported model there?"""
        return is_complete(Path(output_dir), with_weights=True)


def _part_of(name: str) -> str:
    """What `reset` calls the state of a callback: those of the recipe go by their key, those of
    the user by class and number."""
    return "callbacks" if "." in name else name
