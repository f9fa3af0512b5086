"""Recipes as people write them for ArcticTraining, in our words: what they use of its keys."""

from importlib.util import find_spec

CHAT = {"name_or_path": "meta-llama/Llama-3.1-8B-Instruct"}
ULTRACHAT = {"sources": ["HuggingFaceH4/ultrachat_200k"]}
STATE = {"type": "deepspeed", "output_dir": "state", "save_every_n_steps": 100, "auto_resume": True}
EXPORT = {"type": "huggingface", "output_dir": "out", "save_end_of_training": True}
SMALL = {"model": CHAT, "data": ULTRACHAT, "checkpoint": [EXPORT]}


def long_sequences(name_or_path: str, *, devices: int, tokens: int) -> dict:
    """One sequence a step, which all devices share; in the host's memory is what can be there."""
    return {
        "type": "sft",
        "micro_batch_size": 1,
        "min_iterations": 10,
        "exit_iteration": 10,
        "train_log_iter_interval": 1,
        "sequence_parallel_size": devices,
        "activation_checkpoint_cpu_offload": True,
        "tiled_mlp_compute": True,
        "model": {
            "type": "liger",
            "name_or_path": name_or_path,
            "attn_implementation": "flash_attention_2",
        },
        "data": {
            **ULTRACHAT,
            "cache_dir": "cache",
            "dl_num_workers": 1,
            "pack_samples": True,
            "max_length": tokens,
        },
        "optimizer": {"type": "cpu_adam", "learning_rate": 1e-5},
        "deepspeed": {
            "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
            "seq_parallel_communication_data_type": "bf16",
        },
        "logger": {"level": "WARNING", "output_dir": "logs", "print_output_ranks": [0, 1]},
        "wandb": {"enable": False, "project": "long", "name": "one-sequence"},
    }


