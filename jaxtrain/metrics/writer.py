"""Who takes the rows of a run; rows as JSON lines, and the loss as a picture."""

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]
"""Name → value of one moment; `iter` is its update. A service is told the numbers alone."""


class Writer(Protocol):
    """Takes rows in the order of their updates."""

    def write(self, row: Row) -> None: ...

    def close(self) -> None:
        """Return when all of it is kept."""
        ...


def numbers(row: Row) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "iter"}


class JsonLines:
    """One JSON object a line. On resume, rows behind the restored step are cut, so steps only
    rise; a fresh start cuts all."""

    def __init__(self, file: Path, *, resumed_at: int):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            kept = [row for row in read_rows(file) if row.get("iter", 0) <= resumed_at > 0]
            partial = file.with_suffix(".partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
            os.replace(partial, file)
        self._stream = file.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        self._stream.write(json.dumps(finite) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def read_rows(file: Path) -> list[Row]:
    """The rows of a metrics file; a last line that a crash cut short is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_loss(rows: list[Row], file: Path) -> None:
    """Training and evaluation loss over updates, as PNG; no picture without either. ImportError
    without matplotlib."""
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
    axes.set_xlabel("update")
    axes.set_ylabel("nats a trained token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
