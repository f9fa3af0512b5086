"""What a faulty recipe gets: the exact line for each row of the format's tables of errors."""

from pathlib import Path

import pytest

from jaxtrain import registry
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.messages import list_keys
from jaxtrain.recipe.resolve import get_config, list_type_keys, resolve
from jaxtrain.recipe.strangers import ELSEWHERE
from jaxtrain.recipe.trainer import TrainerConfig

BASE = {"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}}
HELD_OUT = {"data": {"sources": ["a/b"], "train_eval_split": [0.9, 0.1]}, "eval_interval": 10}
NEEDS_EVAL = "needs eval data; add `data.eval_sources` or `data.train_eval_split`"


def model(**keys):
    return {"model": {"name_or_path": "m", **keys}}


def data(**keys):
    return {"data": {"sources": ["a/b"], **keys}}


def source(**keys):
    return {"data": {"sources": [{"name_or_path": "a/b", **keys}]}}


def saves(**keys):
    return {"checkpoint": [{"output_dir": "out", **keys}]}


def exports(**keys):
    return saves(type="huggingface", **keys)


def zero(**keys):
    return {"deepspeed": {"zero_optimization": keys}}


PARAMS_ON_HOST = zero(stage=3, offload_param={"device": "cpu"})


def schedule(name, **keys):
    return {"scheduler": {"name": name, "scheduler_specific_kwargs": keys}}


KEYS = {
    "typo": ({"epoch": 2}, "epoch: unknown key (found 2); did you mean `epochs`?"),
    "of Hugging Face": (
        {"num_train_epochs": 3},
        "num_train_epochs: unknown key (found 3); write `epochs`",
    ),
    "of Hugging Face, near to one of ours": (
        {"save_steps": 3},
        "save_steps: unknown key (found 3); write `checkpoint.save_every_n_steps`",
    ),
    "of axolotl": (
        {"sequence_len": 512},
        "sequence_len: unknown key (found 512); write `data.max_length`",
    ),
    "typo below": (
        {"optimizer": {"learning_rat": 1}},
        "optimizer.learning_rat: unknown key (found 1); did you mean `learning_rate`?",
    ),
    "typo in a list": (
        saves(keep_last=2),
        "checkpoint.0.keep_last: unknown key (found 2); did you mean `keep_last_n` or "
        "`keep_best_n`?",
    ),
    "typo in deepspeed": (
        zero(stge=2),
        "deepspeed.zero_optimization.stge: unknown key (found 2); did you mean `stage`?",
    ),
    "of no section": (
        {"mesh": {"sequence": 2}},
        "mesh.sequence: unknown key (found 2); known: data, fsdp, pipeline, context, expert, tensor",
    ),
    "of another section": (
        {"lr": 1e-5},
        "lr: unknown key (found 1e-05); it is a key of `optimizer`",
    ),
    "of the recipe itself": (
        {"mesh": {"micro_batch_size": 2}, "data": {"sources": ["a/b"], "exit_iteration": 3}},
        "data.exit_iteration: unknown key (found 3); it is a key of the recipe itself, beside its "
        "sections",
    ),
    "of a project": (
        model(num_key_value_layers=16),
        "model.num_key_value_layers: unknown key (found 16); remove it, or, if your own "
        "trainer defines it, name its file under `code:`",
    ),
    "of another type": (
        {"optimizer": {"momentum": 0.9}},
        "optimizer.momentum: unknown key (found 0.9); it belongs to type muon and sgd, not adamw",
    ),
    "unknown trainer": (
        {"type": "stf"},
        "type: unknown trainer type 'stf'; did you mean `sft`? (known: sft, causal, dpo, cpo, "
        "orpo, simpo, kto, "
        "reward, distill, grpo); for your own trainer, name its file under `code:`",
    ),
    "name and type": (
        {"name": "dpo", "type": "sft"},
        "name: 'dpo' contradicts type 'sft'; remove it",
    ),
    "unknown optimizer": (
        {"optimizer": {"type": "adamv"}},
        "optimizer.type: unknown optimizer type 'adamv'; did you mean `adamw` or `cpu_adam`? "
        "(known: adamw, adafactor, lion, muon, sgd, adamw_8bit, fused_adam, fused_adam_moe, "
        "cpu_adam, cpu_adam_moe)",
    ),
    "unknown source": (
        source(type="json1"),
        "data.sources.0.type: unknown data source type 'json1'; did you mean `json` or `jsonl`? "
        "(known: huggingface, huggingface_instruct, huggingface_causal, given, synthetic, local, "
        "json, jsonl, csv, parquet, arrow, text, ProjectGutenbergSFT, snowflake, "
        "snowflake_causal, HuggingFaceH4/ultrafeedback_binarized)",
    ),
    "no model": ({"model": None}, "model: is required"),
    "no map": ({"model": "m"}, "model: must be a map of keys, found 'm'"),
    "no source": (data(sources=[]), "data.sources: is empty; name at least one source"),
    "no such file of code": (
        {"code": "nowhere.py"},
        f"code: no such file: 'nowhere.py' (looked in {Path.cwd()})",
    ),
    "not for this trainer": (
        {"data": {"type": "dpo", "sources": ["a/b"]}},
        "data.type: 'dpo' is not allowed with trainer 'sft', skip_validation: true allows it "
        "(allowed: sft)",
    ),
    "unknown tokenizer": (
        {"tokenizer": {"type": "own"}},
        "tokenizer.type: unknown tokenizer type 'own' (known: huggingface)",
    ),
    "off for a type": (
        {"optimizer": {"type": False}},
        "optimizer.type: must be a name, found false",
    ),
    "zero for a type": ({"scheduler": {"type": 0}}, "scheduler.type: must be a name, found 0"),
    "nothing for a type": (
        {"model": {"type": "", "name_or_path": "m"}},
        "model.type: unknown model type '' (known: huggingface, liger)",
    ),
    "boolean for text": (
        model(name_or_path=True),
        "model.name_or_path: must be text; YAML reads yes, no, on and off as booleans: add quotes",
    ),
    "boolean for a number": (
        {"micro_batch_size": True},
        "micro_batch_size: must be a number, found true",
    ),
    "number for a boolean": (
        data(pack_samples=1),
        "data.pack_samples: must be true or false, found 1",
    ),
    "a fraction": ({"seed": "1.5"}, "seed: must be a whole number, found 1.5"),
    "not finite": ({"max_grad_norm": "nan"}, "max_grad_norm: must be a number, found 'nan'"),
    "below": ({"micro_batch_size": 0}, "micro_batch_size: must be >= 1, found 0"),
    "a word or a list": (
        {"logger": {"print_output_ranks": 0}},
        "logger.print_output_ranks: must be a list or '*', found 0",
    ),
    "a word that is no text": (
        {"data": {"sources": [{"type": "synthetic", "process": True}]}},
        "data.sources.0.process: must be false, found true",
    ),
    "no word of a list": (
        {"scheduler": {"name": "cosin"}},
        "scheduler.name: must be one of 'linear', 'constant', 'constant_with_warmup', 'cosine', "
        "'cosine_with_restarts', 'polynomial', 'inverse_sqrt', 'cosine_with_min_lr', "
        "'cosine_warmup_with_min_lr' or 'warmup_stable_decay', found 'cosin'; did you mean `cosine`?",
    ),
    "auto for a key that is not": (
        zero(stgae="auto"),
        "deepspeed.zero_optimization.stgae: unknown key (found 'auto'); did you mean `stage`?",
    ),
    "no dtype": (
        model(dtype="int8"),
        "model.dtype: must be one of bf16, fp16, fp32, found 'int8'",
    ),
    "case of a word": (
        model(remat="Full"),
        "model.remat: must be one of 'full', 'attention', 'dots' or 'none', found 'Full'; did you mean `full`?",
    ),
}
TRAPS = {
    "A29": (
        exports(auto_resume=True),
        "checkpoint.0.auto_resume: weights alone cannot resume; set it on an `orbax` entry",
    ),
    "A35": (
        data(train_eval_split=[1.5, -0.5]),
        "data.train_eval_split: must be two numbers from 0 to 1 that add up to 1, found 1.5 and "
        "-0.5",
    ),
    "A36 above": (
        source(sample_ratio=1.5),
        "data.sources.0.sample_ratio: must be in (0, 1], found 1.5",
    ),
    "A36 below": (
        source(sample_ratio=0),
        "data.sources.0.sample_ratio: must be in (0, 1], found 0",
    ),
    "A36 count": (source(sample_count=0), "data.sources.0.sample_count: must be > 0, found 0"),
    "A41": (
        source(role_mapping={"user": "q", "content_key": "text"}),
        "data.sources.0.role_mapping: holds roles only; move content_key beside it, into the source",
    ),
    "A44 micro": (
        {"deepspeed": {"train_micro_batch_size_per_gpu": 4}},
        "deepspeed.train_micro_batch_size_per_gpu: must equal micro_batch_size 1, found 4; remove it",
    ),
    "A44 accumulation": (
        {"deepspeed": {"gradient_accumulation_steps": 4}},
        "deepspeed.gradient_accumulation_steps: must equal gradient_accumulation_steps 1, found 4; "
        "remove it",
    ),
    "dpo block": (
        {"type": "dpo", "reference_model_deepspeed": {"a": 1}},
        "reference_model_deepspeed: derived from `deepspeed`, remove it, found {'a': 1}",
    ),
}
ACROSS = {
    "no interval": (
        HELD_OUT | {"eval_interval": 0, "eval_at_end": False},
        "eval_interval: must be > 0 with evaluation data and eval_at_end: false, found 0",
    ),
    "no data": ({"eval_interval": 5}, f"eval_interval: {NEEDS_EVAL}"),
    "no data at the end": ({"eval_at_end": True}, f"eval_at_end: {NEEDS_EVAL}"),
    "no data per epoch": ({"eval_every_n_epochs": 1}, f"eval_every_n_epochs: {NEEDS_EVAL}"),
    "no data to stop on": ({"early_stopping": {"patience": 1}}, f"early_stopping: {NEEDS_EVAL}"),
    "two resume": (
        {"checkpoint": [{"output_dir": d, "auto_resume": True} for d in "ab"]},
        "checkpoint.1.auto_resume: only one entry may resume, found checkpoint.0 and checkpoint.1",
    ),
    "one resumes, one starts": (
        {
            "checkpoint": [
                {"output_dir": "a", "auto_resume": True},
                {"output_dir": "b", "resume_from": 3},
            ]
        },
        "checkpoint.1.resume_from: only one entry may resume, found checkpoint.0 and checkpoint.1",
    ),
    "no such start": (
        saves(output_dir="/nowhere/state", resume_from=3),
        "checkpoint.0.resume_from: must be a folder global_step_N, found none at "
        "/nowhere/state/global_step_3; /nowhere/state contains no checkpoints",
    ),
    "reset of nothing": (
        saves(reset=["optimizer"]),
        "checkpoint.0.reset: nothing is resumed; write auto_resume or resume_from as well",
    ),
    "resume of weights": (
        saves(save_model_only=True, auto_resume=True),
        "checkpoint.0.auto_resume: weights alone cannot resume; write save_model_only: "
        "all_but_last",
    ),
    "rollback to weights": (
        saves(save_model_only=True) | {"divergence": {"action": "rollback"}},
        "divergence.action: rollback needs an `orbax` checkpoint entry",
    ),
    "shards without size": (
        exports(max_shard_size=0),
        "checkpoint.0.max_shard_size: must be at least one byte, found 0",
    ),
    "shards of almost nothing": (
        exports(max_shard_size="0.0001KB"),
        "checkpoint.0.max_shard_size: must be at least one byte, found 0.0001KB",
    ),
    "shards of no unit": (
        exports(max_shard_size="4"),
        "checkpoint.0.max_shard_size: must be a size such as 4GB or 500MiB, found '4'",
    ),
    "one folder twice": (
        {"checkpoint": [{"output_dir": "a"}, {"output_dir": "a", "type": "huggingface"}]},
        "checkpoint.1.output_dir: 'a' is the folder of checkpoint.0 too; use another",
    ),
    "one folder in two spellings": (
        {"checkpoint": [{"output_dir": "a"}, {"output_dir": "./a/", "type": "huggingface"}]},
        "checkpoint.1.output_dir: './a/' is the folder of checkpoint.0 too; use another",
    ),
    "best without scores": (saves(keep_best_n=2), f"checkpoint.0.keep_best_n: {NEEDS_EVAL}"),
    "best off the grid": (
        HELD_OUT | saves(keep_best_n=2, save_every_n_steps=15),
        "checkpoint.0.keep_best_n: needs saves that fall on evaluations: save_every_n_steps 15 "
        "is no "
        "multiple of eval_interval 10; use 10 or 20",
    ),
    "unknown metric that diverges": (
        {"divergence": {"metric": "los"}},
        "divergence.metric: must be one of loss, grad_norm, token_accuracy, z_loss, found 'los'",
    ),
    "unknown metric of an evaluation that diverges": (
        HELD_OUT | {"divergence": {"metric": "eval/bleu"}},
        "divergence.metric: must be one of loss, grad_norm, token_accuracy, z_loss, eval/loss, "
        "eval/perplexity, eval/token_accuracy, found 'eval/bleu'",
    ),
    "unknown metric": (
        HELD_OUT | saves(keep_best_n=2, metric="eval/bleu", mode="max"),
        "checkpoint.0.metric: must be one of eval/loss, eval/perplexity, eval/token_accuracy, "
        "found 'eval/bleu'",
    ),
    "unknown metric to stop on": (
        HELD_OUT | {"early_stopping": {"patience": 1, "metric": "eval/bleu", "mode": "max"}},
        "early_stopping.metric: must be one of eval/loss, eval/perplexity, eval/token_accuracy, "
        "found 'eval/bleu'",
    ),
    "metric of a set that is not there": (
        {"data": {"sources": ["a/b"], "eval_sources": {"chat": ["c/d"]}}, "eval_interval": 10}
        | saves(keep_best_n=1, save_every_n_steps=10, metric="eval/math/loss"),
        "checkpoint.0.metric: must be one of eval/loss, eval/perplexity, eval/token_accuracy, "
        "eval/chat/loss, eval/chat/perplexity, eval/chat/token_accuracy, found 'eval/math/loss'",
    ),
    "best without a direction": (
        HELD_OUT | saves(keep_best_n=2, save_every_n_steps=10, metric="reward"),
        "checkpoint.0.mode: cannot tell whether a smaller reward is better; write min or max",
    ),
    "kept off the grid": (
        saves(keep_every_n_steps=15, save_every_n_steps=10),
        "checkpoint.0.keep_every_n_steps: 15 is no multiple of save_every_n_steps 10; use 10 or 20",
    ),
    "padding": (
        data(pad_to="max_length", max_length=1000, div_length=300),
        "data.max_length: 1000 is not a multiple of div_length 300; use 900 or 1200",
    ),
    "rows over context": (
        data(max_length=1001) | {"sequence_parallel_size": 4},
        "data.max_length: 1001 does not divide into the 8 pieces of mesh.context 4; "
        "use 1000 or 1008",
    ),
    "context twice": (
        {"sequence_parallel_size": 2, "mesh": {"context": 4}},
        "sequence_parallel_size: 2 contradicts mesh.context 4; remove one",
    ),
    "clip twice": (
        {"max_grad_norm": 2, "deepspeed": {"gradient_clipping": 1}},
        "deepspeed.gradient_clipping: 1.0 contradicts max_grad_norm 2.0; remove one",
    ),
    "dtype twice": (
        model(dtype="fp32") | {"deepspeed": {"bf16": {"enabled": True}}},
        "deepspeed.bf16.enabled: disagrees with model.dtype float32; write model.dtype and "
        "remove it",
    ),
    "dtype of the older key": (
        model(dtype="bf16") | {"deepspeed": {"bfloat16": {"enabled": False}}},
        "deepspeed.bfloat16.enabled: disagrees with model.dtype bfloat16; write model.dtype and "
        "remove it",
    ),
    "dtype by default": (
        {"deepspeed": {"fp16": {"enabled": True}}},
        "deepspeed.fp16.enabled: disagrees with model.dtype bfloat16 (its default); write "
        "model.dtype "
        "and remove it",
    ),
    "a floor above the first scale": (
        model(dtype="fp16")
        | {"deepspeed": {"fp16": {"initial_scale_power": 3, "min_loss_scale": 9}}},
        "deepspeed.fp16.min_loss_scale: 9 is above the first scale, 2^3; raise its power",
    ),
    "trained weights in half precision": (
        model(param_dtype="fp16"),
        "model.param_dtype: must be one of 'bfloat16' or 'float32', found 'float16'; did you mean "
        "`bfloat16` or `float32`?",
    ),
    "remat of none": (
        model(remat="none", remat_every_nth_layer=2),
        "model.remat_every_nth_layer: 2 has no effect when no layer is rematerialised; remove it",
    ),
    "remat twice": (
        model(remat="full", disable_activation_checkpoint=True),
        "model.remat: full contradicts disable_activation_checkpoint; remove one",
    ),
    "a text column of conversations": (
        {"data": {"sources": [{"type": "jsonl", "path": "a.jsonl", "column": "body"}]}},
        "data.sources.0.column: belongs to data.type causal, sft does not read it (found 'body')",
    ),
    "roles of plain text": (
        {"type": "causal", **source(role_mapping={"user": "q"})},
        "data.sources.0.role_mapping: belongs to data.type sft, causal does not read it (found "
        "{'user': 'q'})",
    ),
    "a field of plain text, in a named set": (
        {
            "type": "causal",
            "eval_interval": 1,
            "data": {
                "sources": ["a/b"],
                "eval_sources": {"x": ["a/b", {"name_or_path": "c/d", "content_key": "text"}]},
            },
        },
        "data.eval_sources.x.1.content_key: belongs to data.type sft, causal does not read it "
        "(found 'text')",
    ),
    "tokens of pairs": (
        {"type": "dpo", **source(process=False)},
        "data.sources.0.process: belongs to data.type sft, dpo does not read it (found false)",
    ),
    "roles of tokens": (
        source(process=False, role_mapping={"user": "q"}),
        "data.sources.0.role_mapping: has no effect on tokenised records; remove it, or "
        "process: false (found {'user': 'q'})",
    ),
    "lines of objects": (
        {"data": {"sources": [{"type": "local", "path": "a", "per_line": True, "format": "json"}]}},
        "data.sources.0.per_line: has no effect with format: json; remove it",
    ),
    "weight of one source alone": (
        data(sources=[{"name_or_path": "a/b", "weight": 2}, "c/d"]),
        "data.sources.1: has no weight, and another source has; write it for all or for none",
    ),
    "weight below": (source(weight=-1), "data.sources.0.weight: must be > 0, found -1"),
    "weight in an evaluation": (
        {
            "eval_interval": 1,
            "data": {"sources": ["a/b"], "eval_sources": [{"name_or_path": "c/d", "weight": 1}]},
        },
        "data.eval_sources: weight has no effect here; remove it",
    ),
    "padding of pairs": (
        {"type": "dpo", **data(pad_to="max_length")},
        "data.pad_to: unknown key (found 'max_length'); it belongs to type sft, not dpo",
    ),
    "no room for a reply": (
        {"type": "dpo", **data(max_prompt_length=64, max_length=64)},
        "data.max_prompt_length: 64 leaves no room for a reply in max_length 64; use at most 63",
    ),
    "two evaluation sets": (
        HELD_OUT | {"data": HELD_OUT["data"] | {"eval_sources": ["c/d"]}},
        "data.train_eval_split: excludes eval_sources; remove one",
    ),
    "two samples": (
        source(sample_ratio=0.5, sample_count=2),
        "data.sources.0.sample_ratio: excludes sample_count; remove one",
    ),
    "two warm-ups": (
        {"scheduler": {"warmup_ratio": 0.1, "warmup_steps": 3}},
        "scheduler.warmup_ratio: excludes warmup_steps; remove one",
    ),
    "file system": (
        data(cache_fs_type="nfs"),
        "data.cache_fs_type: must be one of 'auto', 'local' or 'shared', found 'nfs'",
    ),
    "stages": (
        {"pipeline": {"microbatches": 2}},
        "pipeline.microbatches: has no effect with mesh.pipeline 1; remove it",
    ),
    "microbatches": (
        {
            "pipeline": {"microbatches": 5},
            "mesh": {"pipeline": 2},
            "gradient_accumulation_steps": 8,
        },
        "pipeline.microbatches: 5 does not divide the 8 sequences of a batch shard; use 4 or 8",
    ),
    "stages a device": (
        {"pipeline": {"stages_per_device": 2}},
        "pipeline.stages_per_device: 2 needs schedule: interleaved, found gpipe",
    ),
    "a store": (
        {"run_dir": "gs://bucket/run"},
        "run_dir: must be a local folder, found 'gs://bucket/run'; object stores are not supported "
        "yet",
    ),
    "a store for checkpoints": (
        {"checkpoint": {"type": "huggingface", "output_dir": "s3://bucket/out"}},
        "checkpoint.0.output_dir: must be a local folder, found 's3://bucket/out'; object stores are "
        "not supported yet",
    ),
    "a folder that Orbax globs": (
        {"run_dir": "/runs/a[1]", "checkpoint": {"output_dir": "{run_dir}/state"}},
        "checkpoint.0.output_dir: Orbax cannot read back a folder with [ ] in its path, found "
        "'/runs/a[1]/state'",
    ),
    "two open axes": ({"mesh": {"data": -1, "fsdp": -1}}, "mesh: only one axis may be -1"),
    "long warm-up": (
        {"train_iters": 10, "scheduler": {"warmup_steps": 11}},
        "scheduler.warmup_steps: 11 is longer than the run of 10 steps",
    ),
    "long warm-up, of epochs too": (
        {"train_iters": 10, "epochs": 2, "scheduler": {"warmup_steps": 11}},
        "scheduler.warmup_steps: 11 is longer than the run of 10 steps",
    ),
    "long decay": (
        {"train_iters": 10}
        | {"scheduler": {"type": "wsd", "num_warmup_steps": 8, "num_decay_steps": 9}},
        "scheduler.num_decay_steps: 17 with num_warmup_steps is longer than the run of 10 steps",
    ),
    "rows of plain text": (
        {"type": "causal", **data(div_length=8, pack_samples=True)},
        "data.div_length: causal sequences all have `max_length` tokens; remove it",
    ),
    "more rows of plain text": (
        {"type": "causal", **data(div_length=8, pack_samples=True)},
        "data.pack_samples: causal sequences all have `max_length` tokens; remove it",
    ),
    "trace": (
        {"train_iters": 10, "profile": {"start_step": 10}},
        "profile.start_step: 10 is after the end of the run of 10 steps",
    ),
    "rollback": (
        {"on_nonfinite": "rollback"},
        "on_nonfinite: rollback needs an `orbax` checkpoint entry",
    ),
    "stop mode": (
        HELD_OUT | {"early_stopping": {"patience": 1, "metric": "eval/x"}},
        "early_stopping.mode: cannot tell whether a smaller eval/x is better; write min or max",
    ),
}
SECTIONS = {
    "rate in scheduler": (
        {"scheduler": {"lr": 1e-5}},
        "scheduler.lr: use `optimizer.learning_rate`, found 1e-05",
    ),
    "rate of zero in scheduler": (
        {"scheduler": {"lr": 0}},
        "scheduler.lr: use `optimizer.learning_rate`, found 0",
    ),
    "initial adapters": (
        model(peft_config={"peft_type": "Lora", "init_lora_weights": "pissa"}),
        "model.peft_config.init_lora_weights: must be true or false or 'gaussian', found 'pissa'",
    ),
    "no prompts": (
        {"eval_samples": {"prompts": "none.txt"}},
        "eval_samples.prompts: must be a list or a text file, found 'none.txt'",
    ),
    "plateau": (
        {"scheduler": {"name": "reduce_lr_on_plateau"}},
        "scheduler.name: reduce_lr_on_plateau needs a metric, which a recipe cannot name; use "
        "one of linear, "
        "constant, constant_with_warmup, cosine, cosine_with_restarts, polynomial, inverse_sqrt, "
        "cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay",
    ),
    "key of a shape": (
        schedule("cosine", num_cycle=1),
        "scheduler.scheduler_specific_kwargs.num_cycle: unknown key (found 1); did you mean "
        "`num_cycles`?",
    ),
    "key of no shape": (
        schedule("constant", power=1),
        "scheduler.scheduler_specific_kwargs.power: unknown key (found 1); keys of 'constant': none",
    ),
    "missing key": (
        {"scheduler": {"type": "wsd", "num_warmup_steps": 7}},
        "scheduler.num_decay_steps: is required",
    ),
    "missing key of a shape": (
        schedule("warmup_stable_decay"),
        "scheduler.scheduler_specific_kwargs.num_decay_steps: is required",
    ),
    "no minimum": (
        schedule("cosine_with_min_lr"),
        "scheduler.scheduler_specific_kwargs: needs one of min_lr and min_lr_rate",
    ),
    "a floor without meaning": (
        {"scheduler": {"name": "inverse_sqrt", "min_lr_ratio": 0.1}},
        "scheduler.min_lr_ratio: has no meaning for 'inverse_sqrt'; use one of linear, cosine, "
        "polynomial, "
        "warmup_stable_decay",
    ),
    "warm-up of wsd": (
        {
            "scheduler": {
                "type": "wsd",
                "num_warmup_steps": 1,
                "num_decay_steps": 1,
                "warmup_ratio": 0.1,
            }
        },
        "scheduler.warmup_ratio: the warm-up is num_warmup_steps here; remove it",
    ),
    "rates and names": (
        {"optimizer": {"lr": 1, "learning_rate": 2}},
        "optimizer.lr: is another name of `learning_rate`, which is written too; remove one",
    ),
    "betas": (
        {"optimizer": {"betas": [0.9, 1.0]}},
        "optimizer.betas: must be two numbers in [0, 1), found [0.9, 1.0]",
    ),
    "group": (
        {"optimizer": {"groups": [{"match": "("}]}},
        "optimizer.groups.0.match: is no regular expression (missing ), unterminated subpattern "
        "at position 0), "
        "found '('",
    ),
    "adapter": (
        model(peft_config={"peft_type": "IA3"}),
        "model.peft_config.peft_type: must be Lora, found 'IA3'",
    ),
    "bias": (
        model(peft_config={"peft_type": "Lora", "bias": "all"}),
        "model.peft_config.bias: must be 'none', found 'all'",
    ),
    "dora": (
        model(peft_config={"peft_type": "Lora", "loftq_config": {"loftq_bits": 4}}),
        "model.peft_config.loftq_config: is not supported, found {'loftq_bits': 4}",
    ),
    "special tokens": (
        {"tokenizer": {"tokenize_kwargs": {"add_special_tokens": True}}},
        "tokenizer.tokenize_kwargs.add_special_tokens: BOS and EOS are added to each document "
        "already; remove it",
    ),
    "disk": (
        zero(offload_optimizer={"device": "nvme"}),
        "deepspeed.zero_optimization.offload_optimizer.device: not supported yet, found "
        "'nvme'; use `device: cpu`",
    ),
    "offload and none": (
        zero(offload_optimizer={"device": "none"}, cpu_offload=True),
        "deepspeed.zero_optimization.cpu_offload: true contradicts offload_optimizer.device 'none'",
    ),
    "parameters and none": (
        zero(stage=3, offload_param={"device": "none"}, cpu_offload_param=True),
        "deepspeed.zero_optimization.cpu_offload_param: true contradicts offload_param.device "
        "'none'",
    ),
    "parameters of another stage": (
        zero(stage=2, offload_param={"device": "cpu"}),
        "deepspeed.zero_optimization.offload_param.device: needs stage: 3, which gathers "
        "parameters per layer, found 2",
    ),
    "parameters of stages": (
        PARAMS_ON_HOST | {"mesh": {"pipeline": 2}},
        "deepspeed.zero_optimization.offload_param.device: excludes mesh.pipeline, whose stages "
        "keep their layers, found 2; use mesh.fsdp",
    ),
    "parameters that nothing copies again": (
        PARAMS_ON_HOST | model(remat_every_nth_layer=2),
        "deepspeed.zero_optimization.offload_param.device: needs every layer recomputed: one that "
        "is not keeps its weights on the devices; write model.remat: full, "
        "remat_every_nth_layer: 1",
    ),
    "groups of devices": (
        zero(zero_hpz_partition_size=8),
        "deepspeed.zero_optimization.zero_hpz_partition_size: use `mesh.fsdp` to shard inside a "
        "group, found 8",
    ),
    "stage": (zero(stage=4), "deepspeed.zero_optimization.stage: must be in [0, 3], found 4"),
    "quantised": (
        zero(zero_quantized_weights=True),
        "deepspeed.zero_optimization.zero_quantized_weights: is not supported: it would change "
        "the result, found true",
    ),
    "optimizer below": (
        {"deepspeed": {"scheduler": {"type": "WarmupLR"}}},
        "deepspeed.scheduler: write it under `scheduler:`, found {'type': 'WarmupLR'}",
    ),
    "amp": (
        {"deepspeed": {"amp": {"enabled": True}}},
        "deepspeed.amp: use `model.dtype`, found {'enabled': True}",
    ),
    "snowflake table": (
        source(type="snowflake", name_or_path="x"),
        "data.sources.0.name_or_path: unknown key (found 'x'); it belongs to type huggingface "
        "and huggingface_instruct and huggingface_causal and ProjectGutenbergSFT, not snowflake",
    ),
    "size": (
        exports(max_shard_size="4 apples"),
        "checkpoint.0.max_shard_size: must be a size such as 4GB or 500MiB, found '4 apples'",
    ),
    "level": (
        {"logger": {"level": "LOUD"}},
        "logger.level: must be one of 'DEBUG', 'INFO', 'WARNING', 'ERROR' or 'CRITICAL', found "
        "'LOUD'",
    ),
}
TABLE = KEYS | TRAPS | ACROSS | SECTIONS


@pytest.mark.covers("data.type", "tokenizer.type", "checkpoint.*.metric")
@pytest.mark.covers("pipeline.stages_per_device", "scheduler.num_decay_steps")
@pytest.mark.covers("deepspeed.bf16.enabled deepspeed.bfloat16.enabled deepspeed.fp16.enabled")
@pytest.mark.parametrize("case", TABLE)
def test_the_exact_line(case, monkeypatch):
    monkeypatch.setattr(registry, "_user", {})  # classes of other tests are no part of a message
    change, line = TABLE[case]
    with pytest.raises(RecipeError) as error:
        get_config(BASE | change)
    assert line in str(error.value).splitlines()


@pytest.mark.parametrize(
    "amount", [{"amp": {"enabled": False}}, {"curriculum_learning": {"enabled": False}}]
)
def test_what_is_off_is_no_fault(amount):
    assert get_config(BASE | {"deepspeed": amount})


def test_a_section_without_keys_is_as_one_that_is_left_out():
    empty = dict.fromkeys(
        ("optimizer", "scheduler", "tokenizer", "checkpoint", "mesh", "pipeline", "wandb", "logger",
         "tensorboard", "deepspeed", "ema", "profile")
    )  # fmt: skip
    assert get_config(BASE | empty) == get_config(BASE)


def test_every_key_of_other_trainers_names_one_of_ours():
    for key, target in ELSEWHERE.items():
        section, _, name = target.partition(".")
        types = registry.BUILT_IN.get(section, ()) if section in registry.SECTIONS else ()
        known = [own for kind in types for own in list_type_keys(section, kind)]
        known += list_keys(TrainerConfig, (section,) if name else ())
        assert (name or section) in known, (key, target)
        assert f"write `{target}`" in str(resolve(BASE | {key: 1}).faults[0]), key


def test_a_path_without_a_type_is_a_local_source():
    (source,) = get_config(BASE | {"data": {"sources": [{"path": "a.jsonl"}]}}).data.sources
    assert (source.type, source.path) == ("local", "a.jsonl")


def test_an_interval_is_not_needed_where_the_end_evaluates():
    assert get_config(HELD_OUT | {"model": {"name_or_path": "m"}, "eval_interval": 0})


def test_a_used_stop_file_is_stale(tmp_path):
    (tmp_path / "stop").touch()
    with pytest.raises(RecipeError, match=r"kill_switch_path: .* exists already; remove it"):
        get_config(BASE | {"kill_switch_path": str(tmp_path / "stop")})
    moved = saves(resume_from="/nowhere/global_step_3", auto_resume=True)
    ended = BASE | moved | {"kill_switch_path": str(tmp_path / "stop")}
    assert len(resolve(ended).faults) == 2
    assert get_config(ended, runs_here=False)  # as `jaxtrain export` reads the recipe of a run


@pytest.mark.parametrize("name", ["wsd", "wds"])
@pytest.mark.parametrize("trainer", registry.BUILT_IN["trainer"])
def test_a32_the_scheduler_has_both_names_in_every_trainer(trainer, name):
    """Trap A32."""
    scheduler = {"type": name, "num_warmup_steps": 1, "num_decay_steps": 9}
    resolved = resolve(BASE | {"type": trainer, "scheduler": scheduler, "train_iters": 20})
    assert not [fault for fault in resolved.faults if fault.key.startswith("scheduler")]


def test_f13_the_last_and_the_best_are_kept_together():
    """Trap F13."""
    entry = get_config(
        BASE | HELD_OUT | saves(keep_last_n=2, keep_best_n=3, save_every_n_steps=20)
    ).checkpoint[0]
    assert (entry.keep_last_n, entry.keep_best_n) == (2, 3)


def test_a46_a_hundred_faults_come_at_once(tmp_path):
    """Trap A46: one message with every fault, sorted by line, each line once."""
    lines = ["model: {name_or_path: m}", "data: {sources: [a/b]}"]
    lines += [f"no_such_key_{n}: 1" for n in range(100)]
    file = tmp_path / "recipe.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(RecipeError) as error:
        get_config(file, ["epochs=-1"])
    *faults, first, last = str(error.value).splitlines()[-102:]
    assert [line.split(":")[1] for line in [*faults, first][:100]] == [
        str(n) for n in range(3, 103)
    ]
    assert last == "101 errors in recipe.yaml; nothing was started"


def test_a_fault_hides_no_other_fault_of_its_section():
    """Of a section, of the checks across keys, and of what is not built; but not what only the
    first one brings about."""
    block = {"amp": {"enabled": True}, "train_micro_batch_size_per_gpu": 8}
    offload = {"stage": 9, "zero_hpz_partition_size": 8, "offload_param": {"device": "nvme"}}
    data = {"sources": ["a/b"], "max_lenght": 9, "train_eval_split": [2, 3], "pack_samples": "ja"}
    recipe = BASE | {
        "data": data | {"drop_last": True},
        "deepspeed": block | {"zero_optimization": offload},
        "seed": "x",
    }
    assert sorted(fault.key for fault in resolve(recipe).faults) == [
        "data.max_lenght",
        "data.pack_samples",
        "data.train_eval_split",
        "deepspeed.amp",
        "deepspeed.train_micro_batch_size_per_gpu",
        "deepspeed.zero_optimization.offload_param.device",
        "deepspeed.zero_optimization.stage",
        "deepspeed.zero_optimization.zero_hpz_partition_size",
        "seed",
    ]
    recipe = BASE | {"micro_batch_size": "x", "deepspeed": {"train_micro_batch_size_per_gpu": 8}}
    assert [fault.key for fault in resolve(recipe).faults] == ["micro_batch_size"]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("x" * 200, "'" + "x" * 58 + "…"),
        ([1] * 100, "[" + "1, " * 19 + "1…"),
        (False, "false"),
        (1e-5, "1e-05"),
        (None, "null"),
    ],
)
def test_a_found_value_is_shown_in_sixty_characters(value, found):
    (fault,) = resolve(BASE | {"no_such_key_at_all": value}).faults
    assert fault.what.startswith(f"unknown key (found {found})")
    assert len(found) <= 60


def test_the_place_is_a_line_or_the_command_line_or_none(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {name_or_path: m}\ndata:\n  sources: [a/b]\nseed: x\n")
    (fault,) = resolve(file).faults
    assert str(fault) == f"{file}:4: seed: must be a number, found 'x'"
    (fault,) = resolve(BASE, ["seed=x"]).faults
    assert str(fault) == "command line: seed: must be a number, found 'x'"
    (fault,) = resolve(BASE | {"seed": "x"}).faults
    assert str(fault) == "seed: must be a number, found 'x'"