ACCEPTED = {
    "causal": {**SMALL, "type": "causal", "data": {"sources": ["allenai/c4"]}},
    "sft": {
        "type": "sft",
        "micro_batch_size": 2,
        "model": {
            "type": "huggingface",
            **CHAT,
            "attn_implementation": "flash_attention_2",
            "dtype": "bf16",
        },
        "data": {
            "type": "sft",
            **ULTRACHAT,
            "max_length": 4096,
            "num_proc": 32,
            "dl_num_workers": 4,
        },
        "scheduler": {"type": "huggingface", "name": "cosine", "warmup_ratio": 0.05},
        "optimizer": {
            "type": "fused_adam",
            "lr": "2e-5",
            "weight_decay": 0.1,
            "betas": [0.9, 0.95],
        },
        "deepspeed": {"zero_optimization": {"stage": 3}},
        "checkpoint": [STATE, EXPORT],
    },
    "older spelling": {"name": "sft", "epochs": 3, **SMALL},
    "one checkpoint as a map": SMALL | {"checkpoint": EXPORT},
    "liger": SMALL | {"model": {"type": "liger", **CHAT, "disable_activation_checkpoint": True}},
    "packed": SMALL
    | {
        "data": {**ULTRACHAT, "max_length": "8Ki", "pack_samples": True, "div_length": 1024},
        "gradient_accumulation_steps": 8,
        "min_iterations": 0,
        "exit_iteration": 500,
    },
    "evaluation": SMALL
    | {
        "eval_interval": 50,
        "data": {
            "pad_to": "max_length",
            "max_length": 100,
            "sources": ["a/b:train[:1000]"],
            "eval_sources": [{"name_or_path": "a/b", "split": "test"}],
        },
    },
    "ratio split": SMALL
    | {"eval_interval": 10, "data": {**ULTRACHAT, "train_eval_split": [0.9, 0.1]}},
    "zero 0": SMALL | {"deepspeed": {"zero_optimization": {"stage": 0}}},
    "zero 1": SMALL | {"deepspeed": {"zero_optimization": {"stage": 1, "overlap_comm": True}}},
    "zero 2": SMALL
    | {
        "deepspeed": {
            "zero_optimization": {
                "stage": 2,
                "reduce_bucket_size": "auto",
                "contiguous_gradients": True,
                "offload_optimizer": {"device": "none", "pin_memory": True},
            },
            "bf16": {"enabled": True},
            "gradient_clipping": 0.5,
            "steps_per_print": 10,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": 1,
            "activation_checkpointing": {"partition_activations": True},
            "wall_clock_breakdown": False,
        }
    },
    "zero 3": SMALL
    | {
        "deepspeed": {
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": "auto",
                "sub_group_size": 1e9,
                "stage3_gather_16bit_weights_on_model_save": True,
            }
        }
    },
    "half precision": SMALL | {"model": {**CHAT, "dtype": "fp16"}},
    "half precision with its scaler": SMALL
    | {
        "model": {**CHAT, "dtype": "half"},
        "deepspeed": {
            "fp16": {
                "enabled": True,
                "auto_cast": True,
                "loss_scale": 0,
                "initial_scale_power": 12,
                "loss_scale_window": 500,
                "hysteresis": 3,
                "consecutive_hysteresis": True,
                "min_loss_scale": 0.5,
            }
        },
    },
    "half precision with a fixed scale": SMALL
    | {
        "model": {**CHAT, "dtype": "fp16"},
        "deepspeed": {"fp16": {"loss_scale": 128, "hysteresis": 4}},
    },
    "a scaler without half precision": SMALL
    | {"deepspeed": {"fp16": {"enabled": False, "loss_scale_window": 100}}},
    "autocast": SMALL
    | {
        "model": {**CHAT, "dtype": "fp32"},
        "deepspeed": {
            "torch_autocast": {
                "enabled": True,
                "dtype": "torch.bfloat16",
                "lower_precision_safe_modules": ["torch.nn.Linear"],
            }
        },
    },
    "autocast off": SMALL | {"deepspeed": {"torch_autocast": {"enabled": False, "dtype": "fp16"}}},
    "offload": SMALL
    | {
        "activation_checkpoint_cpu_offload": True,
        "deepspeed": {
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "cpu", "pin_memory": True, "ratio": 1.0},
            }
        },
        "optimizer": {"type": "cpu_adam", "learning_rate": 1e-5},
    },
    "offload by its older name": SMALL
    | {
        "deepspeed": {
            "zero_optimization": {"stage": 2, "cpu_offload": True},
            "activation_checkpointing": {"cpu_checkpointing": True},
        }
    },
    "offload of parameters": SMALL
    | {
        "deepspeed": {
            "zero_optimization": {
                "stage": 3,
                "offload_param": {"device": "cpu", "pin_memory": True, "buffer_count": 5},
                "offload_optimizer": {"device": "cpu"},
            }
        },
    },
    "offload of parameters by its older name": SMALL
    | {"deepspeed": {"zero_optimization": {"stage": 3, "cpu_offload_param": True}}},
    "inputs of layers that nothing recomputes": SMALL
    | {
        "model": {**CHAT, "disable_activation_checkpoint": True},
        "activation_checkpoint_cpu_offload": True,
    },
    "cpu adam": SMALL | {"optimizer": {"type": "cpu_adam", "learning_rate": 1e-5}},
    "wds": SMALL
    | {
        "train_iters": 1000,
        "scheduler": {"type": "wds", "num_warmup_steps": 10, "num_decay_steps": 90},
    },
    **{
        f"sequence parallel {n}": SMALL | {"sequence_parallel_size": n}
        for n in (1, 2, 4, 8, 16, 32, 64)
    },
    "long sequences on a node": long_sequences(CHAT["name_or_path"], devices=8, tokens=524_288),
    "long sequences on eight nodes": long_sequences("Qwen/Qwen3-32B", devices=64, tokens=1_048_576),
    "expert parallel": SMALL
    | {"expert_parallel_size": 8, "arctic_moe": True, "enable_routing_replay": True},
    "ranks": SMALL | {"logger": {"print_output_ranks": [0, 1, 2, 3, 4, 5, 6, 7]}},
    "memory profile": SMALL | {"mem_profiler": "step", "mem_profiler_dir": "profiles"},
    "a folder without a profile": SMALL | {"mem_profiler_dir": "profiles"},
    "weights and biases off": SMALL | {"wandb": {"enable": False, "project": "p", "entity": "e"}},
    "mixture and samples": SMALL
    | {
        "data": {
            "sources": [
                {
                    "type": "huggingface_instruct",
                    "name_or_path": "a/b",
                    "sample_count": 100,
                    "role_mapping": {"user": "question", "assistant": "answer"},
                },
                {
                    "type": "huggingface",
                    "name_or_path": "c/d",
                    "split": "train_sft",
                    "sample_ratio": "10%",
                },
            ]
        }
    },
    "peft": SMALL
    | {"model": {**CHAT, "peft_config": {"peft_type": "LORA", "r": 16, "task_type": "CAUSAL_LM"}}},
}
"""Name → a recipe that runs here."""

