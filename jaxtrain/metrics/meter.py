"""Time, tokens and FLOPs of the run, as the rows of the metrics file."""

import time
from typing import Any

from jaxtrain.metrics.flops import matmul_parameters, peak_flops


class Meter:
    """`row` is called once an update, when its metrics have arrived; it divides the time since
    `restart`."""

    def __init__(self, *, flops_per_token: float, flops_per_pair: float, peak_flops: float | None):
        self.flops_per_token, self.flops_per_pair = flops_per_token, flops_per_pair
        self.peak_flops = peak_flops
        self.tokens_seen = 0
        self._updates, self._training_s = 0, 0.0
        self.restart()

    @classmethod
    def of(cls, model: Any, device_kind: str, num_devices: int) -> "Meter":
        """For a language model; `model` has `shapes` and `described.config`."""
        config = model.described.config
        peak = peak_flops(device_kind)
        return cls(
            flops_per_token=6.0 * matmul_parameters(model.shapes),
            flops_per_pair=12.0 * config.num_heads * config.head_size,
            peak_flops=peak and peak * num_devices,
        )

    def restart(self) -> None:
        """Begin to count here: what came before (a compilation, an evaluation, a save) was no
        training."""
        self._since = time.perf_counter()
        self._data_s = 0.0

    def waited_for_data(self, seconds: float) -> None:
        self._data_s += seconds

    def row(self, metrics: dict[str, float], *, updates_left: int) -> dict[str, Any]:
        """Seconds, rates and shares of one update, and the seconds that the rest will take."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        tokens = metrics["tokens"]
        self.tokens_seen += int(tokens)
        self._updates += 1
        self._training_s += seconds
        flops = self.flops_per_token * tokens + self.flops_per_pair * metrics["pairs"]
        row = {
            "step_time": seconds,
            "iter_time": seconds,
            "data_time": self._data_s,
            "data_share": min(self._data_s / seconds, 1.0),
            "tokens_per_sec": tokens / seconds,
            "trained_tokens_per_sec": metrics["trained_tokens"] / seconds,
            "tokens_seen": self.tokens_seen,
            "step_tflops": flops / seconds / 1e12,
            "mfu": flops / seconds / self.peak_flops if self.peak_flops else None,
            "eta": updates_left * self._training_s / self._updates,
        }
        self.restart()
        return row
