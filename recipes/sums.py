"""Data and a callback of one's own: additions, asked until the model is sure of them."""

import random

from jaxtrain import Callback, DataSource, SFTTrainer
from jaxtrain.recipe.data import DataSourceConfig


class SumsConfig(DataSourceConfig):
    rows: int = 1000
    largest: int = 99


class SumsSource(DataSource):
    name = "sums"
    config: SumsConfig

    def load(self, config, split):
        rng = random.Random(split)
        numbers = [rng.choices(range(config.largest + 1), k=2) for _ in range(config.rows)]
        return [{"prompt": f"{a} + {b} =", "response": str(a + b)} for a, b in numbers]


class StopWhenSure(Callback):
    def on_evaluate(self, args, state, control, metrics, **more):
        control.should_training_stop = metrics["eval/loss"] < 0.05


class SumsTrainer(SFTTrainer):
    name = "sums"

    def post_init_callback(self):
        self.add_callback(StopWhenSure)
