"""Rows for Weights & Biases."""

import os
import secrets
import sys
from pathlib import Path
from typing import Any

from jaxtrain.metrics.writer import Row, numbers
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.logger import WandbConfig


class Wandb:
    """One run of theirs over all restarts of ours: its id is kept in our run's folder. What it is
    told again after a restart it drops, since its steps only rise."""

    def __init__(self, config: WandbConfig, folder: Path, recipe: dict[str, Any]):
        import wandb  # an extra  # pyright: ignore[reportMissingImports]

        kept = folder / "wandb-id"
        known = kept.read_text().strip() if kept.is_file() else None
        run_id = config.id or known or secrets.token_hex(4)
        self.run = wandb.init(
            entity=config.entity,
            project=config.project,
            name=config.name,
            id=run_id,
            mode=config.mode,
            resume="allow",
            dir=str(folder),
            config=recipe,
            settings=wandb.Settings(console="off"),  # the log of the run has what the screen shows
        )
        kept.write_text(run_id)

    def write(self, row: Row) -> None:
        self.run.log(numbers(row), step=row["iter"])

    def close(self) -> None:
        """With the error that ends the run, if one does."""
        self.run.finish(exit_code=int(sys.exception() is not None))


def refuse_without_key(config: WandbConfig) -> None:
    """RecipeError where nobody is logged in and the run is to be sent; asks on a terminal."""
    import wandb  # an extra  # pyright: ignore[reportMissingImports]

    if (config.mode or os.environ.get("WANDB_MODE", "online")) != "online":
        return
    try:
        wandb.login(verify=False)
    except wandb.Error as error:
        raise RecipeError(
            f"wandb: {error} Or write wandb.mode: offline, or wandb.enable: false"
        ) from error
