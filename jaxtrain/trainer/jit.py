"""Pure functions, jitted under the mesh of a run."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax

from jaxtrain.trainer.run import Run


class Compiled:
    """A pure method of a trainer, jitted under the mesh of its run; reports how long each
    compilation took, one for each length of sequences. The batch is its second argument."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        current_run: Callable[[], Run],
        phase: Callable[..., AbstractContextManager[None]],
        **options: Any,
    ):
        """`options` are those of `jax.jit`; `phase(name, key=…)` times what is inside it."""
        self.name, self.current_run, self.phase = name, current_run, phase
        self.__wrapped__ = function  # for `inspect.signature`
        # The run is an argument, so that another schedule compiles another program.
        traced = lambda run, *args: function(*args)
        traced.__name__ = function.__name__  # what a profile calls it
        self._jitted = jax.jit(traced, static_argnums=0, **options)
        self._known: set[tuple[Run, tuple[int, ...]]] = set()

    def __call__(self, *args: Any) -> Any:
        run, shape = self.current_run(), args[1].tokens.shape
        with jax.set_mesh(run.mesh):
            if (run, shape) in self._known:
                return self._jitted(run, *args)
            name = f"compiling {self.name} for rows of {shape[-1]:,} tokens"
            with self.phase(name, key="compile_time"):
                result = self._jitted(run, *args)
        self._known.add((run, shape))
        return result

    def lower(self, *shapes: Any) -> Any:
        """The lowered program for arguments that are only shapes."""
        run = self.current_run()
        with jax.set_mesh(run.mesh):
            return self._jitted.lower(run, *shapes)

    @property
    def num_compilations(self) -> int:
        """Programs so far: 1 after the first call, more when a shape or the run has changed."""
        return self._jitted._cache_size()  # type: ignore[attr-defined]
