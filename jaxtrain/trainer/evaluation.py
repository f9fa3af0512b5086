"""Evaluation: sums over whole sets, divided once, and answers to the recipe's prompts."""

from collections.abc import Iterator
from functools import reduce
from itertools import islice
from typing import TYPE_CHECKING, Any

import jax

from jaxtrain.batch import Batch
from jaxtrain.data import TrainingData
from jaxtrain.model import LanguageModel
from jaxtrain.recipe.guards import SamplesConfig
from jaxtrain.trainer.loss import Loss, added, evaluated
from jaxtrain.trainer.state import PyTree

if TYPE_CHECKING:
    from jaxtrain.trainer.trainer import Trainer


def metrics_of(trainer: "Trainer", data: TrainingData) -> dict[str, float]:
    """Metrics of every set and of all together; nothing when a signal has ended it."""
    sums = {name: _summed(trainer, data, name) for name in data.evals}
    if trainer.must_leave:
        return {}
    unit = trainer.config.loss_weighting
    metrics = evaluated("eval", reduce(added, sums.values()), unit)
    for name, loss in sums.items() if len(sums) > 1 else ():
        metrics |= evaluated(f"eval/{name}", loss, unit)
    return metrics


def batches_of(trainer: "Trainer", data: TrainingData, name: str) -> Iterator[Batch]:
    """On the devices: every row of a set once, up to `max_eval_batches` batches."""
    most = trainer.config.max_eval_batches or None
    return map(trainer.layout.on_devices, islice(data.eval_batches(name), most))


def _summed(trainer: "Trainer", data: TrainingData, name: str) -> Loss:
    key = jax.random.key(trainer.config.seed)
    losses = []
    for batch in batches_of(trainer, data, name):
        losses.append(trainer.loss(trainer.state, batch, key))
        trainer.tell("on_prediction_step")
        if trainer.must_leave:
            break
    return reduce(added, losses)


def sample(trainer: "Trainer") -> None:
    """Tell what the present weights answer, where the recipe asks for it after this evaluation."""
    wanted, report = trainer.config.eval_samples, trainer.report
    if wanted is None or (report.num_evaluations - 1) % wanted.every_n_evals:
        return
    with report.phase("sampling", key="sample_time"), jax.set_mesh(trainer.mesh):
        params = trainer.average.told(trainer.state)
        found = _answers(trainer.language_model, params, trainer.tokenizer, wanted)
    report.samples(trainer.global_step, wanted.prompts, found)


def _answers(
    model: LanguageModel, params: PyTree, tokenizer: Any, wanted: SamplesConfig
) -> list[str]:
    """The answer to each prompt, through the chat template, up to the end of the turn."""
    system = [{"role": "system", "content": wanted.system}] if wanted.system else []
    prompts = [
        tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": prompt}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )["input_ids"]
        for prompt in wanted.prompts
    ]
    found = model.generate(
        params,
        prompts,
        max_new_tokens=wanted.max_new_tokens,
        eos_ids=[token for token in (tokenizer.eos_token_id,) if token is not None],
        temperature=wanted.temperature,
        top_p=wanted.top_p,
    )
    return [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in found]
