"""Running text trains every token but the first of a document."""

import numpy as np
import pytest

from jaxtrain.recipe.resolve import resolve
from jaxtrain.trainer.causal import CausalTrainer
from tests.runs import losses, recipe, trainer
from tests.tiny import TEXTS


def run_of(folder, text, max_length, **changes):
    (folder / "text.txt").write_text(text)
    source = {"type": "text", "path": str(folder / "text.txt"), "per_line": True}
    data = {"sources": [source], "max_length": max_length}
    written = recipe(folder, **changes) | {"type": "causal", "data": data}
    return trainer(written, cls=CausalTrainer)


def test_text_is_trained_whole(tmp_path):
    run = run_of(tmp_path, "\n".join(TEXTS * 40), 64, train_iters=6)
    batch = next(run.data.train_batches(0, 1))
    starts = batch.positions == 0
    np.testing.assert_array_equal(batch.loss_weights == 0, starts | (batch.segments == 0))
    found = losses(run, 6)
    assert found[-1] < found[0]


@pytest.mark.covers("tokenizer.tokenize_kwargs")
@pytest.mark.parametrize(
    ("kwargs", "count"),
    [({}, 3), ({"split_special_tokens": True}, None), ({"truncation": True, "max_length": 2}, 2)],
)
def test_arguments_of_the_tokenizer_decide_the_tokens(tmp_path, kwargs, count):
    run = run_of(tmp_path, "<s>a<|eot|>\n" * 40, 32, tokenizer={"tokenize_kwargs": kwargs})
    row = list(next(run.data.train_batches(0, 1)).tokens[0, 0])
    start = row.index(run.tokenizer.bos_token_id) + 1
    document = row[start : row.index(run.tokenizer.eos_token_id, start)]
    pieces = run.tokenizer.convert_ids_to_tokens(document)
    assert "<s>a<|eot|>".startswith("".join(pieces))
    assert len(pieces) == count if count else "<s>" not in pieces


def test_elsewhere_they_have_no_effect_and_the_report_says_so():
    written = {
        "model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]},
        "tokenizer": {"tokenize_kwargs": {"truncation": True}},
    }  # fmt: skip
    (line,) = resolve(written).report.select("no effect")
    assert (line.key, line.reason) == (
        "tokenizer.tokenize_kwargs", "only causal honours it, as upstream"
    )  # fmt: skip
