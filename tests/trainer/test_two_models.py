"""An objective of two models, as a user writes it: a policy, a frozen reference, labels of pairs."""

import json
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import Loss, SFTTrainer
from jaxtrain.data.preference import DPODataFactory
from jaxtrain.plan import plan
from jaxtrain.recipe.errors import DataError
from jaxtrain.recipe.resolve import get_config
from tests.runs import assert_same, host, losses, recipe, trainer

STEPS = 6


class LabelledPairs(DPODataFactory):
    """Every third pair is the wrong way round, which its label says."""

    name = "labelled-pairs-of-test"
    extras = {"label": ("float32", ())}

    def create_dataloader(self, dataset):
        batches = super().create_dataloader(dataset)
        pairs = np.arange(batches.packing.num_sequences) // 2
        labels = np.where(pairs % 3 == 0, -1.0, 1.0).astype(np.float32)
        return replace(batches, extras={"label": labels})


class Models(NamedTuple):
    policy: object
    reference: object


class TwoModelTrainer(SFTTrainer):
    """The preference loss of Rafailov et al. 2023, arXiv:2305.18290, on labelled pairs."""

    name = "two-models-of-test"
    data_factory: LabelledPairs

    def init_frozen(self, params):
        return {"reference": jax.tree.map(jnp.copy, params)}

    def merge(self, params, frozen):
        return Models(super().merge(params, frozen), super().merge(frozen["reference"], {}))

    def loss_fn(self, model, batch, key):
        w = batch.loss_weights
        gain = model.policy.token_log_probs(batch) - model.reference.token_log_probs(batch)
        chosen, rejected = (gain * w).sum(-1).reshape(-1, 2).T
        label = batch.extras["label"].reshape(-1, 2)
        rows = batch.rows.reshape(-1, 2)
        is_pair = (rows >= 0).all(-1)
        broken = is_pair & ((rows[:, 1] != rows[:, 0] + 1) | (label[:, 0] != label[:, 1]))
        margin = label[:, 0] * (chosen - rejected)
        total = (-jax.nn.log_sigmoid(margin) * is_pair).sum() + 1e9 * broken.sum()
        weight = is_pair.sum().astype(jnp.float32)
        return Loss(total, weight, {"wins": (((margin > 0) * is_pair).sum(), weight)})


def written(folder, **changes):
    """A recipe over twenty pairs of replies."""
    keys = {"type": "two-models-of-test", "train_iters": STEPS, "optimizer": {"lr": 1e-3}}
    made = recipe(folder, **keys, **changes)
    rows = [
        {"prompt": f"number {n}?", "chosen": "yes " * (n % 4 + 1), "rejected": "no " * (n % 3 + 1)}
        for n in range(20)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"type": "jsonl", "path": str(folder / "rows.jsonl")}
    return made | {"data": {"sources": [source], "max_length": 64, "num_proc": 1}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = trainer(
        written(tmp_path_factory.mktemp("alone"), micro_batch_size=8), cls=TwoModelTrainer
    )
    before = host(run.state)
    return before, losses(run, STEPS), host(run.state)


@pytest.mark.parametrize(
    ("mesh", "rows", "accumulation"),
    [
        pytest.param({}, 2, 4, marks=pytest.mark.slow),
        ({"data": 2, "fsdp": 2}, 1, 2),
        ({"pipeline": 2}, 2, 4),
    ],
    ids=["one device", "data and fsdp", "pipeline"],
)
def test_it_trains_the_same_on_every_mesh(tmp_path, alone, mesh, rows, accumulation):
    before, expected, after = alone
    cut = {"micro_batch_size": rows, "gradient_accumulation_steps": accumulation}
    devices = int(np.prod(list(mesh.values()) or [1]))
    run = trainer(written(tmp_path, mesh=mesh, **cut), devices=devices, cls=TwoModelTrainer)
    assert run.layout.global_batch == 16 and run.data.steps_per_epoch == 3, "rows: two a pair"
    (batch,) = run.data.train_batches(0, 1)
    assert batch.tokens.shape[:2] == (accumulation, 16 // accumulation)
    found = losses(run, STEPS)
    assert found[0] == pytest.approx(np.log(2), abs=1e-5), "both models are the same at first"
    assert np.abs(np.array(found) - expected).max() < 1e-5
    assert found[-1] < 0.95 * found[0]
    for name, array in host(run.state).items():
        np.testing.assert_allclose(array, after[name], atol=2e-5, err_msg=name)
        if "frozen" in name:
            np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_it_resumes_with_its_reference(tmp_path):
    entry = {"output_dir": str(tmp_path / "state"), "save_every_n_steps": 1, "auto_resume": True}
    changes = {"checkpoint": [entry], "micro_batch_size": 4}
    whole = trainer(written(tmp_path / "a", **changes) | {"checkpoint": []}, cls=TwoModelTrainer)
    whole.train()
    for end in (2, 0):
        run = trainer(written(tmp_path, exit_iteration=end, **changes), cls=TwoModelTrainer)
        run.train()
    assert_same(run.state, host(whole.state))


def test_data_without_the_labels_that_its_class_declares_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(LabelledPairs, "create_dataloader", DPODataFactory.create_dataloader)
    with pytest.raises(DataError, match=r"train: the batches of LabelledPairs must .*, found \{\}"):
        trainer(written(tmp_path), cls=TwoModelTrainer)


def test_its_step_is_planned_without_data(tmp_path):
    config = get_config(written(tmp_path, mesh={"fsdp": 2}))
    facts = dict(plan(config, jax.devices()[:2]))
    assert facts["batch"] == "4 sequences of 64 tokens per step"
    assert facts["devices"].startswith("2 x ") and facts["peak"].endswith("per device")
