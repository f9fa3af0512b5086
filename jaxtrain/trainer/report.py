"""What a run reports: a line per step, evaluations, samples; on screen, in the log and to the
writers of the run."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax

from jaxtrain.metrics.console import Console, format_progress, format_times
from jaxtrain.metrics.log import log, screen
from jaxtrain.metrics.meter import Meter
from jaxtrain.metrics.user_metrics import UserMetrics
from jaxtrain.metrics.writer import MetricsRow
from jaxtrain.recipe.errors import NonFiniteError
from jaxtrain.recipe.secrets import hide_secrets
from jaxtrain.trainer.run_folder import RunFolder

Item = TypeVar("Item")
LONGEST_HISTORY = 1000  # rows
COUNTED = ("/tokens", "/samples")
NO_PHASES = {"compile_time": 0.0, "save_time": 0.0}


class Report:
    """Holds the metrics of one step back until the next is under way, so that nothing waits for
    them."""

    def __init__(
        self,
        console: Console,
        folder: RunFolder,
        meter: Meter,
        *,
        peak_lr: float,
        last_step: int,
        tell: Callable[..., None],
    ):
        """`tell` receives an event and its values by name."""
        self.console, self.folder, self.meter = console, folder, meter
        self.config, self.peak_lr, self.last_step = folder.config, peak_lr, last_step
        self.tell = tell
        self.user_metrics = UserMetrics()
        self.history: deque[MetricsRow] = deque(maxlen=LONGEST_HISTORY)
        self.num_evaluations = 0
        self.last_loss = float("nan")
        self._held: tuple[int, float, dict[str, jax.Array]] | None = None
        self._phases = dict(NO_PHASES)
        self._first_step_s: float | None = None

    def update(self, step: int, metrics: dict[str, jax.Array], *, epoch: float) -> None:
        """Take the metrics of a step that was just dispatched; report the one before it. `epoch` is
        the number of passes over the data so far."""
        self.flush()
        self._held = (step, epoch, metrics)
        profiler = self.folder.profiler
        if profiler and profiler.is_due(step):
            self.flush()  # waits for the step
            profiler.toggle()
            self.meter.restart()

    def flush(self, *, requested: bool = False) -> None:
        """Report the step that is held back, with a metrics row when one is due or requested.
        NonFiniteError if it was not finite."""
        if self._held is None:
            return
        (step, epoch, metrics), self._held = self._held, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        finite, lr_scale = values.pop("finite"), values.pop("lr_scale")
        row = {"iter": step, "epoch": epoch, "lr": lr_scale * self.peak_lr, **values}
        self.last_loss = values["loss"]
        self.meter.count(values)
        self._first_step_s = self._first_step_s or self.console.elapsed_s
        self.tell("on_train_metrics", metrics=row)
        has_row = requested or is_due(step, self.config.train_log_iter_interval)
        if has_row:
            self.tell("on_log_step", logs=row)
        row |= self.user_metrics.pop_values()
        if has_row:
            row |= self.meter.build_row(values, steps_left=self.last_step - step) | self._phases
            self._phases = dict(NO_PHASES)
            self.user_metrics.row = row
            self.write(row)
            self.console.progress(row, self.last_step)
            self.tell("on_log", logs=row)
        steps_left = self.last_step - step
        self.console.tick(step, self.last_step, self.meter.eta_s(steps_left) if steps_left else 0.0)
        if is_due(step, self.config.loss_log_interval):
            (screen if has_row else log).info(format_progress(row, self.last_step))
        if not finite or (math.isnan(values["loss"]) and values["trained_tokens"]):
            raise NonFiniteError(
                f"step {step} is not finite: loss {values['loss']}, grad norm "
                f"{values['grad_norm']}; it has changed nothing"
            )

    def write(self, row: MetricsRow) -> None:
        self.history.append(row)
        self.folder.write(row)

    def rolled_back(self, step: int, row: dict[str, Any]) -> None:
        """Forget what came after this step, and write a row that says so."""
        self._held = None
        self.folder.cut(step)
        self.history = deque((r for r in self.history if r["iter"] <= step), LONGEST_HISTORY)
        self.write({"iter": step, **row})
        self.console.line(
            f"rolled back from step {row['rolled_back_from']} to step {step}; the run continues "
            "after the batches that led there"
        )
        self.meter.restart()

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.num_evaluations += 1
        self.write({"iter": step, **metrics, "loss/eval": metrics["eval/loss"]})
        self.meter.restart()
        every = self.config.eval_log_iter_interval
        if not every or self.num_evaluations % every:
            return
        shown = "  ".join(
            f"{name} {value:,.0f}" if name.endswith(COUNTED) else f"{name} {value:.4f}"
            for name, value in metrics.items()
        )
        self.console.line(f"evaluation at step {step}: {shown}")

    def samples(self, step: int, prompts: Iterable[str], answers: Iterable[str]) -> None:
        """What the model says at this step."""
        hidden = (
            [hide_secrets(t, self.config.secrets) for t in side] for side in (prompts, answers)
        )
        for prompt, answer in zip(*hidden, strict=True):
            self.write({"iter": step, "prompt": prompt, "answer": answer})
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
            self.meter.add_data_wait(time.perf_counter() - began)
            yield batch

    @contextmanager
    def phase(self, name: str, *, key: str) -> Iterator[None]:
        """Something that takes a while and is no training, after the report of the step before it;
        the next row has its seconds under `key`."""
        self.flush()
        began = time.perf_counter()
        with self.console.phase(name, key.removesuffix("_time")):
            yield
        self._phases[key] = self._phases.get(key, 0.0) + time.perf_counter() - began
        self.meter.restart()

    def summarize(
        self, runtime_s: float, *, steps: int, before: Mapping[str, float]
    ) -> dict[str, float]:
        """Counts and rates of a training of so many steps; `before` was seen by earlier
        processes."""
        new = {name: count - before[name] for name, count in self.meter.seen.items()}
        counts = {"samples": new["rows"], "steps": steps, "tokens": new["tokens"]}
        return {
            "train_runtime": runtime_s,
            "train_samples": new["rows"],
            **{f"train_{name}_per_second": n / runtime_s for name, n in counts.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run continues to count."""
        return {
            "seen": dict(self.meter.seen),
            "num_evaluations": self.num_evaluations,
            "last_loss": self.last_loss,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.meter.seen = dict(saved["seen"])
        self.num_evaluations = saved["num_evaluations"]
        self.last_loss = saved["last_loss"]

    def close(self) -> None:
        self.console.close()
        if remark := self.folder.close():
            self.console.line(remark)
        if self._first_step_s is not None:
            spent_s = self.console.spent_s | self.meter.spent_s
            self.console.line(
                f"first step done after {self._first_step_s:.1f} s; in all "
                f"{format_times(spent_s, self.console.elapsed_s)}"
            )
            self._first_step_s = None


def is_due(step: int, every: int) -> bool:
    """Of the first step and of every n-th, so that a resume does not move them; 0 is never."""
    return bool(every) and (step == 1 or step % every == 0)
