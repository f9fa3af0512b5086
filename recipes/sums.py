"""Data and a callback of one's own: additions, asked until the model is sure of them."""

from jaxtrain import Callback, DataSource, DataSourceConfig, SFTTrainer


class SumsConfig(DataSourceConfig):
    largest: int = 40


class SumsSource(DataSource):
    name = "sums"
    config: SumsConfig

    def load(self, config, split):
        pairs = [(a, b) for a in range(config.largest) for b in range(config.largest)]
        return [{"prompt": f"{a} + {b} =", "response": str(a + b)} for a, b in pairs]


class StopWhenSure(Callback):
    def on_evaluate(self, control, metrics):
        control.should_training_stop = metrics["eval/loss"] < 0.05


class SumsTrainer(SFTTrainer):
    name = "sums"

    @classmethod
    def default_callbacks(cls):
        return [StopWhenSure]
