"""Full state through Orbax: parameters, optimizer, counts and positions, restored onto any mesh."""

import json
import logging
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import jax

from jaxtrain.checkpoint.compatibility import refuse_changes
from jaxtrain.checkpoint.engine import (
    METADATA,
    UNFINISHED,
    CheckpointEngine,
    Snapshot,
    read_metadata,
    remove,
)
from jaxtrain.checkpoint.files import DamagedCheckpoint, check_files, list_files
from jaxtrain.recipe.checkpoint import PREFIX, OrbaxConfig
from jaxtrain.recipe.errors import CheckpointError

WEIGHTS, OPTIMIZER = "weights", "optimizer"
"""The two parts, each a folder of its own; without the second a checkpoint is weights only."""
BEGUN_ANEW = {WEIGHTS: "average", OPTIMIZER: "loss_scale"}
"""Part → what of it a run begins itself where its checkpoint lacks it, and leaves where it wants
none."""


class OrbaxEngine(CheckpointEngine):
    name = "orbax"
    config: OrbaxConfig

    def __init__(self, config: OrbaxConfig, trainer: Any = None):
        super().__init__(config, trainer)
        self.is_full_state = config.save_model_only is not True
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._started_from: str | None = None
        self._been_reset: set[str] = set()

    def save(self, model: Snapshot) -> None:
        """Write full state; in the background unless the recipe says otherwise.

        Returns when the arrays are copied, so that the next step may overwrite them.
        """
        from orbax.checkpoint import v1 as ocp  # a second of imports

        self.wait()
        step, state = model.step, model.state
        parts: dict[str, Any] = {WEIGHTS: _weights(state)}
        if self.config.save_model_only is not True:
            parts[OPTIMIZER] = _optimizer(state)
        metadata = {
            **model.metadata,
            "shapes": _described(parts),
            "scores": self.scores(),
            "started_from": self._started_from,
            "reset": sorted(self._been_reset),
        }
        try:
            described = json.dumps(metadata)
        except TypeError as error:
            raise CheckpointError(f"{self.path(step)}: state must be JSON data: {error}") from None
        unfinished = self.directory / f"{UNFINISHED}{step}.unfinished"
        _hide_echoes()
        try:
            # Threads would wait for 300 s for folders that another one could not make.
            context = ocp.Context()
            context.async_options.create_directories_asynchronously = False
            with context:
                written = ocp.save_checkpointables_async(str(unfinished), parts)
        except (OSError, ValueError) as error:
            raise self.write_error(step, error) from error
        self._pending = self._background.submit(self._commit, written, unfinished, step, described)
        if not self.config.async_save:
            self.wait()

    def _commit(self, written: Any, unfinished: Path, step: int, described: str) -> None:
        try:
            written.result()
            if jax.process_index() > 0:
                return
            (unfinished / METADATA).write_text(described)
            list_files(unfinished)
            unfinished.rename(self.path(step))
        except (OSError, ValueError) as error:
            raise self.write_error(step, error) from error
        self.delete_surplus(step)
        if self.config.save_model_only == "all_but_last":
            for older in self.steps():
                if older < step and (self.path(older) / OPTIMIZER).is_dir():
                    remove(self.path(older) / OPTIMIZER)

    def poll(self) -> None:
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except BaseException:
            self.last_saved = -1
            raise

    def tidy(self, step: int) -> None:
        """Also put later checkpoints aside: they are of a future that this run does not have, and
        the newest must be its own."""
        super().tidy(step)
        for later in self.steps():
            if later > step:
                aside = self.path(later).with_suffix(".aside")
                shutil.rmtree(aside, ignore_errors=True)
                self.path(later).rename(aside)
                self.say(f"{self.path(later)} is not continued: now {aside.name}")

    def load(self, model: Any) -> Any:
        """The state of the checkpoint that the recipe starts from, or the newest, each array placed
        as the leaf of `model` (shapes with shardings) says; `opt_state` is None if it is reset.

        CheckpointError when tree, shapes or dtypes differ from the saved ones, when there is no
        optimizer in it, or when it is damaged; RecipeError when the recipe is another run's.
        """
        self.wait()
        tried = self._candidates()
        for path, before in zip(tried, [*tried[1:], None], strict=True):
            try:
                return self._read(path, model)
            except DamagedCheckpoint as error:
                if self.config.on_corrupt == "stop":
                    what = "remove it, or write on_corrupt: previous to resume from the one before"
                    raise CheckpointError(f"{error}; {what}") from error
                if before is None:
                    raise CheckpointError(f"{error}; there is none before it") from error
                self.say(f"WARNING: {error}; resuming from {before.name}")
        raise CheckpointError(f"no checkpoint in {self.directory}")

    @property
    def start_path(self) -> Path | None:
        return next(iter(self._candidates()), None)

    def _candidates(self) -> list[Path]:
        """What may be restored, the first one first."""
        own = [self.path(step) for step in reversed(self.steps())]
        start = self.config.start
        if start is None or self.restored:
            return own
        # The recipe's start is taken once: what came of it is newer.
        if self.config.auto_resume and any(_origin(path) == str(start) for path in own):
            return own
        return [start]

    def _read(self, path: Path, model: Any) -> Any:
        from orbax.checkpoint import v1 as ocp

        if not path.is_dir():
            raise CheckpointError(f"resume_from: there is no {path}")
        try:
            saved = read_metadata(path)
        except CheckpointError as error:
            raise DamagedCheckpoint(str(error)) from None
        if not saved:
            raise DamagedCheckpoint(f"{path} is damaged: {METADATA} is missing")
        reset = set(self.config.reset) - set(saved["reset"])
        wanted = {WEIGHTS: _weights(model)}
        if OPTIMIZER not in reset:
            self._refuse_weights_only(path)
            wanted[OPTIMIZER] = _optimizer(model)
        for part, name in BEGUN_ANEW.items():
            if not any(key.startswith(_prefix(part, name)) for key in saved["shapes"]):
                wanted.get(part, {}).pop(name, None)
        check_files(path, ())
        if changed := refuse_changes(self.identify(), saved, path, reset):
            self.say(f"changed since {path.name}: {', '.join(changed)}")
        _refuse_other_shapes(path, saved["shapes"], wanted)
        check_files(path, wanted)
        try:
            context = ocp.Context()
            context.pytree.loading.partial_load = True  # without what is not wanted
            with context:
                found = ocp.load_checkpointables(str(path), wanted)
        except (ValueError, OSError, KeyError) as error:
            raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error
        self.restored, self.resets = saved, tuple(sorted(reset))
        self._been_reset = reset | set(saved["reset"])
        is_start = path == self.config.start
        self._started_from = str(path) if is_start else saved["started_from"]
        return type(model)(**{"opt_state": None, **found.get(OPTIMIZER, {}), **found[WEIGHTS]})

    def _refuse_weights_only(self, path: Path) -> None:
        if (path / OPTIMIZER).is_dir():
            return
        full = sorted(path.parent.glob(f"{PREFIX}*/{OPTIMIZER}"))
        raise CheckpointError(
            f"cannot resume from weights only: {path} was saved without its optimizer "
            f"(save_model_only); with it there: {', '.join(p.parent.name for p in full) or 'none'};"
            " resume_from takes one of those, reset: [optimizer] starts the optimizer anew"
        )


