"""What a machine or the user's code raises, as an error of the user: one message, no traceback."""

import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtrain.recipe.errors import OutOfMemoryError, UserError, pluralize
from jaxtrain.recipe.secrets import hide_secrets

if TYPE_CHECKING:
    from jaxtrain.recipe.trainer import TrainerConfig


@contextmanager
def raise_user_errors(config: "TrainerConfig") -> Iterator[None]:
    """Turns what a machine or the user's code raises into a UserError, with the traceback in the
    run's log, and hides what came from the environment."""
    try:
        yield
    except Exception as error:
        known = error if isinstance(error, UserError) else explain_error(error, config)
        if known is None:
            raise
        known.args = (hide_secrets(str(known), config.secrets),)
        if known is error and error.__cause__ is None:
            raise
        log = config.output_path(config.logger.output_dir, "") / "logs" / "rank_0.log"
        with suppress(OSError), log.open("r+", encoding="utf-8") as file:  # if there is one
            file.seek(0, os.SEEK_END)
            file.write(hide_secrets("".join(traceback.format_exception(error)), config.secrets))
        if known is error:
            raise
        raise known from error


def explain_error(error: Exception, config: "TrainerConfig | None" = None) -> UserError | None:
    """The UserError that says what a machine or the user's code raised; None for anything else,
    which is a fault of this package."""
    kind, text = type(error).__name__, str(error)
    first = text.strip().partition("\n")[0]
    if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
        return OutOfMemoryError(explain_memory(text, config))
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1].filename if frames else ""
    if last.endswith("xla_bridge.py"):
        asked = os.environ.get("JAX_PLATFORMS", "")
        return UserError(f"no device: JAX_PLATFORMS={asked} cannot be used here {first}".rstrip())
    if isinstance(error, OSError) and error.strerror:
        return UserError(": ".join(str(part) for part in (error.filename, error.strerror) if part))
    code = Path(config.code).parent if config and config.code else None
    own = [frame for frame in frames if Path(frame.filename).parent == code]
    if own or last.endswith("/trainer/loss.py"):
        where = f"{own[-1].filename}:{own[-1].lineno}: " if own else ""
        return UserError(f"{where}{kind}: {first} (--debug shows the traceback)")
    return None


def explain_memory(text: str, config: "TrainerConfig | None") -> str:
    """What a device had no memory for, as far as the compiler says it, and the keys to change."""
    sizes = [
        line.strip() for line in text.splitlines() if re.search(r"\d.*[bB]ytes|Size:|Used ", line)
    ]
    if config is None:
        return "\n".join(["out of memory", *sizes[:6]])
    length = config.data.max_length
    tokens = f"{length:,}" if length else "as many as the model has positions"
    ways = ["lower data.max_length", "shard over more devices with mesh.fsdp or mesh.tensor"]
    if config.model.remat_policy != "full":
        ways.insert(0, "write model.remat: full")
    if config.micro_batch_size > 1:
        ways.insert(0, "lower micro_batch_size and raise gradient_accumulation_steps")
    batch = f"{pluralize(config.micro_batch_size, 'sequence')} of {tokens} tokens per batch shard"
    advice = f"a forward pass takes {batch}; {', '.join(ways[:-1])} or {ways[-1]}; `jaxtrain plan`"
    return "\n".join(["out of memory", *sizes[:6], f"{advice} says what a step takes"])
