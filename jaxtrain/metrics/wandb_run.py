"""Sends metrics rows to Weights & Biases."""

import os
import secrets
import sys
from pathlib import Path
from typing import Any

from jaxtrain.files import write_atomically
from jaxtrain.metrics.writer import MetricsRow, select_numbers
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.logger import WandbConfig


class Wandb:
    """One W&B run over all restarts, whose id is kept in the run's folder. W&B drops steps that are
    logged again after a restart, since its steps only rise."""

    def __init__(self, config: WandbConfig, folder: Path, recipe: dict[str, Any]):
        import wandb  # an extra  # pyright: ignore[reportMissingImports]

        id_file = folder / "wandb-id"
        known = id_file.read_text().strip() if id_file.is_file() else None
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
        write_atomically(id_file, run_id)

    def write(self, row: MetricsRow) -> None:
        self.run.log(select_numbers(row), step=row["iter"])

    def close(self) -> None:
        """Finishes the run, as failed if an exception ends it."""
        self.run.finish(exit_code=int(sys.exception() is not None))


def check_login(config: WandbConfig) -> None:
    """Logs in, on a terminal by asking; RecipeError if an online run has no login."""
    import wandb  # an extra  # pyright: ignore[reportMissingImports]

    if (config.mode or os.environ.get("WANDB_MODE", "online")) != "online":
        return
    try:
        wandb.login(verify=False)
    except wandb.Error as error:
        raise RecipeError(
            f"wandb: {error} Or write wandb.mode: offline, or wandb.enable: false"
        ) from error
