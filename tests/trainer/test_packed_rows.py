"""A document in a packed row is trained exactly as it would be alone, whatever computes
attention."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtrain.batch import Batch
from jaxtrain.model.config import ComputeConfig
from jaxtrain.model.decoder import abstract, merge
from tests.runs import host, metrics_of, model_folder, recipe, trainer
from tests.tiny import chat


def alone(batch: Batch) -> list[tuple[int, np.ndarray, Batch]]:
    """Row, places, and a batch of its own at the start of a row, for each document of a batch."""
    found = []
    for row, segments in enumerate(batch.segments):
        for segment in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == segment)
            blank = jax.tree.map(lambda a: np.zeros_like(a[:1]), batch)
            for name in ("tokens", "positions", "loss_weights"):
                getattr(blank, name)[0, : len(places)] = getattr(batch, name)[row, places]
            blank.segments[0, : len(places)] = 1
            found.append((row, places, blank))
    return found


@pytest.mark.parametrize("attention", ["reference", "splash_interpret"])
def test_a_packed_row_is_its_documents_alone(tmp_path, attention):
    """Trap A5."""
    written = recipe(tmp_path, micro_batch_size=4)
    model_folder(
        tmp_path / "model", num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=64,
    )  # fmt: skip
    run = trainer(written)
    params = run.state.params
    graph = abstract(run.model_config.config, ComputeConfig(attention=attention)).graph
    packed = jax.tree.map(lambda a: a[0], next(run.data.train_batches(0, 1)))
    weight = packed.loss_weights.sum()

    @jax.jit
    def loss_and_gradient(params, batch):
        def mean(params):
            logps = merge(graph, params).token_log_probs(batch)
            return -(logps * batch.loss_weights).sum() / weight, logps

        (_, logps), gradient = jax.value_and_grad(mean, has_aux=True)(params)
        return logps, gradient

    logps, gradient = jax.device_get(loss_and_gradient(params, packed))
    documents = alone(packed)
    assert packed.segments.max() > 2, "rows must hold several documents"
    summed = {name: np.zeros_like(array) for name, array in host(gradient).items()}
    for row, places, batch in documents:
        expected, part = jax.device_get(loss_and_gradient(params, batch))
        assert np.abs(logps[row, places] - expected[0, : len(places)]).max() < 1e-5
        for name, array in host(part).items():
            summed[name] += array
    for name, array in host(gradient).items():
        assert np.abs(array - summed[name]).max() < 1e-5, name


@pytest.mark.covers("data.max_length_buckets")
def test_further_padding_changes_no_loss_and_each_length_compiles_once(tmp_path):
    found = {}
    for most in (1, 3):
        data = {"pack_samples": False, "max_length": 256, "div_length": 64}
        folder = tmp_path / str(most)
        written = recipe(folder, train_iters=8, data=data | {"max_length_buckets": most})
        chats = [{"messages": chat("Hm?", "so it was " * n)} for n in range(3, 60, 3)]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, chats)))
        run = trainer(written)
        run.train()
        rows = metrics_of(folder)
        lengths = {row["seqlen"] for row in rows}
        assert run.step.num_compilations == len(lengths) <= most
        assert len([row for row in rows if row["compile_time"]]) == len(lengths)
        found[most] = lengths, [row["loss"] for row in rows]
    assert len(found[1][0]) == 1 < len(found[3][0]) and found[1][0] == {max(found[3][0])}
    np.testing.assert_allclose(found[1][1], found[3][1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.network
def test_real_chats_with_real_weights_are_trained_packed_as_they_are_alone(tmp_path):
    """Trap A5, in float32 on SmolLM2-135M and rows of 2048."""
    program = Path(__file__).parents[1] / "packed_run.py"
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)],
        env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    (packed, alone), (packed_norm, alone_norm, difference) = found["losses"], found["norms"]
    assert found["documents"] >= 6 and found["weights"][0] == found["weights"][1] > 500
    assert abs(packed - alone) < 1e-5 * alone
    assert abs(packed_norm - alone_norm) < 1e-5 * alone_norm
    assert difference < 1e-4 * alone_norm
