"""The folder of one run: the recipe as it was run, how it was called, metrics, plot."""

import json
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from functools import reduce
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from jax.experimental import multihost_utils

from jaxtrain.checkpoint import CheckpointEngine
from jaxtrain.files import claim_folders, holds_something, write_atomically
from jaxtrain.metrics.log import close_log, open_log
from jaxtrain.metrics.profile import Profiler
from jaxtrain.metrics.tensorboard import TensorBoard
from jaxtrain.metrics.wandb_run import Wandb, check_login
from jaxtrain.metrics.writer import JsonLines, MetricsRow, Writer, plot_loss, read_rows
from jaxtrain.recipe.dump import find_differences, to_dict, to_yaml
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.load import Secrets
from jaxtrain.recipe.secrets import hide_secrets
from jaxtrain.recipe.section import expand_user
from jaxtrain.recipe.trainer import TrainerConfig

PACKAGES = (
    "jaxtrain",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "grain",
)


class RunFolder:
    """Nothing is written before `claim`, and only process 0 writes more than its own log and
    profiles."""

    def __init__(self, config: TrainerConfig):
        assert config.run_dir is not None  # get_config fills it in
        self.config = config
        self.path = expand_user(config.run_dir).absolute()
        self.metrics_file = self.output(config.train_log_metrics_path, "train-log-metrics.jsonl")
        self.writers: list[Writer] = []
        self.profiler: Profiler | None = None
        self.is_new = True

    def output(self, written: str | None, name: str) -> Path:
        return self.config.output_path(written, name).absolute()

    def refuse_foreign(self, engines: Collection[CheckpointEngine]) -> None:
        """RecipeError where this run would write into the files of another that it may not go on
        with: into checkpoints, the folder, or a file of the recipe."""
        may_resume = any(engine.config.is_continued for engine in engines)
        for engine in engines:
            engine.refuse_foreign(may_resume=may_resume)
        before = self._read_recipe()
        if before is None and _holds_something(self.path):
            raise RecipeError(f"run_dir: {self.path} is not empty and holds no run; use another")
        if before is not None and not may_resume:
            differing = find_differences(before, yaml.safe_load(to_yaml(self.config)))
            other = f"the run of another recipe (differs in {', '.join(differing[:5])})"
            raise RecipeError(
                f"run_dir: {self.path} holds {other if differing else 'a run of this recipe'}; "
                "remove it, write another run_dir ({n} in its name is the next free number), or "
                "set auto_resume on an `orbax` checkpoint entry"
            )
        tensorboard = self.config.tensorboard
        for key, written in (
            ("train_log_metrics_path", self.config.train_log_metrics_path),
            ("tensorboard.dir", tensorboard.dir if tensorboard.enable else None),
        ):
            is_ours = before is not None and _value_at(before, key) == written
            if written and not is_ours and _holds_something(self.output(written, "")):
                raise RecipeError(f"{key}: {written} holds rows of another run; use another")
        if self.config.wandb.is_on and jax.process_index() == 0:
            check_login(self.config.wandb)
        self.is_new = before is None

    def _read_recipe(self) -> dict[str, Any] | None:
        """The recipe of the run that the folder holds."""
        file = self.path / "recipe.yaml"
        if not file.exists():
            return None
        try:
            found = yaml.safe_load(file.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            found = error
        if isinstance(found, dict):
            return found
        raise RecipeError(f"run_dir: {file} is damaged, which is no recipe; remove {self.path}")

    def claim(
        self,
        engines: Collection[CheckpointEngine],
        say: Callable[[str], None],
        on_lost: Callable[[str], None],
    ) -> AbstractContextManager[None]:
        """Keep other processes out of every folder that the run writes; see `claim_folders`."""
        folders = {"run_dir": self.path}
        for index, engine in enumerate(engines):
            if engine.config.enabled:
                folders[f"checkpoint.{index}.output_dir"] = engine.directory
        return claim_folders(folders if jax.process_index() == 0 else {}, say=say, on_lost=on_lost)

    def open(self, *, resumed_at: int) -> None:
        """Say in the folder what is run; rows after `resumed_at` are cut."""
        logger, process = self.config.logger, jax.process_index()
        if process == 0:
            self._write_recipe()
            described = json.dumps(_circumstances(self.config.secrets), indent=2)
            write_atomically(self.path / "run.json", f"{described}\n")
        folder = self.output(logger.output_dir, "")
        open_log(folder, logger, process=process, secrets=self.config.secrets)
        if process == 0:
            self.writers += self._row_writers(resumed_at)
        self.profiler = Profiler(self.config, started_at=resumed_at)
        self.writers.append(self.profiler)

    def _write_recipe(self) -> None:
        """RecipeError where another run has written one since this one looked."""
        file, text = self.path / "recipe.yaml", to_yaml(self.config)
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            write_atomically(file, text, must_be_new=self.is_new)
        except FileExistsError:
            raise RecipeError(f"run_dir: another run has just begun in {self.path}") from None

    def _row_writers(self, resumed_at: int) -> Iterator[Writer]:
        config = self.config
        yield JsonLines(self.metrics_file, resumed_at=resumed_at)
        if config.tensorboard.enable:
            folder = self.output(config.tensorboard.dir, "tensorboard")
            yield TensorBoard(folder, resumed_at=resumed_at)
        if config.wandb.is_on:
            yield Wandb(config.wandb, self.path, to_dict(config))

    def cut(self, step: int) -> None:
        """Have the rows after this step forgotten, as a resume does."""
        kept = [writer for writer in self.writers if writer is self.profiler]
        takers = [writer for writer in self.writers if writer is not self.profiler]
        for writer in takers:
            writer.close()
        self.writers = [*(self._row_writers(step) if takers else ()), *kept]

    def write(self, row: MetricsRow) -> None:
        """To everyone who takes rows; to nobody while no run is open."""
        for writer in self.writers:
            writer.write(row)

    @property
    def wandb_run(self) -> Any:
        """The run of Weights & Biases, None where there is none."""
        return next((w.run for w in self.writers if isinstance(w, Wandb)), None)

    def close(self) -> str | None:
        """Close what is open and draw the loss; returns a remark for the person, if any."""
        for writer in self.writers:
            writer.close()
        has_rows = any(isinstance(writer, JsonLines) for writer in self.writers)
        self.writers, self.profiler = [], None
        close_log()
        try:
            if has_rows:
                plot_loss(read_rows(self.metrics_file), self.path / "loss.png")
        except ImportError:
            return "no loss.png: it needs matplotlib, pip install 'jaxtrain[demo]'"
        except OSError as error:
            return f"no loss.png: {error.strerror}"
        return None


def fill_names(config: TrainerConfig) -> TrainerConfig:
    """`config` with the `{n}` of its `run_dir` and the `{run_dir}` of its checkpoints filled in.

    A run with a checkpoint to continue keeps the newest number, any other takes the next; process 0
    decides.
    """
    assert config.run_dir is not None  # get_config fills it in
    run_dir = config.run_dir
    folder = expand_user(run_dir)
    before, mark, after = folder.name.partition("{n}")
    if not mark:
        return _inside(config, run_dir)
    names = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
    numbers = [
        name.removeprefix(before).removesuffix(after)
        for name in names
        if name.startswith(before) and name.endswith(after)
    ]
    newest = max((int(number) for number in numbers if number.isdigit()), default=0)
    filled = lambda number: _inside(config, run_dir.replace("{n}", str(number)))
    continues = newest and any(
        entry.auto_resume and CheckpointEngine(entry).steps() for entry in filled(newest).checkpoint
    )
    number = np.int32(newest if continues else newest + 1)
    return filled(int(multihost_utils.broadcast_one_to_all(number)))


def _inside(config: TrainerConfig, run_dir: str) -> TrainerConfig:
    entries = tuple(
        entry.model_copy(update={"output_dir": entry.output_dir.replace("{run_dir}", run_dir)})
        for entry in config.checkpoint
    )
    return config.model_copy(update={"run_dir": run_dir, "checkpoint": entries})


def _holds_something(path: Path) -> bool:
    if path.is_dir():
        return holds_something(path)
    return path.is_file() and path.stat().st_size > 0


def _value_at(tree: Any, key: str) -> Any:
    """The value of a dotted key of plain data; None where it is left out."""
    return reduce(lambda part, name: (part or {}).get(name), key.split("."), tree)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _circumstances(secrets: Secrets) -> dict[str, Any]:
    """Command line, versions and commit of this process."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "argv": [hide_secrets(word, secrets) for word in sys.argv],
        "python": sys.version.split()[0],
        "versions": versions(),
        "git_commit": commit.stdout.strip() or None,
    }
