"""Writes metrics rows as event files for TensorBoard."""

from pathlib import Path

from jaxtrain.metrics.writer import MetricsRow, select_numbers


class TensorBoard:
    """Writes event files; on resume they make TensorBoard drop all steps after the restored one."""

    def __init__(self, folder: Path, *, resumed_at: int):
        import tensorboardX  # an extra  # pyright: ignore[reportMissingImports]

        # The suffix separates two starts within a second, which would share a file name.
        self._events = tensorboardX.SummaryWriter(
            str(folder),
            purge_step=resumed_at + 1 if resumed_at else 0,
            filename_suffix=f".from_{resumed_at}",
            flush_secs=10,
        )

    def write(self, row: MetricsRow) -> None:
        for name, value in select_numbers(row).items():
            self._events.add_scalar(name, value, row["iter"])

    def close(self) -> None:
        self._events.close()
