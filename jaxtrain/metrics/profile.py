"""Traces and memory profiles, as the recipe configures them."""

import jax

from jaxtrain.metrics.writer import MetricsRow
from jaxtrain.recipe.trainer import TrainerConfig


class Profiler:
    """Starts and stops the trace between steps, and saves the device memory at every training row
    or at the end, in files of this process."""

    def __init__(self, config: TrainerConfig, *, started_at: int):
        self.trace, self.memory = config.profile, config.mem_profiler
        self._traces = config.output_path(self.trace and self.trace.dir, "profile")
        self._memories = config.output_path(config.mem_profiler_dir, "mem-prof")
        self._is_tracing = False
        if self.is_due(started_at):
            self.toggle()

    def is_due(self, step: int) -> bool:
        """Whether the trace starts or stops when `step` steps are done."""
        if self.trace is None:
            return False
        first, end = self.trace.start_step, self.trace.start_step + self.trace.num_steps
        return self._is_tracing != (first <= step < end)

    def toggle(self) -> None:
        """Starts or stops the trace; no step may be in flight."""
        if self._is_tracing:
            jax.profiler.stop_trace()
        else:
            jax.profiler.start_trace(str(self._traces))
        self._is_tracing = not self._is_tracing

    def write(self, row: MetricsRow) -> None:
        if self.memory == "step" and "loss" in row:
            self._save_memory(f"step_{row['iter']}")

    def close(self) -> None:
        if self._is_tracing:
            self.toggle()
        if self.memory == "e2e":
            self._save_memory("end")

    def _save_memory(self, name: str) -> None:
        self._memories.mkdir(parents=True, exist_ok=True)
        file = self._memories / f"{name}_rank_{jax.process_index()}.prof"
        jax.profiler.save_device_memory_profile(str(file))
