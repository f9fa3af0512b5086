"""What a run tells: a line an update, evaluations, samples; on screen and in the metrics file."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax

from jaxtrain.metrics.console import Console
from jaxtrain.metrics.meter import Meter
from jaxtrain.recipe.errors import NonFiniteError
from jaxtrain.trainer.run_folder import RunFolder

Item = TypeVar("Item")


class Report:
    """Holds the metrics of one update back until the next is under way, so that nothing waits
    for them."""

    def __init__(
        self,
        console: Console,
        folder: RunFolder,
        meter: Meter,
        *,
        peak_lr: float,
        last_step: int,
        on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    ):
        self.console, self.folder, self.meter = console, folder, meter
        self.peak_lr, self.last_step = peak_lr, last_step
        self.on_row = on_row
        self.num_evaluations = 0
        self.last_loss = float("nan")
        self._held: tuple[int, float, dict[str, jax.Array]] | None = None
        self._phases: dict[str, float] = {}

    def update(self, step: int, metrics: dict[str, jax.Array], *, epoch: float) -> None:
        """Take the metrics of an update that was just dispatched; report the one before it.
        `epoch` is how often all rows were taken."""
        self.flush()
        self._held = (step, epoch, metrics)

    def flush(self) -> None:
        """Report what is held back. NonFiniteError if that update was not finite."""
        if self._held is None:
            return
        (step, epoch, metrics), self._held = self._held, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        rates = self.meter.row(values, updates_left=self.last_step - step)
        finite, share = values.pop("finite"), values.pop("lr_share")
        row = {"iter": step, "epoch": epoch, "lr": share * self.peak_lr}
        row |= values | rates | self._phases
        self._phases = {}
        self.last_loss = values["loss"]
        self.folder.write(row)
        self.console.progress(row, self.last_step)
        self.on_row(row)
        if not finite or (math.isnan(values["loss"]) and values["trained_tokens"]):
            raise NonFiniteError(
                f"update {step} is not finite: loss {values['loss']}, grad norm "
                f"{values['grad_norm']}; the weights are still those of update {step - 1}"
            )

    def rolled_back(self, step: int, row: dict[str, Any]) -> None:
        """Forget what came behind this update, and write a row that says so."""
        self._held = None
        self.folder.cut(step)
        self.folder.write({"iter": step, **row})
        self.console.line(
            f"rolled back from step {row['rolled_back_from']} to step {step}, to go on behind the "
            "batches that led there"
        )
        self.meter.restart()

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.num_evaluations += 1
        self.folder.write({"iter": step, **metrics, "loss/eval": metrics["eval/loss"]})
        shown = "  ".join(
            f"{name} {value:,.0f}" if name.endswith("/tokens") else f"{name} {value:.4f}"
            for name, value in metrics.items()
        )
        self.console.line(f"evaluation at step {step}: {shown}")
        self.meter.restart()

    def samples(self, step: int, prompts: Iterable[str], answers: Iterable[str]) -> None:
        """What the model says at this step."""
        for prompt, answer in zip(prompts, answers, strict=True):
            self.folder.write({"iter": step, "prompt": prompt, "answer": answer})
            self.console.line(f"  {prompt!r} → {answer!r}")

    def timed(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The same batches; waiting for them is counted."""
        batches = iter(batches)
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.meter.waited_for_data(time.perf_counter() - began)
            yield batch

    @contextmanager
    def phase(self, name: str, *, key: str) -> Iterator[None]:
        """Something that takes a while and is no training; the next row has its seconds under
        `key`."""
        began = time.perf_counter()
        with self.console.phase(name):
            yield
        self._phases[key] = self._phases.get(key, 0.0) + time.perf_counter() - began
        self.meter.restart()

    def close(self) -> None:
        self.console.close()
        if told := self.folder.close():
            self.console.line(told)