DPO = {
    "type": "dpo",
    "model": CHAT,
    "ref_model": CHAT,
    "beta": 0.1,
    "data": {"sources": ["HuggingFaceH4/ultrafeedback_binarized"], "max_prompt_length": 2048},
    "checkpoint": [EXPORT],
}
REFUSED = {
    "dpo": (DPO, {"type"}),
    "dpo with a bad beta": (DPO | {"beta": 0}, {"beta", "type"}),
    "dpo with a deepspeed block": (
        DPO | {"reference_model_deepspeed": {"zero_optimization": {"stage": 3}}},
        {"type", "reference_model_deepspeed"},
    ),
    "another adapter": (
        SMALL | {"model": {**CHAT, "peft_config": {"peft_type": "IA3"}}},
        {"model.peft_config.peft_type"},
    ),
    "offload of parameters that are copied": (
        SMALL
        | {"deepspeed": {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}},
        {"deepspeed.zero_optimization.offload_param.device"},
    ),
    "offload to disk": (
        SMALL | {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}},
        {"deepspeed.zero_optimization.offload_optimizer.device"},
    ),
    "half precision in the block alone": (
        SMALL | {"deepspeed": {"fp16": {"enabled": True, "loss_scale": 0}}},
        {"deepspeed.fp16.enabled"},
    ),
    "weights in half precision": (
        SMALL | {"model": {**CHAT, "dtype": "fp16", "param_dtype": "fp16"}},
        {"model.param_dtype"},
    ),
    "autocast against the dtype": (
        SMALL
        | {
            "model": {**CHAT, "dtype": "bf16"},
            "deepspeed": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
        },
        {"deepspeed.torch_autocast.dtype"},
    ),
    "texts to distil": (
        SMALL | {"data": {"sources": [{"type": "ProjectGutenbergSFT", "name_or_path": "a/b"}]}},
        {"data.sources.0.type"},
    ),
    "snowflake": (
        SMALL | {"data": {"sources": [{"type": "snowflake", "table_name": "db.schema.chats"}]}},
        set() if find_spec("snowflake") else {"data.sources.0.type"},
    ),
    "snowflake with two places": (
        SMALL
        | {"data": {"sources": [{"type": "snowflake", "table_name": "t", "sql": "select 1"}]}},
        {"data.sources.0"},
    ),
    "speculator": (
        {
            "type": "mlp_speculator",
            "gen_train": True,
            **SMALL,
            "model": {"type": "mlp_speculator", **CHAT},
        },
        {"type"},
    ),
    "lstm speculator": ({"type": "lstm_speculator", **SMALL}, {"type"}),
    "swiftkv": ({"type": "swiftkv", "logits_loss_temp": 2.0, **SMALL}, {"type"}),
    "keys of a project": (
        SMALL | {"model": {**CHAT, "num_key_value_layers": 16}},
        {"model.num_key_value_layers"},
    ),
    "retired keys": (
        SMALL | {"zero_3_enabled": True, "lr": 1e-5},
        {"zero_3_enabled", "lr"},
    ),
    "a batch of its own": (
        SMALL | {"deepspeed": {"train_micro_batch_size_per_gpu": 4}},
        {"deepspeed.train_micro_batch_size_per_gpu"},
    ),
    "an optimizer in the block": (
        SMALL | {"deepspeed": {"optimizer": {"type": "AdamW"}}},
        {"deepspeed.optimizer"},
    ),
    "a rate in the scheduler": (SMALL | {"scheduler": {"lr": 1e-5}}, {"scheduler.lr"}),
    "weights that resume": (
        SMALL | {"checkpoint": [{**EXPORT, "auto_resume": True}]},
        {"checkpoint.0.auto_resume"},
    ),
    "a clip said twice": (
        SMALL | {"max_grad_norm": 2.0, "deepspeed": {"gradient_clipping": 1.0}},
        {"deepspeed.gradient_clipping"},
    ),
    "curriculum": (
        SMALL | {"deepspeed": {"curriculum_learning": {"enabled": True}}},
        {"deepspeed.curriculum_learning"},
    ),
    "a typo in the block": (
        SMALL | {"deepspeed": {"zero_optimisation": {"stage": 3}}},
        {"deepspeed.zero_optimisation"},
    ),
}
"""Name → a recipe that does not run here, and the keys that say why."""
