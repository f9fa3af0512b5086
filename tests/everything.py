"""A class of every kind, as a user writes it, each with a key of its own; `SEEN` has what their
callbacks were told. Run as the `code:` of a recipe."""

import json

import jax
import numpy as np
import optax

from jaxtrain import (
    CheckpointConfig,
    CheckpointEngine,
    DataSource,
    DataSourceConfig,
    HFModelFactory,
    HFTokenizerFactory,
    ModelConfig,
    OptimizerConfig,
    OptimizerFactory,
    SchedulerConfig,
    SchedulerFactory,
    SFTDataFactory,
    SFTTrainer,
    TokenizerConfig,
    TrainerConfig,
    register,
)
from jaxtrain.recipe.data import SFTDataConfig

SEEN = []


def told(kind, *events):
    """A callback before and after each event, that notes what it was given."""

    def note(word):
        return lambda self, *values: SEEN.append((kind, word, values))

    return [(f"{when}-{e}", note(f"{when}-{e}")) for e in events for when in ("pre", "post")]


class MyModelConfig(ModelConfig):
    mark: int = 0


class MyModel(HFModelFactory):
    name = "my-model"
    config: MyModelConfig
    callbacks = told("model", "init", "create-config", "create-model")

    def create_model(self, config):  # as ArcticTraining's documentation spells it
        return super().create_model(config)


class MyTokenizerConfig(TokenizerConfig):
    mark: int = 0


class MyTokenizer(HFTokenizerFactory):
    name = "my-tokenizer"
    config: MyTokenizerConfig
    callbacks = told("tokenizer", "init", "create-tokenizer")

    def create_tokenizer(self):
        return super().create_tokenizer()


class MySourceConfig(DataSourceConfig):
    rows: int = 40


class MySource(DataSource):
    name = "my-source"
    config: MySourceConfig
    callbacks = told("data_source", "init", "load")

    def load(self, config, split):
        ask = "again" if split == "eval" else "yes"
        return [{"prompt": f"{ask} {n}", "response": ask * (n % 3 + 1)} for n in range(config.rows)]


class MyDataConfig(SFTDataConfig):
    fewest: int = 0


class MyData(SFTDataFactory):
    name = "my-data"
    config: MyDataConfig
    callbacks = told("data", "init", "load", "process", "split", "create_dataloader")

    def load(self, data_sources):
        return super().load(data_sources)

    def process(self, dataset):
        return super().process(dataset)

    def split_data(self, training_data):
        chosen, held_out = super().split_data(training_data)
        return chosen[self.config.fewest :], held_out

    def create_dataloader(self, dataset):
        return super().create_dataloader(dataset)


class MyOptimizerConfig(OptimizerConfig):
    slowness: float = 1.0


class MyOptimizer(OptimizerFactory):
    name = "my-optimizer"
    config: MyOptimizerConfig
    callbacks = told("optimizer", "init", "create-optimizer")

    def create_optimizer(self, model, optimizer_config):
        return optax.sgd(optimizer_config.learning_rate / optimizer_config.slowness)


class MySchedulerConfig(SchedulerConfig):
    share: float = 1.0


class MyScheduler(SchedulerFactory):
    name = "my-scheduler"
    config: MySchedulerConfig
    callbacks = told("scheduler", "init", "create-scheduler")

    def create_scheduler(self, optimizer):
        return lambda step: self.config.share


class MyEngineConfig(CheckpointConfig):
    file: str = "state"


class MyEngine(CheckpointEngine):
    name = "my-engine"
    is_full_state = True
    config: MyEngineConfig
    callbacks = told("checkpoint", "init", "load", "save")

    def save(self, model):
        folder = self.path(self.trainer.global_step)
        folder.mkdir(parents=True)
        leaves = jax.tree.leaves(self.trainer.state)
        np.savez(folder / self.config.file, *(np.asarray(leaf) for leaf in leaves))
        (folder / "metadata.json").write_text(json.dumps(self.trainer.metadata))

    def load(self, model):
        saved = np.load(self.path(self.steps()[-1]) / f"{self.config.file}.npz")
        shapes, tree = jax.tree.flatten(model)
        leaves = [jax.device_put(saved[f"arr_{i}"], s.sharding) for i, s in enumerate(shapes)]
        return tree.unflatten(leaves)


class MyConfig(TrainerConfig):
    factor: float = 1.0


@register
class MyTrainer(SFTTrainer):
    name = "my-trainer"
    config: MyConfig
    model_factory: MyModel
    tokenizer_factory: MyTokenizer
    data_factory: MyData
    optimizer_factory: MyOptimizer
    scheduler_factory: MyScheduler
    checkpoint_engine: MyEngine
    callbacks = told(
        "trainer", "init", "train", "epoch", "step", "evaluate", "checkpoint", "loss", "backward"
    )

    def loss_fn(self, model, batch, key):
        loss = super().loss_fn(model, batch, key)
        return loss._replace(total=loss.total * self.config.factor)

    def train(self):
        return super().train()

    def epoch(self):
        super().epoch()

    def step(self, state, batch):
        return super().step(state, batch)

    def evaluate(self):
        return super().evaluate()

    def checkpoint(self):
        super().checkpoint()

    def save_model(self, dir):
        return super().save_model(dir)
