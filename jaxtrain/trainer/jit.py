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
        self._options = options
        self._run: Run | None = None
        self._known: set[tuple[int, ...]] = set()

    def _jit(self, run: Run) -> Any:
        """The jitted function; a new one, traced anew, when the run has another schedule."""
        # Not by a static argument: what jax remembers would keep every run, and its trainer, alive.
        if run is not self._run:
            traced = lambda *args: self.__wrapped__(*args)
            traced.__name__ = self.__wrapped__.__name__  # what a profile calls it
            self._run, self._jitted = run, jax.jit(traced, **self._options)
            self._known = set()
        return self._jitted

    def __call__(self, *args: Any) -> Any:
        run, shape = self.current_run(), args[1].tokens.shape
        jitted = self._jit(run)
        with jax.set_mesh(run.mesh):
            if shape in self._known:
                return jitted(*args)
            name = f"compiling {self.name} for sequences of {shape[-1]:,} tokens"
            with self.phase(name, key="compile_time"):
                result = jitted(*args)
        self._known.add(shape)
        return result

    def lower(self, *shapes: Any) -> Any:
        """The lowered program for arguments that are only shapes."""
        run = self.current_run()
        with jax.set_mesh(run.mesh):
            return self._jit(run).lower(*shapes)

    @property
    def num_compilations(self) -> int:
        """Programs so far: 1 after the first call, more when a shape or sharding has changed."""
        return self._jitted._cache_size()  # type: ignore[attr-defined]
