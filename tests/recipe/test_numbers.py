import pytest

from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.resolve import get_config

BASE = {"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}}


@pytest.mark.parametrize(
    ("written", "value"),
    [("1_000", 1000), ("1K", 1000), ("1.25K", 1250), ("1Ki", 1024), ("2^10", 1024), ("2.5^2", None), ("9^999999999", None), ("-1^0.5", None),
     ("1e3", 1000), (1e3, 1000), ("1.5", None), (1.5, None), (True, None), ("nan", None), (float("inf"), None),
     ("ten", None), (".", None), ("", None), ("-", None)],
)  # fmt: skip
def test_a37_whole_numbers(written, value):
    recipe = BASE | {"train_iters": written}
    if value is None:
        with pytest.raises(RecipeError, match="train_iters: must be a"):
            get_config(recipe)
    else:
        assert get_config(recipe).train_iters == value


@pytest.mark.parametrize(
    ("written", "value"),
    [("10%", 0.1), ("1e-5", 1e-5), (1, 1.0), ("2^-3", 0.125), ("2.5^2", 6.25), (False, None), ("inf", None),
     ("nan", None), ("1.2.3", None)],
)  # fmt: skip
def test_a37_numbers(written, value):
    recipe = BASE | {"max_grad_norm": written}
    if value is None:
        with pytest.raises(RecipeError, match="max_grad_norm: must be a"):
            get_config(recipe)
    else:
        assert get_config(recipe).max_grad_norm == pytest.approx(value)


def test_pairs_take_the_same_forms():
    recipe = BASE | {"optimizer": {"betas": ["90%", 0.95]}}
    assert get_config(recipe).optimizer.betas == (0.9, 0.95)
