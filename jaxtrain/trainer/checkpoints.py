"""The checkpoint engines of a run: which of them saves, and which a run resumes from."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxtrain import registry
from jaxtrain.checkpoint import CheckpointEngine, HFCheckpointEngine, OrbaxEngine
from jaxtrain.checkpoint.compatibility import Identity
from jaxtrain.checkpoint.orbax import OPTIMIZER
from jaxtrain.model import Decoder
from jaxtrain.model.lora import join
from jaxtrain.model.peft_folder import checksum
from jaxtrain.recipe.checkpoint import CheckpointConfig, HFCheckpointConfig, OrbaxConfig
from jaxtrain.recipe.errors import CheckpointError, RecipeError
from jaxtrain.recipe.trainer import TrainerConfig
from jaxtrain.trainer.run import Run
from jaxtrain.trainer.state import BASE, TrainState


class Restored(NamedTuple):
    state: TrainState
    metadata: dict[str, Any]
    """what the checkpoint holds beside the arrays"""
    reset: tuple[str, ...]
    """parts that start anew"""


class Checkpoints:
    """One engine for each `checkpoint` entry of the recipe."""

    def __init__(
        self,
        config: TrainerConfig,
        view: Any,
        *,
        identify: Callable[[], Identity],
        say: Callable[[str], None],
    ):
        """`view` is the trainer as engines of the user see it."""
        self._view, self._identify, self._say = view, identify, say
        self.engines = [self._build(entry) for entry in config.checkpoint]
        self._by_folder: dict[str, CheckpointEngine] = {}

    def __iter__(self) -> Iterator[CheckpointEngine]:
        return iter(self.engines)

    def _build(self, config: CheckpointConfig) -> CheckpointEngine:
        engine = registry.find("checkpoint", config.type)(config, trainer=self._view)
        engine.identify, engine.say = self._identify, self._say
        return engine

    def due(self, step: int, scores: Mapping[str, float]) -> list[CheckpointEngine]:
        """Those that are to save this step, which has these evaluation metrics."""
        for engine in self.engines:
            engine.poll()
            engine.note_score(step, scores)
        return [e for e in self.engines if e.last_saved != step and e.do_checkpoint]

    def wait(self) -> None:
        """Return when everything saved is on disk."""
        for engine in self.engines:
            engine.wait()

    @property
    def full_state(self) -> list[CheckpointEngine]:
        """Those from whose checkpoints a run can be resumed."""
        return [e for e in self.engines if e.is_full_state and e.config.enabled]

    @property
    def resumed(self) -> CheckpointEngine | None:
        """The one that a start resumes from, if the recipe asks for it."""
        return next((e for e in self.engines if e.config.auto_resume or e.config.start), None)

    @property
    def resume_path(self) -> Path | None:
        """The checkpoint that a start resumes from; None for a fresh start."""
        return self.resumed.start_path if self.resumed else None

    @property
    def newest(self) -> CheckpointEngine | None:
        """The one with the newest full state."""
        saved = [engine for engine in self.full_state if engine.steps()]
        return max(saved, key=lambda engine: engine.steps()[-1], default=None)

    @property
    def best_path(self) -> Path:
        """The checkpoint with the best score; CheckpointError without any."""
        best = ((e, e.best()) for e in self.engines if isinstance(e, OrbaxEngine))
        found = next((engine.path(step) for engine, step in best if step is not None), None)
        if found is None:
            raise CheckpointError("no checkpoint of an `orbax` entry has a score")
        return found

    def engine_to_save(self, folder: Path | str | None) -> CheckpointEngine:
        """Of full state into `folder`, else where the recipe's first `orbax` entry saves."""
        if folder is not None:
            name = str(Path(folder).absolute())
            if name not in self._by_folder:
                self._by_folder[name] = self._build(OrbaxConfig(type="orbax", output_dir=name))
            return self._by_folder[name]
        if not self.full_state:
            raise RecipeError("checkpoint: no `orbax` entry says where to; name a folder")
        return self.full_state[0]

    def engine_to_load(self, path: Path | str | int | None) -> CheckpointEngine:
        """Of the checkpoint in the folder `path`, or of this step of the recipe's first `orbax`
        entry, or of its newest one."""
        self.wait()
        if isinstance(path, int) or path is None:
            if not self.full_state:
                raise RecipeError("checkpoint: no `orbax` entry says where from; name a folder")
            if path is None:
                return self.full_state[0]
            path = self.full_state[0].path(path)
        folder = Path(path).absolute()
        weights_only = folder.is_dir() and not (folder / OPTIMIZER).is_dir()
        return self._build(
            OrbaxConfig(
                type="orbax",
                output_dir=str(folder.parent),
                resume_from=str(folder),
                reset=("optimizer",) if weights_only else (),
            )
        )

    def restore(self, engine: CheckpointEngine, run: Run, given: Decoder | None) -> Restored:
        """The checkpoint that the engine loads, but for the parts that the recipe resets."""
        state = restore_state(engine, run, given)
        step = int(state.step)
        saved, reset = engine.restored or engine.metadata(step), engine.resets
        if "optimizer" in reset:
            kept, base = state.without_base(), state.frozen.get(BASE, {})
            fresh = run.first_state(join(state.params, base))
            state = kept._replace(
                params=fresh.params,
                frozen={**fresh.frozen, **kept.frozen},
                opt_state=fresh.opt_state,
                loss_scale=fresh.loss_scale,
            )
        if run.config.ema is not None and not state.average:
            start = jax.jit(run.average.start, out_shardings=run.shardings.average)
            state = state._replace(average=start(state.params))
        if not state.loss_scale:
            start = jax.device_put(run.scaling.start(), run.shardings.loss_scale)
            state = state._replace(loss_scale=start)
        return Restored(state, saved | {"step": step}, reset)

    def export_path(self, step: int) -> Path:
        """Where the recipe's first `huggingface` entry has the weights of this step."""
        for engine in self.engines:
            if isinstance(engine, HFCheckpointEngine):
                return engine.path(step)
        raise RecipeError(
            "checkpoint: no entry of type huggingface says where to; write save_model(folder)"
        )

    def export_config(self, folder: Path) -> HFCheckpointConfig:
        """The entry that exports beside `folder`, else its defaults."""
        exports = (e for e in self.engines if isinstance(e, HFCheckpointEngine))
        own = (engine.config for engine in exports if engine.directory == folder.parent)
        return next(own, HFCheckpointConfig(output_dir=str(folder.parent)))


def restore_state(engine: CheckpointEngine, run: Run, given: Decoder | None = None) -> TrainState:
    """The state that the engine loads, with the base of its adapters as it is given or read, as
    first; CheckpointError if that is another than the one they were trained on."""
    state = engine.load(run.state_shapes.without_base())
    if run.model.adapters is None:
        return state
    base = run.first_params(given, base_only=True)
    if (found := checksum(base)) != (saved := engine.restored.get(BASE)):
        raise CheckpointError(
            f"the base has changed: {run.config.model.name_or_path} has the checksum {found}, "
            f"and the adapters were trained on {saved}"
        )
    return state._replace(frozen={**state.frozen, BASE: base})
