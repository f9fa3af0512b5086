"""What code of the user records beside the metrics of an update."""

import time
from typing import Any


class Recorded:
    """The row of an update has what was recorded after it, until the next one was."""

    def __init__(self) -> None:
        self.row: dict[str, Any] = {}
        """the newest row of training"""
        self._values: dict[str, Any] = {}
        self._began: dict[str, float] = {}

    def record(self, name: str, value: float) -> None:
        """ValueError when the name was recorded already in this step."""
        if name in self._values:
            raise ValueError(f"metric {name!r} was recorded already in this step")
        self._values[name] = float(value)

    def start_timer(self, name: str) -> None:
        self._began[name] = time.perf_counter()

    def stop_timer(self, name: str) -> None:
        """Record the seconds since its start as `<name>_time`."""
        self.record(f"{name}_time", time.perf_counter() - self._began.pop(name))

    def restart_timer(self, name: str) -> None:
        """Stop it and start it again."""
        self.stop_timer(name)
        self.start_timer(name)

    def get_value(self, name: str) -> Any:
        """As recorded in this step, else as in the newest row; KeyError when in neither."""
        return self._values[name] if name in self._values else self.row[name]

    def print_summary(self) -> None:
        print("  ".join(f"{name} {value}" for name, value in (self.row | self._values).items()))

    def taken(self) -> dict[str, Any]:
        """What was recorded in the step that ends here."""
        values, self._values = self._values, {}
        return values
