"""Writers of metrics rows: the protocol, JSON lines, and the loss as a picture."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from jaxtrain.files import naming, write_atomically

MetricsRow = dict[str, Any]
"""Name → value; `iter` is the step. Services receive only the numbers."""


class Writer(Protocol):
    """Receives metrics rows in the order of their steps."""

    def write(self, row: MetricsRow) -> None: ...

    def close(self) -> None:
        """Returns when everything is stored."""
        ...


def select_numbers(row: MetricsRow) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "iter"}


class JsonLines:
    """Writes one JSON object per line. Opening cuts the rows after the restored step, or all rows
    if there is none, so that steps only rise."""

    def __init__(self, file: Path, *, resumed_at: int):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            kept = [row for row in read_rows(file) if row.get("iter", 0) <= resumed_at > 0]
            write_atomically(file, "".join(json.dumps(row) + "\n" for row in kept))
        self._stream = file.open("a", encoding="utf-8")

    def write(self, row: MetricsRow) -> None:
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        with naming(Path(self._stream.name)):
            self._stream.write(json.dumps(finite) + "\n")
            self._stream.flush()

    def close(self) -> None:
        with suppress(OSError):  # of a row that could not be written, which was an error then
            self._stream.close()


def read_rows(file: Path) -> list[MetricsRow]:
    """Reads the rows of a metrics file, without lines that are none, as a crash leaves them."""
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
    return rows


def plot_loss(rows: list[MetricsRow], file: Path) -> None:
    """Saves training and evaluation loss over steps as PNG, if there is any; ImportError without
    matplotlib."""
    import matplotlib  # lazy: an extra, and slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = {
        key: [(row["iter"], row[key]) for row in rows if row.get(key) is not None]
        for key in ("loss", "eval/loss")
    }
    if not any(curves.values()):
        return
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for key, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=key, marker="o" if "/" in key else "")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per trained token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
