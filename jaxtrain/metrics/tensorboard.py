"""Rows as event files for TensorBoard."""

from pathlib import Path

from jaxtrain.metrics.writer import Row, numbers


class TensorBoard:
    """On resume, TensorBoard is told to forget what lies behind the restored step."""

    def __init__(self, folder: Path, *, resumed_at: int):
        import tensorboardX  # an extra  # pyright: ignore[reportMissingImports]

        # The suffix keeps apart two starts within a second, which else share a file name.
        self._events = tensorboardX.SummaryWriter(
            str(folder),
            purge_step=resumed_at + 1 if resumed_at else 0,
            filename_suffix=f".from_{resumed_at}",
            flush_secs=10,
        )

    def write(self, row: Row) -> None:
        for name, value in numbers(row).items():
            self._events.add_scalar(name, value, row["iter"])

    def close(self) -> None:
        self._events.close()
