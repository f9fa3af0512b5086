import signal
import time

import pytest

from jaxtrain.recipe.compose import compose as load
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.load import MAX_NODES, parse
from jaxtrain.recipe.resolve import resolve


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
        ("a: {<<: 1}\n", ":1: a.<<: must be a map or a list of maps"),
        ("a: !!python/object/apply:os.system [ls]\n", "not plain YAML"),
        ("a: !!bool x\n", ":1: a: not plain YAML: 'x' is no bool"),
        ("a: !!int x\n", ":1: a: not plain YAML: 'x' is no int"),
        ("a: !!int ''\n", ":1: a: not plain YAML: '' is no int"),
        ("a: !!timestamp x\n", ":1: a: not plain YAML: 'x' is no timestamp"),
        ("a: !!float 1:2.5\n", ":1: a: not plain YAML: '1:2.5' is no number"),
        (
            "a:\n\tb: 1\n",
            ":2: not YAML: found character '\\t' that cannot start any token; YAML is "
            "indented with spaces; replace the tab",
        ),
        (
            "a: 1\n  b: 2\n",
            ":2: not YAML: mapping values are not allowed here; indent the keys of a section alike",
        ),
        (
            "a:\n  b: 1\n c: 2\n",
            ":3: not YAML: expected <block end>, but found '<block mapping "
            "start>'; indent the keys of a section alike, deeper than its name",
        ),
    ],
)
def test_bad_yaml_is_one_line_with_its_place(tmp_path, text, expected):
    (line,) = found_in(written(tmp_path, text))
    assert expected in line


def found_in(file):
    """The lines on a recipe's YAML."""
    try:
        return [str(fault) for fault in load(file).faults]
    except RecipeError as error:
        return str(error).splitlines()


def test_faults_of_values_hide_no_other_fault(tmp_path):
    """Of the same file, of the sections, and across keys; but not what only they bring about."""
    text = """
model: {name_or_path: m, name_or_path: n}
data: {sources: [a/b, !!bool x], max_length: !!int '1:2', seed: -1}
early_stopping: {}
epoch: 1
run_dir: !own x
optimizer: {learning_rate: "${env:NO_SUCH_VARIABLE}", betas: [2, 3]}
deepspeed: {train_micro_batch_size_per_gpu: 4}
"""
    assert sorted(fault.key for fault in resolve(written(tmp_path, text)).faults) == [
        "data.max_length",
        "data.seed",
        "data.sources.1",
        "deepspeed.train_micro_batch_size_per_gpu",
        "early_stopping.patience",
        "epoch",
        "model.name_or_path",
        "optimizer.betas",
        "optimizer.learning_rate",
        "run_dir",
    ]


def test_numbers_in_base_60_take_no_time(tmp_path):
    digits = ":".join(["59"] * 60_000)
    began = time.process_time()
    (line,) = found_in(written(tmp_path, f"seed: !!int '{digits}'\n"))
    assert "is no number" in line and len(line) < 300 and time.process_time() - began < 1


def levels(outer, item, first="{x: 1}", width=9, depth=8):
    """Each line uses the one before it `width` times."""
    lines = [f"a0: &a0 {first}"]
    for i in range(1, depth + 1):
        items = [item.format(k=k, use=f"*a{i - 1}") for k in range(width)]
        lines.append(f"a{i}: &a{i} {outer % ', '.join(items)}")
    return "\n".join(lines)


WIDE_MAP = "{" + ", ".join(f"key{k}: 1" for k in range(10_000)) + "}"
MULTIPLYING = {
    "in lists": levels("[%s]", "{use}"),
    "in maps": levels("{%s}", "k{k}: {use}"),
    "in merges": levels("{%s}", "<<: {use}"),
    "in merged lists": levels("{<<: [%s]}", "{use}"),
    "in merges of merges": levels("{<<: [%s]}", "{{<<: {use}}}"),
    "in merges of nested maps": levels("{%s}", "<<: {{k{k}: {use}}}"),
    "in lists of merges": levels("[{<<: [%s]}]", "{{x: {use}}}"),
    "in merges of nothing": levels("{<<: [%s]}", "{use}", first="{}"),
    "in merges with long keys": levels("{<<: [%s]}", "{use}", first="{a long key: 1}"),
    "in one wide merge": levels("{<<: [%s]}", "{use}", first=WIDE_MAP, width=40_000, depth=1),
    "in a chain of wide merges": levels("{<<: %s}", "{use}", first=WIDE_MAP, width=1, depth=200),
    "in pairs": levels("[%s]", "{use}", first="x", width=2, depth=60),
    "in itself": "a: &a {x: [*a]}",
    "merged into itself": "a: &a {x: 1, <<: *a}",
}


def num_nodes(tree):
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return 1 + sum(map(num_nodes, children))


@pytest.mark.parametrize("text", MULTIPLYING.values(), ids=MULTIPLYING)
def test_aliases_and_merges_grow_a_little_or_are_refused_and_soon(text):
    def stop(*_):
        raise TimeoutError("still reading after 10 s of this process alone")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, 10)
    try:
        assert num_nodes(parse(text, "recipe.yaml")[0]) <= MAX_NODES
    except RecipeError as error:
        assert "aliases that grow too far" in str(error) or "contains itself" in str(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def test_own_keys_win_over_merged_ones_and_the_first_of_several_maps_wins(tmp_path):
    text = """
first: &first {from_all: 1, from_first_and_second: 1, nested: {x: 1}}
second: &second {from_all: 2, from_first_and_second: 2, from_second: 2, nested: {y: 2}}
both:
  <<: [*first, *second]
  from_all: 0
one: {own: 0, <<: *second}
"""
    recipe = load(written(tmp_path, text))
    both = {"from_all": 0, "from_first_and_second": 1, "from_second": 2, "nested": {"x": 1}}
    assert recipe.tree["both"] == both
    assert recipe.tree["one"] == {"own": 0, **recipe.tree["second"]}
    lines = {key: recipe.places["both", key].line for key in both}
    assert lines == {"from_all": 6, "from_first_and_second": 2, "from_second": 3, "nested": 2}
    assert recipe.places["both",].line == 5


def test_a_missing_file_and_a_folder_are_said(tmp_path):
    with pytest.raises(RecipeError, match="recipe not found"):
        load(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load(tmp_path)
