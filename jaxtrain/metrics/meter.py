"""Measures time, tokens and FLOPs of the run for the metrics rows."""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from jaxtrain.metrics.flops import count_matmul_parameters, find_peak_flops


class Meter:
    """Accumulates the metrics and time of each step that `count` receives, until `build_row`."""

    def __init__(
        self,
        *,
        flops_per_token: float,
        flops_per_pair: float,
        peak_flops: float | None,
        num_devices: int,
        step_sequences: Callable[[int], int],
    ):
        """`peak_flops` is that of one device; `step_sequences` is tokens of a sequence → sequences
        of a step."""
        self.flops_per_token, self.flops_per_pair = flops_per_token, flops_per_pair
        self.peak_flops, self.num_devices = peak_flops, num_devices
        self.step_sequences = step_sequences
        self.seen = {"rows": 0, "tokens": 0, "pairs": 0.0}
        """Totals over all restarts."""
        self._since_row: dict[str, float] = defaultdict(float)
        self._steps, self._training_s, self._waited_s = 0, 0.0, 0.0
        self.restart()

    @classmethod
    def for_model(
        cls, model: Any, devices: Sequence[Any], *, step_sequences: Callable[[int], int]
    ) -> "Meter":
        """Makes a meter of a language model, which has `plain_shapes`, `split` and
        `spec.config`, on devices."""
        config, shapes = model.spec.config, model.plain_shapes
        share = config.experts.per_token / config.experts.count if config.experts else 1.0
        count = partial(count_matmul_parameters, share_of_experts=share)
        return cls(
            # What is frozen has no gradient.
            flops_per_token=6.0 * count(shapes) - 2.0 * count(model.split(shapes)[1]),
            flops_per_pair=6.0 * config.num_heads * (config.query_size + config.value_size),
            peak_flops=find_peak_flops(devices[0].device_kind),
            num_devices=len(devices),
            step_sequences=step_sequences,
        )

    @property
    def flops(self) -> float:
        """FLOPs of all training, over all restarts."""
        seen = self.seen
        return self.flops_per_token * seen["tokens"] + self.flops_per_pair * seen["pairs"]

    def restart(self) -> None:
        """Restarts the clock: the time before, of a compilation or a save, was not training."""
        self._since = time.perf_counter()
        self._data_s = 0.0

    def add_data_wait(self, seconds: float) -> None:
        self._data_s += seconds

    def count(self, metrics: dict[str, float]) -> None:
        seconds = max(time.perf_counter() - self._since, 1e-9)
        counted = {"steps": 1, "seconds": seconds, "data": self._data_s}
        counted |= {name: metrics[name] for name in ("tokens", "trained_tokens", "pairs")}
        for name, value in counted.items():
            self._since_row[name] += value
        for name in self.seen:
            self.seen[name] += type(self.seen[name])(metrics[name])
        self._steps += 1
        self._training_s += seconds
        self._waited_s += self._data_s
        self.restart()

    def build_row(self, metrics: dict[str, float], *, steps_left: int) -> dict[str, Any]:
        """Returns times, rates and shares per step since the last row, the seconds that remain, and
        how full the sequences of the newest step are."""
        since, self._since_row = self._since_row, defaultdict(float)
        seconds, steps = since["seconds"], since["steps"]
        flops = self.flops_per_token * since["tokens"] + self.flops_per_pair * since["pairs"]
        tflops = flops / seconds / self.num_devices / 1e12
        seqlen = metrics["seqlen"]
        places = metrics["rows"] * seqlen
        return {
            # The device keeps working while the host waits for data, so both times are equal.
            "iter_time": seconds / steps,
            "step_time": seconds / steps,
            "iter_tflops": tflops,
            "step_tflops": tflops,
            "data_time": since["data"] / steps,
            "data_share": min(since["data"] / seconds, 1.0),
            "tokens_per_sec": since["tokens"] / seconds,
            "trained_tokens_per_sec": since["trained_tokens"] / seconds,
            "tokens_seen": self.seen["tokens"],
            "padding_ratio": 1 - metrics["tokens"] / (self.step_sequences(int(seqlen)) * seqlen),
            "packing_efficiency": metrics["tokens"] / places if places else None,
            "mfu": tflops * 1e12 / self.peak_flops if self.peak_flops else None,
            "mem_peak": peak_memory_bytes(),
            "eta": self.eta_s(steps_left),
        }

    @property
    def spent_s(self) -> dict[str, float]:
        """Seconds of this process that went into steps, and into waiting for their data."""
        return {"step": self._training_s - self._waited_s, "wait": self._waited_s}

    def eta_s(self, steps_left: int) -> float:
        """Seconds that so many steps take, as long each as those of this process so far."""
        return steps_left * self._training_s / max(self._steps, 1)


def peak_memory_bytes() -> int | None:
    """Returns the peak memory of the fullest device of this process, or of the process itself where
    devices do not count it, as on CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if peaks := [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]:
        return max(peaks)
    try:
        import resource
    except ImportError:  # this system does not count it
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
