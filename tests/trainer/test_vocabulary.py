"""A model that grows to its tokenizer."""

import jax
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxtrain.recipe.errors import RecipeError
from tests.runs import host, losses, model_folder, recipe, trainer

EXTRA = {"tokenizer": {"extra_tokens": ["<a>", "<b>", "<c>"]}}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def weights(request, tmp_path):
    """A folder with weights, and those weights."""
    written = recipe(tmp_path / "first")
    model_folder(tmp_path / "first" / "model", tie_word_embeddings=request.param)
    run = trainer(written)
    run.save_model(tmp_path / "weights")
    return tmp_path / "weights", host(run.state.params)


@pytest.mark.covers("model.resize_vocab")
def test_new_rows_are_the_mean_and_the_export_is_whole(tmp_path, weights):
    folder, old = weights
    model = {"name_or_path": str(folder), "from_scratch": False, "resize_vocab": True}
    run = trainer(recipe(tmp_path, model=model, **EXTRA, mesh={"fsdp": 2}), devices=2)
    new = host(run.state.params)
    for name, array in old.items():
        grown, axis = new[name], 1 if "head" in name else 0
        if "embed" not in name and "head" not in name:
            np.testing.assert_array_equal(grown, array)
            continue
        kept, added = np.split(grown, [384], axis)
        np.testing.assert_array_equal(kept, array)
        assert added.shape[axis] == 3
        mean = np.broadcast_to(array.mean(axis, keepdims=True), added.shape)
        np.testing.assert_allclose(added, mean, atol=1e-6)

    found = losses(run, 2)
    assert found[-1] < found[0]
    run.save_model(tmp_path / "out")
    torch = pytest.importorskip("torch")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    assert theirs.config.vocab_size == len(tokenizer) == 387
    tokens = np.array([tokenizer("yes <b> no <c>")["input_ids"]])
    assert {385, 386} <= set(tokens[0])
    batch = jax.tree.map(np.asarray, next(run.data.train_batches(0, 1)))
    one = np.ones_like(tokens)
    rows = batch._replace(
        tokens=tokens, positions=np.arange(tokens.size)[None], segments=one, loss_weights=one
    )
    ours = jax.jit(lambda p, b: run.language_model.merge(p)(b))(run.state.params, rows)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours), expected, atol=1e-4)


def test_without_the_key_a_larger_tokenizer_is_refused(tmp_path):
    with pytest.raises(RecipeError) as error:
        trainer(recipe(tmp_path, **EXTRA))
    assert str(error.value) == (
        "model.resize_vocab: the tokenizer has 387 tokens and the embedding room for 384; write "
        "model.resize_vocab: true to add 3 rows"
    )


def test_a_model_with_room_keeps_its_size(tmp_path):
    written = recipe(tmp_path, model={"resize_vocab": True}, **EXTRA)
    model_folder(tmp_path / "model", vocab_size=400)
    assert trainer(written).model_config.config.vocab_size == 400
