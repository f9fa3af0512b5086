"""Metrics that user code records beside those of a step."""

import time
from typing import Any


class UserMetrics:
    """Collects what is recorded between two steps, for the metrics row of the first."""

    def __init__(self) -> None:
        self.row: dict[str, Any] = {}
        """The newest metrics row of training."""
        self._values: dict[str, Any] = {}
        self._began: dict[str, float] = {}

    def record(self, name: str, value: float) -> None:
        """Records a value; ValueError when the name has one already in this step."""
        if name in self._values:
            raise ValueError(f"metric {name!r} was recorded already in this step")
        self._values[name] = float(value)

    def start_timer(self, name: str) -> None:
        self._began[name] = time.perf_counter()

    def stop_timer(self, name: str) -> None:
        """Records the seconds since the start of the timer as `<name>_time`."""
        self.record(f"{name}_time", time.perf_counter() - self._began.pop(name))

    def restart_timer(self, name: str) -> None:
        """Stops the timer and starts it again."""
        self.stop_timer(name)
        self.start_timer(name)

    def get_value(self, name: str) -> Any:
        """Returns the value of this step, else of the newest row; KeyError when neither has one."""
        return self._values[name] if name in self._values else self.row[name]

    def print_summary(self) -> None:
        print("  ".join(f"{name} {value}" for name, value in (self.row | self._values).items()))

    def pop_values(self) -> dict[str, Any]:
        """Returns and clears what was recorded in the step that ends here."""
        values, self._values = self._values, {}
        return values
