"""The rows of an update, and a recipe that says them twice."""

import jax
import pytest

from jaxtrain.parallel.layout import BatchLayout
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.resolve import get_config

RECIPE = {
    "model": {"name_or_path": "m"},
    "data": {"sources": ["a/b"]},
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 3,
}


def layout(**changes):
    config = get_config(RECIPE | changes)
    return BatchLayout.of(config, make_mesh(config.mesh, jax.devices()[:1]))


@pytest.mark.covers("deepspeed.train_batch_size")
def test_the_batch_of_deepspeed_is_compared():
    assert layout(deepspeed={"train_batch_size": 6}).global_batch == 6
    with pytest.raises(RecipeError) as error:
        layout(deepspeed={"train_batch_size": 8})
    assert str(error.value) == (
        "deepspeed.train_batch_size: 8 is not micro_batch_size 2 x gradient_accumulation_steps 3 x "
        "1 batch shards = 6; remove it"
    )


def test_a_zero_stage_shards_and_keeps_the_batch():
    plain = layout()
    sharded = layout(deepspeed={"zero_optimization": {"stage": 3}})
    assert plain.global_batch == sharded.global_batch
