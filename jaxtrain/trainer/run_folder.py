"""The folder of one run: the recipe as it was run, how it was called, metrics, plot."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import yaml

from jaxtrain.metrics.log import close_log, open_log
from jaxtrain.metrics.writer import JsonLines, plot_loss, read_rows
from jaxtrain.recipe.dump import to_yaml
from jaxtrain.recipe.errors import RecipeError
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
    """Nothing is written before `open`."""

    def __init__(self, config: TrainerConfig):
        assert config.run_dir is not None  # get_config fills it in
        self.config = config
        self.path = Path(config.run_dir).expanduser().absolute()
        self.metrics_file = self.path / "train-log-metrics.jsonl"
        self.metrics: JsonLines | None = None

    def refuse_foreign(self, *, may_resume: bool) -> None:
        """RecipeError if the folder holds a run that this one may not go on with."""
        recipe = self.path / "recipe.yaml"
        if not recipe.is_file():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise RecipeError(
                    f"run_dir: {self.path} is not empty and holds no run; use another"
                )
            return
        differing = _differences(
            yaml.safe_load(recipe.read_text()), yaml.safe_load(to_yaml(self.config))
        )
        if differing and not may_resume:
            raise RecipeError(
                f"run_dir: {self.path} holds the run of another recipe (differs in "
                f"{', '.join(differing[:5])}); use another folder"
            )
        if not may_resume:
            raise RecipeError(
                f"run_dir: {self.path} holds a run of this recipe; remove it, write another "
                "run_dir, or set auto_resume on an `orbax` checkpoint entry"
            )

    def open(self, *, resumed_at: int) -> None:
        """Make the folder and say in it what is run; metrics rows behind `resumed_at` are cut."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "recipe.yaml").write_text(to_yaml(self.config))
        (self.path / "run.json").write_text(json.dumps(_circumstances(), indent=2) + "\n")
        logger = self.config.logger
        folder = Path(logger.output_dir).expanduser() if logger.output_dir else self.path
        open_log(folder, process=jax.process_index(), level=logger.level)
        self.metrics = JsonLines(self.metrics_file, resumed_at=resumed_at)

    def cut(self, step: int) -> None:
        """Forget the rows behind this update."""
        assert self.metrics is not None, "open comes first"
        self.metrics.close()
        self.metrics = JsonLines(self.metrics_file, resumed_at=step)

    def write(self, row: dict[str, Any]) -> None:
        """A row of metrics; what is asked for outside a run, an evaluation, leaves none."""
        if self.metrics is not None:
            self.metrics.write(row)

    def close(self) -> str | None:
        """Close the metrics and draw the loss; returns what to tell the person, if anything."""
        if self.metrics is None:
            return None
        self.metrics.close()
        self.metrics = None
        close_log()
        try:
            plot_loss(read_rows(self.metrics_file), self.path / "loss.png")
        except ImportError:
            return "no loss.png: it needs matplotlib, pip install 'jaxtrain[demo]'"
        return None


def _circumstances() -> dict[str, Any]:
    """Command line, versions and commit of this process."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "argv": sys.argv,
        "python": sys.version.split()[0],
        "versions": versions,
        "git_commit": commit.stdout.strip() or None,
    }


def _differences(a: Any, b: Any, key: str = "") -> list[str]:
    """Dotted keys in which two recipes differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            found
            for name in sorted(a.keys() | b.keys())
            for found in _differences(a.get(name), b.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if a == b else [key]
