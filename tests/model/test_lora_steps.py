"""Thirty steps of LoRA beside the `peft` package and torch, from the same adapters on the same
batches."""

import numpy as np
import pytest

from tests.model.tiny_models import SIZES, hf_model, torch
from tests.runs import losses, recipe, trainer
from tests.tiny import tiny_tokenizer

peft = pytest.importorskip("peft")
STEPS = 30


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.covers(
    "model.peft_config.lora_alpha",
    "model.peft_config.use_rslora",
    "model.peft_config.use_dora",
)
@pytest.mark.parametrize("kind", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_thirty_steps_are_those_of_peft(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(SIZES, "vocab_size", 384)
    monkeypatch.setitem(SIZES, "max_position_embeddings", 128)
    made = recipe(tmp_path, micro_batch_size=2, data={"pack_samples": False})
    base = hf_model("llama3")
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", **kind
    )
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path / "adapter")
    settings = {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.1}
    peft_config = {"peft_type": "Lora", "path": str(tmp_path / "adapter")}
    run = trainer(made | {
        "model": {"name_or_path": str(tmp_path / "base"), "peft_config": peft_config},
        "optimizer": {"type": "adamw", **settings},
        "scheduler": {"name": "constant"},
        "max_grad_norm": 0,
        "train_iters": STEPS,
        "epochs": 2,
    })  # fmt: skip
    batches = list(run.data.train_batches(0, STEPS))
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    expected = []
    for batch in batches:
        tokens, weights = (
            torch.tensor(np.asarray(a[0])) for a in (batch.tokens, batch.loss_weights)
        )
        logits = theirs(tokens.long()).logits[:, :-1]  # right padding is seen by nothing before it
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten().long(), reduction="none"
        )
        loss = (nll * weights[:, 1:].flatten()).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    found = losses(run, STEPS)
    assert expected[-1] < 0.99 * expected[0]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
