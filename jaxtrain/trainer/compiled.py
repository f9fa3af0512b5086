"""Jitted functions as the trainer calls them: under the mesh, with the compilation shown."""

from typing import Any

import jax
from jax.sharding import Mesh

from jaxtrain.trainer.report import Report


class Compiled:
    """A jitted function that is traced under its mesh and says how long its compilation took."""

    def __init__(self, name: str, jitted: Any, mesh: Mesh, report: Report):
        self.name, self.mesh, self.report = name, mesh, report
        self._jitted = self.__wrapped__ = jitted  # the latter for `inspect.signature`

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self.mesh):
            if self.num_compilations:
                return self._jitted(*args)
            with self.report.phase(f"compiling {self.name}", key="compile_time"):
                return self._jitted(*args)

    def lower(self, *shapes: Any) -> Any:
        """The lowered program for arguments that are only shapes."""
        with jax.set_mesh(self.mesh):
            return self._jitted.lower(*shapes)

    @property
    def num_compilations(self) -> int:
        """Programs made so far: 1 after the first call, more when a shape or sharding has
        changed."""
        return self._jitted._cache_size()
