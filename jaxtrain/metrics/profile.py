"""Traces and memory profiles that the recipe asks for."""

import jax

from jaxtrain.metrics.writer import Row
from jaxtrain.recipe.trainer import TrainerConfig


class Profiler:
    """A writer of profiles: begins and ends the trace between updates, and takes the device memory
    of every training row, or at the end. Each process has its own files."""

    def __init__(self, config: TrainerConfig, *, started_at: int):
        self.trace, self.memory = config.profile, config.mem_profiler
        self._traces = config.output_path(self.trace and self.trace.dir, "profile")
        self._memories = config.output_path(config.mem_profiler_dir, "mem-prof")
        self._is_tracing = False
        if self.turns_at(started_at):
            self.turn()

    def turns_at(self, step: int) -> bool:
        """Does the trace begin or end when `step` updates are done?"""
        if self.trace is None:
            return False
        first, end = self.trace.start_step, self.trace.start_step + self.trace.num_steps
        return self._is_tracing != (first <= step < end)

    def turn(self) -> None:
        """Begin the trace, or end it; called when no update is under way."""
        if self._is_tracing:
            jax.profiler.stop_trace()
        else:
            jax.profiler.start_trace(str(self._traces))
        self._is_tracing = not self._is_tracing

    def write(self, row: Row) -> None:
        if self.memory == "step" and "loss" in row:
            self._save_memory(f"step_{row['iter']}")

    def close(self) -> None:
        if self._is_tracing:
            self.turn()
        if self.memory == "e2e":
            self._save_memory("end")

    def _save_memory(self, name: str) -> None:
        self._memories.mkdir(parents=True, exist_ok=True)
        file = self._memories / f"{name}_rank_{jax.process_index()}.prof"
        jax.profiler.save_device_memory_profile(str(file))
