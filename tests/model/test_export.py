"""An export appears whole or not at all."""

import json
import os
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import FAMILIES, describe_model, load_model, save_model

from jaxtrain.model.export import save_pretrained, verify_folder
from jaxtrain.model.tensor_file import read_folder
from jaxtrain.recipe.errors import CheckpointError


@pytest.fixture(scope="module")
def exportable(tmp_path_factory):
    return load_model(save_model("llama31", tmp_path_factory.mktemp("hf") / "m"))


def test_an_interrupted_export_leaves_the_old_one_and_nothing_else(exportable, tmp_path):
    config, hf, _, params = exportable
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


def test_an_export_replaces_the_one_before_and_holds_the_files_added(exportable, tmp_path):
    config, hf, _, params = exportable
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
    assert describe_model(out)[0] == config
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def set_config(**changes):
    def harm(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return harm


def flip_a_bit(folder):
    file = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    with file.open("r+b") as stream:
        stream.seek(-100, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-100, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))


def cut_short(folder):
    file = next(folder.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 2)


def lose_a_shard(folder):
    max(folder.glob("*.safetensors")).unlink()


ROPE = {"rope_type": "default", "rope_theta": 1000.0}
HARM = {
    "rope lost": (set_config(rope_parameters=ROPE, rope_scaling=None), "describes another groups"),
    "heads": (set_config(num_attention_heads=2), "describes another"),
    "a bit": (flip_a_bit, "1 parameters differ when read back, first "),
    "truncated": (cut_short, "not a safetensors file"),
    "a shard": (lose_a_shard, "which does not exist"),
}


@pytest.mark.parametrize("case", HARM)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_that_reads_back_as_something_else_is_not_there(
    exportable, tmp_path, case, dtype
):
    """Trap F15."""
    config, hf, _, params = exportable
    harm, expected = HARM[case]
    options = {"dtype": dtype, "max_shard_bytes": 20_000, "add_files": harm}
    with pytest.raises(CheckpointError, match=f"failed verification and was removed: .*{expected}"):
        save_pretrained(tmp_path / "out", params, config, hf, **options)
    assert list(tmp_path.iterdir()) == []
    save_pretrained(tmp_path / "out", params, config, hf, **options, verify=False)
    assert (tmp_path / "out").is_dir()


QUICK = ("llama31", "qwen2-alternating", "gemma3-whole", "gpt-oss", "lfm2", "gpt2")


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES],
)
def test_an_export_of_every_family_passes_its_check(tmp_path, family):
    config, hf, _, params = load_model(save_model(family, tmp_path / "m"))
    params["norm"] = params["norm"].at[0].set(jnp.nan)
    save_pretrained(tmp_path / "out", params, config, hf, dtype="bfloat16")
    other = jax.tree.map(lambda leaf: leaf, params) | {"norm": params["norm"].at[1].add(0.5)}
    with pytest.raises(CheckpointError, match="1 parameters differ when read back, first norm"):
        verify_folder(tmp_path / "out", other, config, "bfloat16")


def test_no_file_is_larger_than_the_limit_but_for_a_tensor_that_is(exportable, tmp_path):
    config, hf, _, params = exportable
    limit = 8_000
    save_pretrained(tmp_path, params, config, hf, dtype="float32", max_shard_bytes=limit)
    files = {file: file.stat().st_size for file in tmp_path.glob("*.safetensors")}
    assert len(files) > 3 and (tmp_path / "model.safetensors.index.json").is_file()
    tensors = read_folder(tmp_path)
    largest = max(4 * np.prod(stored.shape) for stored in tensors.values())
    assert largest > limit
    for size in files.values():
        assert size < max(limit, largest) + 2_000  # the header


def test_a_full_disk_leaves_the_old_export(exportable, tmp_path):
    config, hf, _, params = exportable
    save_pretrained(tmp_path / "out", params, config, hf, dtype="float32")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            save_pretrained(tmp_path / "out", params, config, hf, dtype="float32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    verify_folder(tmp_path / "out", params, config, "float32")
