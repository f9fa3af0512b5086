"""What is compiled of a run: its step and its evaluation loss, jitted on the mesh."""

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from jaxtrain.metrics.flops import count_tokens
from jaxtrain.parallel.sharding import parameter_shardings
from jaxtrain.trainer.report import Report
from jaxtrain.trainer.step import StepSpec

if TYPE_CHECKING:
    from jaxtrain.trainer.trainer import Trainer


class Compiled:
    """A jitted function of a batch, second of its arguments, that is traced under its mesh and says
    how long each compilation took: one for each length of rows."""

    def __init__(self, name: str, jitted: Any, mesh: Mesh, report: Report):
        self.name, self.mesh, self.report = name, mesh, report
        self._jitted = self.__wrapped__ = jitted  # the latter for `inspect.signature`
        self._known: set[tuple[int, ...]] = set()

    def __call__(self, *args: Any) -> Any:
        shape = args[1].tokens.shape
        with jax.set_mesh(self.mesh):
            if shape in self._known:
                return self._jitted(*args)
            name = f"compiling {self.name} for rows of {shape[-1]:,} tokens"
            with self.report.phase(name, key="compile_time"):
                result = self._jitted(*args)
        self._known.add(shape)
        return result

    def lower(self, *shapes: Any) -> Any:
        """The lowered program for arguments that are only shapes."""
        with jax.set_mesh(self.mesh):
            return self._jitted.lower(*shapes)

    @property
    def num_compilations(self) -> int:
        """Programs made so far: 1 after the first call, more when a shape or sharding has
        changed."""
        return self._jitted._cache_size()


def compiled_step(trainer: "Trainer") -> Compiled:
    """Its state is donated."""
    shardings = trainer.shardings
    jitted = jax.jit(
        trainer.step,
        donate_argnums=0,
        in_shardings=(shardings, trainer.layout.batch_sharding),
        out_shardings=(shardings, None),
    )
    return Compiled("train step", jitted, trainer.mesh, trainer.report)


def compiled_loss(trainer: "Trainer") -> Compiled:
    placed = (trainer.shardings, trainer.layout.batch_sharding, None)
    jitted = jax.jit(trainer.loss, in_shardings=placed)
    return Compiled("evaluation", jitted, trainer.mesh, trainer.report)


def step_spec(trainer: "Trainer") -> StepSpec:
    """What the pure step needs of a trainer."""
    config, model = trainer.config, trainer.language_model
    stage = config.deepspeed.zero_stage
    placed = partial(parameter_shardings, trainer.mesh, model.shapes)
    return StepSpec(
        merge=lambda params: model.merge(trainer.groups.held(params)),
        loss_fn=trainer.loss_fn,
        on_gradients=trainer.backward,
        measure=trainer.measured,
        optimizer=trainer.optimizer,
        schedule=trainer.scheduler,
        average=trainer.average.after,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        counts=partial(count_tokens, windows=model.windows),
        compute_shardings=placed(over_data=stage == 3),
        grad_shardings=placed(over_data=stage >= 2),
        whole_batch=trainer.layout.whole_batch,
    )
