"""What is not built is refused by name, by every row of the table; what it leaves alone runs."""

import typing

import pytest

from jaxtrain import registry
from jaxtrain.recipe.not_built import TABLE
from jaxtrain.recipe.resolve import resolve
from jaxtrain.trainer.sft import SFTTrainer

BASE = {
    "model": {"name_or_path": "m"},
    "data": {"sources": ["a/b"], "train_eval_split": [0.9, 0.1]},
    "eval_interval": 10,
    "train_iters": 100,
}
BOOKS = {"type": "ProjectGutenbergSFT", "name_or_path": "a/b"}
SNOWFLAKE = {"type": "snowflake", "dataset_uri": "snow://dataset/a/versions/b"}


def model(**keys):
    return {"model": {"name_or_path": "m", **keys}}


def data(**keys):
    return {"data": BASE["data"] | keys}


def exports(**keys):
    return {"checkpoint": [{"type": "huggingface", "output_dir": "a", **keys}]}


def zero(**keys):
    return {"deepspeed": {"zero_optimization": keys}}


EXAMPLES = {
    "type": {"type": "dpo", "data": {"sources": ["a/b"], "train_eval_split": [0.9, 0.1]}},
    "model.dtype": model(dtype="half"),
    "model.peft_config": model(peft_config={"peft_type": "lora"}),
    "data.sources.*.type": {"data": {"sources": [BOOKS]}, "eval_interval": 0},
    "data.eval_sources.*.type": {"data": {"sources": ["a/b"], "eval_sources": [BOOKS]}},
    "data.eval_sources.*.*.type": {"data": {"sources": ["a/b"], "eval_sources": {"x": [BOOKS]}}},
    "data.sources.*.dataset_uri": {"data": {"sources": [SNOWFLAKE]}, "eval_interval": 0},
    "data.eval_sources.*.dataset_uri": {"data": {"sources": ["a/b"], "eval_sources": [SNOWFLAKE]}},
    "data.eval_sources.*.*.dataset_uri": {
        "data": {"sources": ["a/b"], "eval_sources": {"x": [SNOWFLAKE]}}
    },
    "data.streaming": data(streaming=True),
    "data.batch_tokens": data(batch_tokens=4096),
    "optimizer.type": {"optimizer": {"type": "adamw_8bit"}},
    "mesh.context": {"mesh": {"context": 2}},
    "mesh.expert": {"mesh": {"expert": 2}},
    "pipeline.schedule": {"pipeline": {"schedule": "1f1b"}},
    "pipeline.split": {"pipeline": {"split": [1, 2]}},
    "replica_check_interval": 5,
    "activation_checkpoint_cpu_offload": True,
    "enable_routing_replay": True,
    "arctic_moe": True,
    "checkpoint.*.adapter": exports(adapter="merged"),
    "deepspeed.zero_optimization.offload_optimizer.device": zero(
        offload_optimizer={"device": "cpu"}
    ),
    "deepspeed.zero_optimization.offload_param.device": zero(offload_param={"device": "cpu"}),
    "deepspeed.zero_optimization.cpu_offload": zero(cpu_offload=True),
    "deepspeed.zero_optimization.cpu_offload_param": zero(cpu_offload_param=True),
    "deepspeed.data_types.grad_accum_dtype": {
        "deepspeed": {"data_types": {"grad_accum_dtype": "bf16"}}
    },
}


def asked(key):
    example = EXAMPLES[key]
    is_whole = isinstance(example, dict) and ("." in key or key == "type")
    return BASE | (example if is_whole else {key: example})


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.key)
def test_a_row_refuses_by_name(row):
    faults = resolve(asked(row.key)).faults
    (fault,) = (fault for fault in faults if "pip install" not in fault.what)
    plain = ".".join("*" if part.isdigit() else part for part in fault.key.split("."))
    assert plain == row.key.replace("eval_sources.*.*", "eval_sources.x.*")
    assert fault.what.startswith(f"is not built yet, {row.instead} (found ")


def test_every_row_has_an_example():
    assert set(EXAMPLES) == {row.key for row in TABLE}
    assert resolve(BASE).faults == ()


def test_the_key_that_was_written_is_named():
    (fault,) = resolve(BASE | {"sequence_parallel_size": 64}).faults
    assert (fault.key, fault.what) == (
        "sequence_parallel_size",
        "is not built yet, write 1, and lower data.max_length if memory is short (found 64)",
    )


@pytest.mark.parametrize("kind", ["trainer", "optimizer"])
def test_a_planned_class_cannot_be_had(kind):
    for name in filter(lambda name: registry.is_planned(kind, name), registry.names(kind)):
        with pytest.raises(ValueError, match="is not built yet"):
            registry.find(kind, name)


def test_what_a_trainer_allows_is_what_its_annotations_say():
    hints = typing.get_type_hints(SFTTrainer)
    for section, attribute in registry.SECTIONS.items():
        classes = typing.get_args(hints[attribute]) or (hints[attribute],)
        built = [n for n in registry.allowed("sft", section) if not registry.is_planned(section, n)]
        assert [cls.name for cls in classes] == built
