"""Running text trains every token but the first of a document."""

import numpy as np

from jaxtrain.trainer.causal import CausalTrainer
from tests.runs import losses, recipe, trainer
from tests.tiny import TEXTS


def test_text_is_trained_whole(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(TEXTS * 40))
    written = recipe(tmp_path, train_iters=6) | {
        "type": "causal",
        "data": {
            "sources": [{"type": "text", "path": str(tmp_path / "text.txt"), "per_line": True}],
            "max_length": 64,
        },
    }
    run = trainer(written, cls=CausalTrainer)
    batch = next(run.data.train_batches(0, 1))
    starts = batch.positions == 0
    np.testing.assert_array_equal(batch.loss_weights == 0, starts | (batch.segments == 0))
    found = losses(run, 6)
    assert found[-1] < found[0]
