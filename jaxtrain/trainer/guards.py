"""The callbacks that a recipe's guards ask for: each watches the run, and its state is saved."""

import math
from typing import Any

import jax

from jaxtrain.metrics.log import log
from jaxtrain.recipe.errors import NonFiniteError, RecipeError
from jaxtrain.recipe.guards import DivergenceConfig, EarlyStoppingConfig, metric_direction
from jaxtrain.recipe.trainer import TrainerConfig
from jaxtrain.trainer.callbacks import Callback, Control
from jaxtrain.trainer.replicas import ReplicaCheck

MAX_SKIPPED = 10  # in a row


def build_guards(config: TrainerConfig, early_stopper: Any) -> list[Callback]:
    """Those that the recipe asks for, besides `on_nonfinite`; the stopper is a given one."""
    guards: list[Callback] = []
    if config.early_stopping is not None:
        if early_stopper is not None:
            raise RecipeError("early_stopping: excludes a given early_stopper; remove one")
        guards.append(EarlyStopping(config.early_stopping))
    if early_stopper is not None:
        metric = config.checkpoint[0].metric if config.checkpoint else "eval/loss"
        guards.append(GivenStopper(early_stopper, metric))
    if config.divergence is not None:
        guards.append(Divergence(config.divergence))
    if config.replica_check_interval:
        guards.append(ReplicaCheck(config.replica_check_interval))
    return guards


class EarlyStopping(Callback):
    """Ends the run when a metric of its evaluations has stopped getting better. NaN is never
    better."""

    key = "early_stopping"

    def __init__(self, config: EarlyStoppingConfig):
        self.config = config
        self.sign = -1.0 if metric_direction(config.metric, config.mode) == "max" else 1.0
        self.best: float | None = None
        self.stale = 0
        """evaluations since the best"""

    def on_train_begin(self, state: Any) -> None:
        self._end_if_stale(state)

    def on_evaluate(self, state: Any, metrics: Any) -> None:
        value = _score(metrics, self.config.metric, "early_stopping.metric")
        gain = math.inf if self.best is None else self.sign * (self.best - value)
        if gain > self.config.min_delta and not math.isnan(value):
            self.best, self.stale = value, 0
        else:
            self.stale += 1
        self._end_if_stale(state)

    def _end_if_stale(self, state: Any) -> None:
        if self.stale >= self.config.patience:
            best = "no value was a number" if self.best is None else f"best {self.best:.6g}"
            state.request_stop(
                f"{self.config.metric} got no better in {self.stale} evaluations ({best})"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "stale": self.stale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.stale = state["best"], state["stale"]


class GivenStopper(Callback):
    """Asks a ready-made object after every evaluation."""

    def __init__(self, stopper: Any, metric: str):
        self.should_stop = getattr(stopper, "should_stop", stopper)
        self.metric = metric

    def on_init_end(self, state: Any) -> None:
        if not state.data.evals:
            raise RecipeError("early_stopper: needs evaluation data; add `data.eval_sources`")

    def on_evaluate(self, state: Any, metrics: Any) -> None:
        score = _score(metrics, self.metric, "early_stopper")
        if self.should_stop(state.global_step, score):
            state.request_stop(f"the early_stopper ended it at {self.metric} {score:.6g}")


class Divergence(Callback):
    """Compares a short with a long exponential average; a spike alone does not part them."""

    key = "divergence"

    def __init__(self, config: DivergenceConfig):
        self.config = config
        self.averages: tuple[float, float] | None = None
        """short, long"""
        self.is_apart = False

    def on_train_metrics(self, control: Control, metrics: Any) -> None:
        if not self.config.metric.startswith("eval/"):
            self._observe(metrics, control)

    def on_evaluate(self, control: Control, metrics: Any) -> None:
        if self.config.metric.startswith("eval/"):
            self._observe(metrics, control)

    def _observe(self, row: Any, control: Control) -> None:
        config = self.config
        value = row.get(config.metric)
        if value is None:
            raise RecipeError(
                f"divergence.metric: no row has {config.metric!r}; found {', '.join(row)}"
            )
        if not math.isfinite(value):
            return
        short, long = self.averages or (value, value)
        short += config.short_alpha * (value - short)
        long += config.long_alpha * (value - long)
        self.averages = short, long
        was_apart, self.is_apart = self.is_apart, short - long >= config.threshold
        if was_apart or not self.is_apart:
            return
        what = (
            f"{config.metric} diverges: its short average {short:.4g} is {config.threshold:g} or "
            f"more above its long one {long:.4g}"
        )
        if config.action == "stop":
            raise NonFiniteError(what)
        log.warning(what)
        control.should_roll_back |= config.action == "rollback"

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self.averages and list(self.averages), "is_apart": self.is_apart}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averages = state["averages"] and tuple(state["averages"])
        self.is_apart = state["is_apart"]


class NonFinite(Callback):
    """Decides on a step whose loss or gradient norm is not finite, which has left the state as it
    was. Under `stop` the report raises when it comes to that step."""

    key = "on_nonfinite"

    def __init__(self, policy: str):
        self.policy = policy
        self.skipped = 0
        self.in_a_row = 0

    def accepts(self, metrics: dict[str, jax.Array], control: Control) -> bool:
        """Does this count as a step? All but `stop` wait for the device to know, as does a loss
        scale that moves; NonFiniteError when ten in a row do not, or when that can fall no more."""
        is_exhausted = metrics.pop("scale_is_exhausted", None)
        if self.policy == "stop" and is_exhausted is None:
            return True
        is_finite = bool(metrics["finite"])
        if is_exhausted is not None:
            return self._count_overflow(metrics, is_finite, is_exhausted)
        if not is_finite:
            loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
            log.warning("not finite, %s: loss %s, grad norm %s", self.policy, loss, norm)
        if self.policy == "rollback":
            control.should_roll_back |= not is_finite
            return is_finite
        self.in_a_row = 0 if is_finite else self.in_a_row + 1
        self.skipped += not is_finite
        if self.in_a_row == MAX_SKIPPED:
            raise NonFiniteError(
                f"{MAX_SKIPPED} steps in a row are not finite: on_nonfinite: skip gives up"
            )
        metrics["skipped_updates"] = jax.numpy.int32(self.skipped)
        return is_finite

    def _count_overflow(
        self, metrics: dict[str, jax.Array], is_finite: bool, is_exhausted: jax.Array
    ) -> bool:
        """What is not finite under a scale that moves is an overflow, and no step."""
        if is_exhausted:
            scale, loss = float(metrics["loss_scale"]), float(metrics["loss"])
            raise NonFiniteError(
                f"gradients overflow float16 at a loss scale of {scale:g}, the least that "
                f"deepspeed.fp16.min_loss_scale allows (loss {loss:g}); write model.dtype: bf16, "
                "or a lower learning rate"
            )
        self.skipped += not is_finite
        metrics["skipped_updates"] = jax.numpy.int32(self.skipped)
        return is_finite

    def refuse_to_save(self, step: int, control: Control) -> None:
        """Weights that are not finite, though the loss of the step was, are not kept."""
        what = f"step {step} has made weights or moments that are not finite, though its loss was"
        if self.policy != "rollback":
            how = "lower the learning rate, or write on_nonfinite: rollback"
            raise NonFiniteError(f"{what}; they are not saved; {how}")
        log.warning(what)
        control.should_roll_back = True

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def _score(metrics: Any, name: str, asked_by: str) -> float:
    if name not in metrics:
        found = ", ".join(metrics)
        raise RecipeError(f"{asked_by}: no evaluation has {name!r}; found {found}")
    return float(metrics[name])
