"""Keys of the shared format that are honoured under another key: each is carried over, once."""

from collections.abc import Collection
from typing import Any, NamedTuple

from jaxtrain.recipe.deepspeed import DeepSpeedConfig, ZeroConfig
from jaxtrain.recipe.errors import Fault, show
from jaxtrain.recipe.not_built import values_at
from jaxtrain.recipe.trainer import TrainerConfig

CARRIED = (
    ("sequence_parallel_size", "mesh.context"),
    ("expert_parallel_size", "mesh.expert"),
    ("deepspeed.tensor_parallel.autotp_size", "mesh.tensor"),
    ("deepspeed.gradient_clipping", "max_grad_norm"),
    ("deepspeed.activation_checkpointing.cpu_checkpointing", "activation_checkpoint_cpu_offload"),
    ("deepspeed.tensorboard.enabled", "tensorboard.enable"),
)
"""Key → the key that it sets."""
COMPUTED = (
    ("deepspeed.train_micro_batch_size_per_gpu", "micro_batch_size"),
    ("deepspeed.gradient_accumulation_steps", "gradient_accumulation_steps"),
    ("deepspeed.sequence_parallel_size", "mesh.context"),
)
"""Key → the key that it must be equal to."""


class Mapped(NamedTuple):
    """A config whose shared keys have been carried over."""

    config: TrainerConfig
    origins: dict[str, str]
    """key → the key that the person wrote for it"""
    faults: tuple[Fault, ...]


def mapped(config: TrainerConfig, faulty: Collection[str] = ()) -> Mapped:
    """Carry every shared key over to the key that is read; a Fault where both say different
    things, and neither is faulty in itself."""
    origins: dict[str, str] = {}
    faults: list[Fault] = []
    original = config
    for source, target in CARRIED:
        value, there = value_at(original, source), value_at(original, target)
        # A gradient clip of zero turns clipping off; any other zero asks for nothing.
        is_asked = value or (value == 0 and target == "max_grad_norm")
        if not is_asked or target in faulty:
            continue
        if is_written(original, target) and there != value:
            what = f"{show(value)} contradicts {target} {show(there)}; remove one"
            faults.append(Fault(source, what))
        else:
            origins[target] = source
            config = replaced(config, target, value)
    for source, target in COMPUTED:
        value, computed = value_at(config, source), value_at(config, target)
        if value is not None and value != computed and target not in faulty:
            what = f"{show(value)} is not the {show(computed)} of {target}; write it there only"
            faults.append(Fault(source, what))
    return Mapped(config, origins, tuple(faults))


def without_carried(config: TrainerConfig) -> TrainerConfig:
    """`config` with each setting said once, so that its dump can be changed and run again."""
    block = DeepSpeedConfig(
        train_batch_size=config.deepspeed.train_batch_size,
        zero_optimization=ZeroConfig(stage=config.deepspeed.zero_stage),
    )
    # `base` has been laid under, and `name` is the type.
    consumed = ("sequence_parallel_size", "expert_parallel_size", "name", "base")
    return config.model_copy(update=dict.fromkeys(consumed) | {"deepspeed": block})


def value_at(config: Any, key: str) -> Any:
    """The value of a dotted key; None below a section that was left out."""
    return next((value for _, value in values_at(config, key.split("."))), None)


def is_written(config: Any, key: str) -> bool:
    name, _, rest = key.partition(".")
    is_here = name in config.model_fields_set
    return is_here and (not rest or is_written(getattr(config, name), rest))


def replaced(config: Any, key: str, value: Any) -> Any:
    """A copy of `config` with one dotted key set."""
    name, _, rest = key.partition(".")
    return config.model_copy(
        update={name: replaced(getattr(config, name), rest, value) if rest else value}
    )
