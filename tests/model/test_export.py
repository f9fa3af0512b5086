"""An export appears whole or not at all."""

import json

import jax
import numpy as np
import pytest
from tiny_models import described, loaded, saved

from jaxtrain.model.export import save_pretrained
from jaxtrain.model.tensor_file import read_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return loaded(saved("llama31", tmp_path_factory.mktemp("hf") / "m"))


def test_an_interrupted_export_leaves_the_old_one_and_nothing_else(made, tmp_path):
    config, hf, _, params = made
    out = tmp_path / "out"
    save_pretrained(out, params, config, hf, dtype="float32")

    def fail(folder):
        assert (folder / "config.json").is_file() and folder != out
        raise KeyboardInterrupt

    other = jax.tree.map(lambda leaf: leaf + 1, params)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(out, other, config, hf, dtype="float32", add_files=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    np.testing.assert_array_equal(read_folder(out)["model.norm.weight"].read(), params["norm"])


def test_an_export_replaces_the_one_before_and_holds_the_files_added(made, tmp_path):
    config, hf, _, params = made
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.txt").touch()
    save_pretrained(
        out,
        params,
        config,
        hf,
        dtype="bfloat16",
        generation_config={"eos_token_id": 2},
        add_files=lambda folder: (folder / "tokenizer.json").write_text("{}") and None,
    )
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert described(out)[0] == config
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