@cache
def _hide_echoes() -> None:
    """What the threads of Orbax log and print of a save that fails, the save raises too."""
    logging.getLogger("absl").addFilter(
        lambda record: not (record.exc_info and "orbax" in record.pathname)
    )
    print_error = sys.excepthook

    def print_other(kind: Any, error: BaseException, trace: Any) -> None:
        if str(error) != "Event loop is closed":  # of a write that ends after another has failed
            print_error(kind, error, trace)

    sys.excepthook = print_other


def _weights(state: Any) -> dict[str, Any]:
    kept = {"step": state.step, "params": state.params, "frozen": state.frozen}
    return kept | ({"average": state.average} if state.average else {})


def _optimizer(state: Any) -> dict[str, Any]:
    # With the step, since Orbax writes no tree without an array, and sgd's state is one.
    kept = {"step": state.step, "opt_state": state.opt_state}
    return kept | ({"loss_scale": state.loss_scale} if state.loss_scale else {})


def _origin(path: Path) -> str | None:
    try:
        return read_metadata(path).get("started_from")
    except CheckpointError:
        return None


def _refuse_other_shapes(path: Path, shapes: dict[str, str], wanted: Any) -> None:
    """Orbax says nothing that a person could act on, and casts another dtype in silence."""
    asked = _described(wanted)
    parts = tuple(f"['{part}']" for part in wanted)
    optional = tuple(_prefix(*item) for item in BEGUN_ANEW.items())
    saved = {
        key: shape
        for key, shape in shapes.items()
        if key.startswith(parts) and (key in asked or not key.startswith(optional))
    }
    differing = sorted(k for k in asked.keys() | saved.keys() if asked.get(k) != saved.get(k))
    if differing:
        of_optimizer = f"['{OPTIMIZER}']"
        key = next((key for key in differing if not key.startswith(of_optimizer)), differing[0])
        raise CheckpointError(
            f"{path} does not fit the recipe's model: {len(differing)} arrays differ, such as "
            f"{key}: saved {saved.get(key, 'nothing')}, wanted {asked.get(key, 'nothing')}"
        )


def _prefix(part: str, name: str) -> str:
    return f"['{part}']['{name}']"


def _described(state: Any) -> dict[str, str]:
    """Path → dtype and shape of every array."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): f"{a.dtype}{list(a.shape)}" for path, a in leaves}
