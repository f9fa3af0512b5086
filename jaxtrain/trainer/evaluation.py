"""Evaluation: sums over whole sets, divided once, and answers to the recipe's prompts."""

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any

import jax

from jaxtrain.batch import Batch
from jaxtrain.data.render import encode_prompt, find_stop_tokens
from jaxtrain.model.generate import Sampling
from jaxtrain.recipe.guards import SamplesConfig
from jaxtrain.trainer.loss import Loss, add_losses, eval_metrics
from jaxtrain.trainer.run import Run
from jaxtrain.trainer.state import TrainState


def evaluate_sets(
    loss_of: Callable[[Batch], Loss],
    sets: Mapping[str, Iterable[Batch]],
    *,
    unit: str,
    must_leave: Callable[[], bool],
) -> dict[str, float]:
    """Metrics of all sets together, and of each that has a name of its own; empty when `must_leave`
    says so in between."""
    sums = {}
    for name, batches in sets.items():
        losses = []
        for batch in batches:
            losses.append(loss_of(batch))
            if must_leave():
                return {}
        sums[name] = reduce(add_losses, losses)
    metrics = eval_metrics("eval", reduce(add_losses, sums.values()), unit)
    for name, loss in sums.items():
        if name != "eval":
            metrics |= eval_metrics(f"eval/{name}", loss, unit)
    return metrics


def answer_prompts(
    run: Run, state: TrainState, tokenizer: Any, config: SamplesConfig, seed: int
) -> list[str]:
    """The answer to each prompt, through the chat template, up to the end of the turn; `seed` is
    that of the random draws."""
    system = [{"role": "system", "content": config.system}] if config.system else []
    asked = [[*system, {"role": "user", "content": prompt}] for prompt in config.prompts]
    prompts = [encode_prompt(tokenizer, messages) for messages in asked]
    stops = tuple(find_stop_tokens(tokenizer))
    sampling = Sampling(temperature=config.temperature, top_p=config.top_p, stop_tokens=stops)
    how = {"max_new_tokens": config.max_new_tokens, "sampling": sampling, "seed": seed}
    with jax.set_mesh(run.mesh):
        answers = run.model.generate(run.eval_params(state), prompts, **how)
    return [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in answers]
