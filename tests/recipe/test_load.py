import pytest

from jaxtrain.recipe.compose import compose as load
from jaxtrain.recipe.errors import RecipeError


def written(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


def test_exponents_are_numbers_and_clock_times_are_text(tmp_path):
    tree = load(
        written(
            tmp_path, "a: 1e-5\nb: 1.5e3\nc: 12:30:45\nd: 2026-01-01\ne: 1_000\nf: 0x10\ng: .5\n"
        )
    ).tree
    assert tree == {
        "a": 1e-5,
        "b": 1500.0,
        "c": "12:30:45",
        "d": "2026-01-01",
        "e": 1000,
        "f": 16,
        "g": 0.5,
    }


def test_every_value_knows_its_line(tmp_path):
    recipe = load(written(tmp_path, "a: 1\nb:\n  - c: 2\n  - d: 3\n"))
    assert recipe.places["b", 1, "d"].line == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", ":3: a: duplicate key, first on line 1"),
        ("m:\n  - {x: 1, x: 2}\n", ":2: m.0.x: duplicate key, first on line 2"),
        ("a: [1\nb: 2\n", "not YAML"),
        ("a: 1\n---\nb: 2\n", ":2: not YAML: expected a single document"),
        ("- 1\n", "a recipe is a map of keys, found [1]"),
        ("a: &x [*x]\n", "an alias that contains itself"),
        ("a: !!python/object/apply:os.system [ls]\n", "not plain YAML"),
    ],
)
def test_bad_yaml_is_one_line_with_its_place(tmp_path, text, expected):
    with pytest.raises(RecipeError) as error:
        load(written(tmp_path, text))
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["[{}]", "{{<<: [{}]}}"])
def test_aliases_that_multiply_end_early(tmp_path, form):
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {form.format(', '.join([f'*a{i - 1}'] * 9))}" for i in range(1, 9)]
    try:
        recipe = load(written(tmp_path, "\n".join(lines)))
    except RecipeError as error:
        assert "aliases that grow too far" in str(error)
    else:  # a PyYAML that merges equal maps once
        assert len(recipe.places) < 10 * len(lines)


def test_a_missing_file_and_a_folder_are_said(tmp_path):
    with pytest.raises(RecipeError, match="recipe not found"):
        load(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load(tmp_path)


def test_overrides_set_dotted_keys_and_list_positions(tmp_path):
    file = written(tmp_path, "checkpoint:\n  - {output_dir: a}\n")
    tree = load(file, ["optimizer.lr=1e-5", "checkpoint.0.keep_last_n=3", "name=[1, x]"]).tree
    assert tree["optimizer"] == {"lr": 1e-5}
    assert tree["checkpoint"] == [{"output_dir": "a", "keep_last_n": 3}]
    assert tree["name"] == [1, "x"]


@pytest.mark.parametrize("bad", ["lr", "checkpoint.7.x=1", "a.b.c=1", "=3", "x=[1"])
def test_an_override_without_a_target_is_an_error(tmp_path, bad):
    file = written(tmp_path, "checkpoint:\n  - {output_dir: a}\na: text\n")
    (fault,) = load(file, [bad]).faults
    assert str(fault).startswith("command line: ")
